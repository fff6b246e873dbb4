# Write durable records for ever, or COUNT of them; the console is the record of promises.
# Record N is appended to `log`, then written over slot N % SLOTS of `ring`, each with an fsync;
# only then does the console get "ACK N". A record is a block of 4096 bytes: its number, padded,
# and a newline.
: "${COUNT:=1000000000}" "${SLOTS:=64}" "${DIRECTORY:=/root/acknowledged}"
mkdir -p "$DIRECTORY"
cd "$DIRECTORY"
number=0
# All slots exist before the first promise: from here on the ring is only ever overwritten.
while [ "$number" -lt "$SLOTS" ]; do
    printf '%-4095d\n' 0
    number=$((number + 1))
done >ring
: >log
sync
number=1
while [ "$number" -le "$COUNT" ]; do
    printf '%-4095d\n' "$number" | dd of=log bs=4096 oflag=append conv=notrunc,fsync 2>/dev/null
    printf '%-4095d\n' "$number" |
        dd of=ring bs=4096 seek=$((number % SLOTS)) conv=notrunc,fsync 2>/dev/null
    echo "ACK $number"
    number=$((number + 1))
done
