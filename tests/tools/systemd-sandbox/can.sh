#!/bin/bash
# Whether a systemd can be booted here. usage: can.sh DIR   -> silence and 0, or one sentence on what is missing and 1
set -u
here=$(dirname "$0"); . "$here/cgroup2.sh"
missing() { echo "$*"; exit 1; }
[ "$(id -u)" = 0 ] || missing "needs root"
[ -x /lib/systemd/systemd ] || missing "needs systemd (Debian package: systemd)"
for tool in unshare nsenter pivot_root awk setsid; do command -v $tool >/dev/null || missing "needs $tool (Debian package: util-linux)"; done
grep -qw overlay /proc/filesystems || modprobe -q overlay 2>/dev/null || missing "needs overlayfs"
tree=$(cgroup2_mount); [ -n "$tree" ] || missing "needs a cgroup v2 tree"
probe="$tree/sdprobe.$$"
mkdir "$probe" 2>/dev/null || missing "may not make a control group in $tree"
( echo $BASHPID >"$probe/cgroup.procs" ) 2>/dev/null; moved=$?
rmdir "$probe"; [ $moved = 0 ] || missing "may not move a process into a control group of $tree"
D=$(realpath -m "$1"); mkdir -p "$D"
said=$(unshare --mount --pid --uts --ipc --net --cgroup --fork bash -ec '
  mount --make-rprivate /; mount -t tmpfs tmpfs "$0"; mkdir "$0"/up "$0"/work "$0"/root
  mount -t overlay overlay -o lowerdir=/,upperdir="$0/up",workdir="$0/work" "$0/root"
  mount -t proc proc "$0/root/proc"; mount -t sysfs -o ro sysfs "$0/root/sys"; mount -t cgroup2 cgroup2 "$0/root/sys/fs/cgroup"' "$D" 2>&1) || missing "namespaces or mounts are not allowed: ${said%%$'\n'*}"
