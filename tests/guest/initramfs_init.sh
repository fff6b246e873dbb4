#!/bin/sh
# The initramfs's only work: load the disk's drivers, hand over to the system on the disk.
# Nothing of it is left afterwards but the test's script, on a tmpfs at /run.
set -e
fail() { echo "FAIL initramfs: $*"; /bin/busybox poweroff -f; }
cd /
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do
    insmod "$module" || fail "cannot load $module"
done
if grep -q 'sealfs\.probe' /proc/cmdline; then
    echo "RESULT probe=alive"
    poweroff -f
fi
mount -t ext4 -o rw /dev/vda /root || fail "cannot mount /dev/vda"
mount -t tmpfs tmpfs /root/run
cp /script.sh /root/run/script.sh
mount -o move /dev /root/dev
mount -o move /sys /root/sys
mount -o move /proc /root/proc
exec switch_root /root /sbin/init || fail "cannot start /sbin/init of the disk"
