#!/bin/sh
# /sbin/init of the disk under test: says where it runs, runs the test's script, powers off.
#
# What the harness reads from the console, a line each:
#   ROOT name=value     evidence that / is the disk under test
#   RESULT name=value   printed by the script
#   EXIT status         of the script; / is read-only by then and everything is written
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
echo "ROOT mount=$(grep ' / ' /proc/mounts)"
echo "ROOT cmdline=$(cat /proc/cmdline)"
echo "ROOT device_size=$(blockdev --getsize64 /dev/vda)"
echo "ROOT marker=$(cat /etc/sealfs-marker)"
echo "ROOT kernel=$(uname -r)"
cd /root
sh -eu -o pipefail /run/script.sh
status=$?
cd /
sync
mount -o remount,ro / || status="$status; and / could not be made read-only"
echo "EXIT $status"
# A change of the terminal's settings waits until all output is out; poweroff does not.
stty -echo </dev/console
poweroff -f
