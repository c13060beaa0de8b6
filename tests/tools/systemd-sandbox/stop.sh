#!/bin/bash
# End a sandbox at once: its first process takes the whole PID namespace with it. usage: stop.sh DIR
D=$(realpath "$1"); CG=$(cat "$D/cgroup" 2>/dev/null) || exit 0
for pid in $(cat "$D/init.pid" "$D/unshare.pid" 2>/dev/null); do kill -9 "$pid" 2>/dev/null; done
rm -f "$D"/{init.pid,unshare.pid,cgroup}  # numbers are used again: nobody shall be killed by a second stop
for i in $(seq 100); do find "$CG" -depth -type d -exec rmdir {} + 2>/dev/null; [ -d "$CG" ] || exit 0; sleep 0.05; done
echo "left: $CG"; exit 1
