#!/bin/bash
# inside.sh - the parts of the lab that run inside a node's namespaces. Started by nodes.sh, not by hand.
#   enter NODE       stage 1, PID 1 of the node, still with the machine's /proc and /sys: join the node's cgroups
#   settle NODE      stage 2, in the cgroup namespace: own mounts, and the root file system $ROOT if the node has one; then wait for ever
#   daemon CMD...    join the node's cgroups from outside, raise limits, become the daemon
set -u

enter() {
  local n=$1 h d c hostpid
  mount --make-rprivate /
  read -r hostpid _ </proc/self/stat # our pid as the machine sees it
  for h in /sys/fs/cgroup/ /sys/fs/cgroup/*/; do
    [ -e "$h/cgroup.procs" ] && [ "$(stat -f -c %T "$h")" != tmpfs ] || continue
    case $h in /sys/fs/cgroup/) ;; *) [ -e /sys/fs/cgroup/cgroup.controllers ] && continue;; esac
    mkdir -p "$h/$CG/$n"
    if [ -e "$h/cpuset.cpus" ] && [ -e "$h/tasks" ]; then
      for d in "$h/$CG" "$h/$CG/$n"; do cat "$h/cpuset.cpus" >"$d/cpuset.cpus"; cat "$h/cpuset.mems" >"$d/cpuset.mems"; done
    elif [ -e "$h/cgroup.subtree_control" ]; then # a machine with cgroup 2 only: hand the controllers down
      for d in "$h" "$h/$CG"; do for c in $(cat "$d/cgroup.controllers"); do echo "+$c" >"$d/cgroup.subtree_control"; done; done 2>/dev/null
    fi
    echo 0 >"$h/$CG/$n/cgroup.procs" || exit 1
  done
  echo "$hostpid" >"$LAB_DIR/$n.holder.tmp"
  exec unshare --cgroup bash "$0" settle "$n"
}
own_root() { # NODE: a root of its own over the one that all share; what is written to it stays in memory
  local d=$LAB_DIR/$1.root
  mkdir -p "$d"; mount -t tmpfs -o mode=755 tmpfs "$d"; mkdir "$d/upper" "$d/work" "$d/root"
  mount -t overlay -o "lowerdir=$ROOT,upperdir=$d/upper,workdir=$d/work" overlay "$d/root" || exit 1
  R=$d/root
  mkdir -p "$R$LAB_DIR"; mount --bind "$LAB_DIR" "$R$LAB_DIR"; mount --rbind /dev "$R/dev"; mount -t tmpfs -o mode=755 tmpfs "$R/run"
}
settle() {
  local n=$1 h f hier only_v2=0 R=
  [ -e /sys/fs/cgroup/cgroup.controllers ] && only_v2=1
  hier=$(cd /sys/fs/cgroup && ls -d */ | tr -d /)
  ip link set lo up; hostname "$n"
  [ -z "${ROOT:-}" ] || own_root "$n"
  mount -t proc proc "$R/proc"; mount -t sysfs sysfs "$R/sys"
  mount -t securityfs securityfs "$R/sys/kernel/security" 2>/dev/null
  if [ $only_v2 = 1 ]; then mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
  else
    mount -t tmpfs -o mode=755 tmpfs "$R/sys/fs/cgroup"
    for h in $hier; do
      mkdir -p "$R/sys/fs/cgroup/$h"
      case $h in
        unified) mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup/unified";;
        systemd) mount -t cgroup -o none,name=systemd cgroup "$R/sys/fs/cgroup/systemd";;
        *) mount -t cgroup -o "$h" cgroup "$R/sys/fs/cgroup/$h";;
      esac
    done
  fi
  f=/var/lib/incus; [ "$KIND" = lxd ] && f=/var/lib/lxd # every server sees its data at the usual place
  mkdir -p "$R$f" "$LAB_DIR/$n"; mount --bind "$LAB_DIR/$n" "$R$f"
  # one id range for root: the packages incus and lxd each append a line, and two lines overlap, which makes
  # every unprivileged start fail
  echo "root:1000000:1000000000" >"$LAB_DIR/$n.subid"
  if [ "$LAB_VMS" = 1 ]; then # LXD's QEMU opens it when it is nobody already
    mknod -m 666 "$LAB_DIR/$n.tun" c 10 200; mount --bind "$LAB_DIR/$n.tun" /dev/net/tun
  fi
  for f in subuid subgid; do [ -e "$R/etc/$f" ] || touch "$R/etc/$f"; mount --bind "$LAB_DIR/$n.subid" "$R/etc/$f"; done
  if [ -n "$R" ]; then cd "$R" && pivot_root . . && umount -l . && cd / || exit 1; fi
  mv "$LAB_DIR/$n.holder.tmp" "$LAB_DIR/$n.holder"
  while :; do sleep 3600 & wait $!; done # a shell reaps orphans
}
daemon() {
  local p t c
  for p in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs; do [ -e "$p" ] && echo 0 >"$p"; done 2>/dev/null
  if [ -e /sys/fs/cgroup/cgroup.subtree_control ]; then # cgroup 2 only: the node's root must hold no process
    mkdir -p /sys/fs/cgroup/init; for t in $(cat /sys/fs/cgroup/cgroup.procs); do echo "$t" >/sys/fs/cgroup/init/cgroup.procs; done 2>/dev/null
    for c in $(cat /sys/fs/cgroup/cgroup.controllers); do echo "+$c" >/sys/fs/cgroup/cgroup.subtree_control; done 2>/dev/null
  fi
  ulimit -n 1048576 2>/dev/null || ulimit -n "$(ulimit -Hn)"
  exec "$@"
}
main() { case $1 in enter) enter "$2";; settle) settle "$2";; daemon) shift; daemon "$@";; esac; }
main "$@"
