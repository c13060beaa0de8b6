#!/bin/bash
# Boot a REAL systemd as PID 1 in fresh namespaces over a throw-away overlay of this machine's root.
# usage: boot.sh DIR [PATH...]   -> DIR/init.pid ; enter with: nsenter -t $(cat DIR/init.pid) -a -- systemctl ...
# Where standard input is a pipe, the sandbox ends when the other end closes: a test run that is killed leaves none behind.
set -eu
here=$(dirname "$(realpath "$0")"); . "$here/cgroup2.sh"
D=$(realpath -m "$1"); mkdir -p "$D"; shift
CG="$(cgroup2_mount)/sdtest.$$"
mkdir "$CG"; echo "$CG" > "$D/cgroup"
( echo $BASHPID > "$CG/cgroup.procs"
  exec setsid unshare --mount --pid --uts --ipc --net --cgroup --fork --kill-child \
     bash "$here/inner.sh" "$D" "$@" ) >"$D/console.log" 2>&1 </dev/null &
U=$!
echo "$U" > "$D/unshare.pid"
[ -p /dev/stdin ] && { setsid bash -c 'cat; "$0" "$1"' "$here/stop.sh" "$D" <&0 >/dev/null 2>&1 & }
P=
for i in $(seq 600); do
  P=$(awk '{print $1}' /proc/$U/task/$U/children 2>/dev/null) || true
  [ -n "${P:-}" ] && [ "$(cat /proc/$P/comm 2>/dev/null)" = systemd ] && [ -S /proc/$P/root/run/systemd/private ] && { echo "$P" > "$D/init.pid"; exit 0; }
  kill -0 $U 2>/dev/null || { echo "died:"; cat "$D/console.log"; exit 1; }
  sleep 0.05
done
echo "not up after 30 s:"; cat "$D/console.log"; exit 1
