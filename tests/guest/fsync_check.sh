# Check that every record fsync_loop.sh acknowledged is there; ACKNOWLEDGED is the last of them.
# Later ones may be there, whole or in part: the guest runs a little ahead of its console. Fails
# with a line "LOST ..." otherwise. Prints RESULT log=RECORDS, the whole records found.
: "${SLOTS:=64}" "${DIRECTORY:=/root/acknowledged}"
cd "$DIRECTORY"
# busybox's awk ends a line at a zero byte, which is what lost blocks are full of: show them.
dd if=log bs=4096 count="$ACKNOWLEDGED" 2>/dev/null | tr '\000' '?' >/run/log
tr '\000' '?' <ring >/run/ring
awk -v last="$ACKNOWLEDGED" '
    $0 != sprintf("%-4095d", NR) { print "LOST log record " NR; bad = 1; exit }
    END { if (!bad && NR != last) { print "LOST log after " NR; bad = 1 } exit bad }' /run/log
awk -v last="$ACKNOWLEDGED" -v slots="$SLOTS" '
    {
        slot = NR - 1
        # The newest record of this slot up to the last acknowledged; 0 before its first.
        oldest = last - (last - slot + slots) % slots
        if (oldest < 0) oldest = 0
        number = $1 + 0
        if ($0 != sprintf("%-4095d", number) || number < oldest ||
            (number > 0 && number % slots != slot)) {
            print "LOST ring slot " slot ": found " substr($0, 1, 16) ", expected " oldest
            bad = 1
            exit
        }
    }
    END { if (!bad && NR != slots) { print "LOST ring after " NR; bad = 1 } exit bad }' /run/ring
echo "RESULT log=$(($(stat -c %s log) / 4096))"
