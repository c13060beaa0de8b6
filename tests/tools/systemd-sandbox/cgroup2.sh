# Sourced: cgroup2_mount prints where the cgroup v2 tree is mounted (/sys/fs/cgroup, or /sys/fs/cgroup/unified beside v1 controllers).
cgroup2_mount() { awk '$3 == "cgroup2" { print $2; exit }' /proc/self/mounts; }
