#!/bin/bash
# The inside of boot.sh: build the root, then become its systemd. usage (by boot.sh only): inner.sh DIR [PATH...]
set -eu
D=$1; shift
mount --make-rprivate /
mkdir -p "$D/layers" "$D/shared"
mount -t tmpfs tmpfs "$D/layers"          # visible only inside this mount namespace
mkdir -p "$D"/layers/{up,work,root}
mount -t overlay overlay -o lowerdir=/,upperdir="$D/layers/up",workdir="$D/layers/work" "$D/layers/root"
R="$D/layers/root"
mkdir "$R/shared"; mount --bind "$D/shared" "$R/shared"   # one directory with one path outside: SQLite cannot go through /proc/PID/root
mount -t proc proc "$R/proc"
mount --bind "$R/proc/sys" "$R/proc/sys"; mount -o remount,bind,ro "$R/proc/sys"   # systemd must not write the machine's sysctls
[ -e "$R/proc/sysrq-trigger" ] && { mount --bind "$R/proc/sysrq-trigger" "$R/proc/sysrq-trigger"; mount -o remount,bind,ro "$R/proc/sysrq-trigger"; }
mount -t sysfs -o ro sysfs "$R/sys"
mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$R/run"
mount -t tmpfs tmpfs "$R/tmp"
mount -t tmpfs -o mode=755 tmpfs "$R/dev"
for n in null zero full random urandom tty fuse; do [ -e /dev/$n ] && { touch "$R/dev/$n"; mount --bind /dev/$n "$R/dev/$n"; }; done
mkdir -p "$R/dev/pts" "$R/dev/shm"; mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$R/dev/pts"; ln -s pts/ptmx "$R/dev/ptmx"
mount -t tmpfs tmpfs "$R/dev/shm"
ln -s /proc/self/fd "$R/dev/fd"; ln -s fd/0 "$R/dev/stdin"; ln -s fd/1 "$R/dev/stdout"; ln -s fd/2 "$R/dev/stderr"
S="$R/etc/systemd/system"; rm -rf "$S"; mkdir -p "$S" "$R/var/log/journal" "$R/oldroot"
for u in systemd-timesyncd.service systemd-remount-fs.service systemd-sysctl.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount dev-hugepages.mount sys-kernel-debug.mount sys-kernel-tracing.mount systemd-pstore.service systemd-random-seed.service systemd-firstboot.service console-getty.service systemd-update-utmp.service systemd-networkd.service systemd-resolved.service; do ln -s /dev/null "$S/$u"; done
: > "$R/etc/fstab"; echo sdtest > "$R/etc/hostname"; systemd-id128 new > "$R/etc/machine-id"
for p in "$@"; do [ -e "$R$p" ] || { mkdir -p "$R$p"; mount --bind "$p" "$R$p"; mount -o remount,bind,ro "$R$p"; }; done
ip link set lo up 2>/dev/null || true
cd "$R"; pivot_root . oldroot
exec chroot . /bin/bash -c 'umount -l /oldroot; mount --make-rshared /; exec env -i container=sdtest PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=linux /lib/systemd/systemd --system --unit=basic.target'
