# Write a large file, delete it and give its blocks back.
# With STAGE=write it is only written, so that the test can look at the disk in between;
# with STAGE=trim only deleted. Prints RESULT written=BYTES and trimmed=BYTES (what fstrim says:
# all free space of the file system, not only that file's).
: "${STAGE:=both}" "${SIZE_MIB:=128}"
file=/root/to-be-trimmed
if [ "$STAGE" != trim ]; then
    dd if=/dev/urandom of=$file bs=1M count="$SIZE_MIB" conv=fsync 2>/dev/null
    echo "RESULT written=$(stat -c %s $file)"
fi
if [ "$STAGE" != write ]; then
    rm $file
    sync
    echo "RESULT discard_max=$(cat /sys/block/vda/queue/discard_max_bytes)"
    trimmed=$(fstrim -v /)
    echo "RESULT trimmed=$(echo "$trimmed" | sed 's/.*: \([0-9]*\) .*/\1/')"
fi
