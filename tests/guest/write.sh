# Write files of many sizes and leave their hashes beside them, all of it durable.
# Prints RESULT files=COUNT, bytes=SUM and manifest=HASH, the hash of the list of hashes.
: "${DIRECTORY:=/root/data}" "${LARGE_MIB:=40}"
mkdir -p "$DIRECTORY"
cd "$DIRECTORY"

# One large file, odd sizes around the block and page boundaries, many small ones.
dd if=/dev/urandom of=large bs=1M count="$LARGE_MIB" conv=fsync 2>/dev/null
for size in 1 511 512 513 4095 4096 4097 65535 65537 1048575 1048577; do
    head -c "$size" /dev/urandom >"size-$size"
done
mkdir -p many
for index in $(seq 64); do
    echo "file $index, a line of text that is on the disk in clear" >"many/$index"
done

# A hole, and an overwrite in the middle of a written file.
truncate -s 8M sparse
head -c 5000 /dev/urandom | dd of=sparse bs=1000 seek=4001 conv=notrunc,fsync 2>/dev/null
head -c 70000 /dev/urandom | dd of=large bs=1000 seek=1234 conv=notrunc,fsync 2>/dev/null

find . -type f ! -name manifest | sort | xargs sha256sum >manifest
sync manifest
sync
echo "RESULT files=$(wc -l <manifest)"
echo "RESULT bytes=$(find . -type f ! -name manifest | xargs stat -c %s | awk '{ n += $1 } END { print n }')"
echo "RESULT manifest=$(sha256sum <manifest | cut -d ' ' -f 1)"
