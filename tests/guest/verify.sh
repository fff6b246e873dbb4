# Compare what write.sh left with its hashes; fails at any difference.
# Prints RESULT files=COUNT and manifest=HASH as write.sh did: the test compares the two.
: "${DIRECTORY:=/root/data}"
cd "$DIRECTORY"
sha256sum -c manifest >/run/verified || { grep -v ': OK$' /run/verified; exit 1; }
echo "RESULT files=$(wc -l </run/verified)"
echo "RESULT manifest=$(sha256sum <manifest | cut -d ' ' -f 1)"
