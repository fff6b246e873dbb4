# Ask another guest for its file over the network until it comes, and tell it the digest.
# Prints RESULT digest=SHA-256 of what came, RESULT lost=pings of 20 that were not answered.
: "${ADDRESS:=10.5.0.2}" "${OTHER:=10.5.0.1}" "${MTU:=1422}"
ip link set eth0 mtu "$MTU" up
ip address add "$ADDRESS/24" dev eth0
# nc ends with its input, and so must have one that does not end.
mkfifo /run/endless
exec 3<>/run/endless
tries=0
until nc "$OTHER" 9000 <&3 >/root/got; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || exit 1
    sleep 0.3
done
digest=$(sha256sum </root/got | cut -d ' ' -f 1)
echo "RESULT digest=$digest"
received=$(ping -c 20 -i 0.05 -s $((MTU - 28)) "$OTHER" |
    sed -n 's/.* \([0-9]*\) packets received.*/\1/p')
echo "RESULT lost=$((20 - received))"
until echo "$digest" | nc "$OTHER" 9001; do sleep 0.1; done
