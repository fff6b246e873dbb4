# Make a file and hand it to the first who asks; wait for what that guest says.
# Prints RESULT digest=SHA-256 of the file, RESULT answer=what the other guest says it got.
: "${ADDRESS:=10.5.0.1}" "${MTU:=1422}" "${SIZE_KIB:=4096}"
ip link set eth0 mtu "$MTU" up
ip address add "$ADDRESS/24" dev eth0
dd if=/dev/urandom of=/root/file bs=1024 count="$SIZE_KIB" 2>/dev/null
echo "RESULT digest=$(sha256sum </root/file | cut -d ' ' -f 1)"
nc -l -p 9000 </root/file
echo "RESULT answer=$(nc -l -p 9001)"
