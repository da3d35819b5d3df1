#!/bin/bash
# lab.sh - real Incus and LXD servers side by side on one machine, without systemd, containers or virtual machines.
#
#   lab.sh deps                  install the Debian packages the lab needs (apt)
#   lab.sh mkroot                make the root file system of the Incus 7 servers, once for all labs of this user (500 MB in the cache folder)
#   lab.sh deps-vms              the same, and what virtual machines need beside them (QEMU, a guest: some 200 MB)
#   lab.sh check                 say in one line what is missing to run a lab here; exit 1 if something is
#   lab.sh check-incus7          the same for the Incus 7 servers; without their root a lab has none of them
#   lab.sh up                    start all servers; a dead lab of the same id is cleared away first; writes $LAB_DIR/lab.json
#   lab.sh down                  end everything of this lab and delete $LAB_DIR; fine to repeat
#   lab.sh status                what runs: version, address, pid, memory, instances
#   lab.sh incus|lxc ARGS...     the client on this machine, with every server as a remote: lab.sh incus list i1:
#   lab.sh instance SERVER NAME [POOL [MB]]   start a counting container, with MB megabytes of random data in /root/data
#   lab.sh exec NODE CMD...      run a command in a server's namespaces
#   lab.sh daemon-pid NODE
#   lab.sh daemon-kill NODE [SIGNAL]   signal the daemon (KILL); its containers live on
#   lab.sh daemon-start NODE           start it again
#   lab.sh host-kill NODE              power loss: the whole node with daemon and containers is gone at once
#   lab.sh host-start NODE             boot it again with the same data
#   lab.sh net-down|net-up NODE        unplug, plug its network cable
#   lab.sh throttle NODE RATE|off      limit what leaves the node, e.g. 20mbit
#
# A node is a set of namespaces (mount, net, uts, ipc, pid, cgroup); its PID 1 is a shell loop, so killing that ends the node.
# Outside $LAB_DIR a lab owns only the interfaces and network namespaces that begin with bl$LAB_ID and the cgroups berth-lab-$LAB_ID.
#
# Settings (environment):
#   LAB_ID=64       one number per lab (1-254): the networks 10.213.ID.0/24 (servers) and 10.215.ID.0/24 (containers), all names
#   LAB_DIR         data folder, default /var/lib/berth-lab (with -ID for ids other than 64)
#   LAB_INCUS="i1 i2"  LAB_LXD="l1 l2"  LAB_CLUSTER="m1 m2 m3"  LAB_LXD_CLUSTER=""  LAB_INCUS7="t1 t2"   which servers; "" = none
#   LAB_VMS=0       1: the servers can run virtual machines, too (emulated, without KVM)
#   LAB_CRIU=0      1: every Incus has CRIU, the one that came with the root of Incus 7    LAB_SHIFTED=""   servers that own containers' files without idmapped mounts
#   LAB_POOL_SIZE=4GiB of the btrfs pool "btr" of each server that is not in a cluster (sparse)    LAB_DEBUG=1 daemons log every request
set -u
: "${LAB_ID:=64}"
if [ "$LAB_ID" = 64 ]; then : "${LAB_DIR:=/var/lib/berth-lab}"; else : "${LAB_DIR:=/var/lib/berth-lab-$LAB_ID}"; fi
: "${LAB_INCUS=i1 i2}" "${LAB_LXD=l1 l2}" "${LAB_CLUSTER=m1 m2 m3}" "${LAB_LXD_CLUSTER=}" "${LAB_INCUS7=t1 t2}" "${LAB_POOL_SIZE:=4GiB}" "${LAB_DEBUG:=0}" "${LAB_VMS:=0}" "${LAB_CRIU:=0}" "${LAB_SHIFTED=}"
HERE=$(dirname "$(readlink -f "$0")")
case $LAB_DIR in /*/*) ;; *) echo "lab: LAB_DIR must be a folder of its own, not '$LAB_DIR'" >&2; exit 2;; esac
PATH=$PATH:/usr/sbin:/sbin

log() { printf 'lab: %6.2fs %s\n' "$(awk -v a="$T0" -v b="$(date +%s.%N)" 'BEGIN{print b-a}')" "$*" >&2; }
T0=$(date +%s.%N)
die() { log "ERROR: $*"; exit 1; }

#---------------------------------------------------------------- names
configure() {
  PFX=bl$LAB_ID NET=10.213.$LAB_ID LAN=10.215.$LAB_ID CG=berth-lab-$LAB_ID
  INCUSD=$(PATH=$PATH:/usr/libexec/incus:/opt/incus/bin command -v incusd); LXD=$(command -v lxd)
}
kind() { case " $LAB_LXD $LAB_LXD_CLUSTER " in *" $1 "*) echo lxd;; *) echo incus;; esac; }
all_nodes() { echo $LAB_INCUS $LAB_LXD $LAB_CLUSTER $LAB_LXD_CLUSTER $LAB_INCUS7; }
number() { local i=11 n; for n in $(all_nodes); do [ "$n" = "$1" ] && { echo $i; return; }; i=$((i + 1)); done; die "there is no server $1"; }
addr() { echo "$NET.$(number "$1")"; }
known() { case " $(all_nodes) " in *" $1 "*) ;; *) die "there is no server '$1', only: $(all_nodes)";; esac; }
cluster_of() { case " $LAB_CLUSTER " in *" $1 "*) echo incus-cluster; return;; esac; case " $LAB_LXD_CLUSTER " in *" $1 "*) echo lxd-cluster;; esac; }

. "$HERE/deps.sh"
. "$HERE/root.sh"
. "$HERE/nodes.sh"
. "$HERE/servers.sh"
. "$HERE/vms.sh"
. "$HERE/criu.sh"

#---------------------------------------------------------------- the whole lab
healthy() {
  local n; [ -e "$LAB_DIR/lab.json" ] || return 1
  for n in $(all_nodes); do answers "$n" || return 1; done
}
bridge() { # NAME ADDRESS: a fixed hardware address, or the peers keep stale ones when a port leaves
  ip link add "$1" address "02:be:00:$(printf %02x "$LAB_ID"):00:${3}" type bridge && ip addr add "$2/24" dev "$1" && ip link set "$1" up || die "cannot make the bridge $1"
}
bring_up() {
  local n pids="" p bad=0
  down quiet
  mkdir -p "$LAB_DIR"; chmod 711 "$LAB_DIR"; cp "$HERE/inside.sh" "$LAB_DIR/" # a server with a root of its own sees no other folder
  declare -p LAB_INCUS LAB_LXD LAB_CLUSTER LAB_LXD_CLUSTER LAB_INCUS7 LAB_POOL_SIZE LAB_DEBUG LAB_VMS LAB_CRIU LAB_SHIFTED >"$LAB_DIR/lab.conf"
  bridge "$PFX" "$NET.1" 01; bridge "$PFX-lan" "$LAN.1" 02
  make_image "$LAB_DIR/busybox.tar.gz"; make_client_keys
  for n in $(all_nodes); do make_criu "$n"; done
  log "image and keys made"
  for n in $LAB_INCUS $LAB_LXD $LAB_INCUS7; do one_up "$n" standalone_up "$n" & pids="$pids $!"; done
  if [ -n "$LAB_CLUSTER" ]; then one_up "cluster $LAB_CLUSTER" cluster_up $LAB_CLUSTER & pids="$pids $!"; fi
  if [ -n "$LAB_LXD_CLUSTER" ]; then one_up "cluster $LAB_LXD_CLUSTER" cluster_up $LAB_LXD_CLUSTER & pids="$pids $!"; fi
  for p in $pids; do wait "$p" || bad=1; done
  return $bad
}
one_up() { # WHAT CMD...: says how it went, and if not well, why
  local what=$1 said; shift; said=$LAB_DIR/${what// /-}.up
  # exec, so that no daemon keeps a copy of what this script prints to
  if (exec >"$said" 2>&1; "$@"); then log "$what is up"; else log "$what is not up: $(grep -v '^$' "$said" | tail -n 5)"; return 1; fi
}
up() {
  local no7
  no7=$(what_is_missing_for_incus7); [ -z "$LAB_INCUS7" ] || [ -z "$no7" ] || { log "without $LAB_INCUS7: $no7"; LAB_INCUS7=; }
  if healthy; then log "is up already: $LAB_DIR"; return; fi
  missing=$(what_is_missing); [ -z "$missing" ] || die "$missing"
  # on a busy machine a fresh daemon may take too long for its first configuration
  bring_up || { log "once more"; bring_up; } || die "not every server came up"
  client_config; describe >"$LAB_DIR/lab.json.new" && mv "$LAB_DIR/lab.json.new" "$LAB_DIR/lab.json"
  log "all is up: $LAB_DIR/lab.json"
}
down() { # goes by what the machine has, not by what a former run wrote down
  local n i h found=0
  for n in $(ip netns list 2>/dev/null | awk -v p="^$PFX-" '$1 ~ p {print $1}'); do
    found=1; node_end "${n#"$PFX-"}"; ip netns del "$n"
  done
  for n in $(ip -o link show 2>/dev/null | awk -F': ' -v p="^$PFX(\$|-|l-)" '{sub(/@.*/, "", $2)} $2 ~ p {print $2}'); do found=1; ip link del "$n" 2>/dev/null; done
  for h in /sys/fs/cgroup/ /sys/fs/cgroup/*/; do
    for i in $(seq 40); do
      [ -d "$h$CG" ] || break
      find "$h$CG" -depth -type d -exec rmdir {} \; 2>/dev/null; [ -d "$h$CG" ] && sleep 0.05
    done
  done
  [ ! -e "$LAB_DIR" ] || { found=1; chattr -R -i "$LAB_DIR" 2>/dev/null; rm -rf --one-file-system "$LAB_DIR"; }
  [ "${1:-}" = quiet ] && [ $found = 0 ] || log "down"
}
status() {
  local n p
  printf '%-5s %-6s %-8s %-27s %-8s %-8s %s\n' NAME KIND VERSION URL PID RSS_KB INSTANCES
  for n in $(all_nodes); do
    p=$(daemon_pid "$n") || p=-
    printf '%-5s %-6s %-8s %-27s %-8s %-8s %s\n' "$n" "$(kind "$n")" "$(version "$n")" "https://$(addr "$n"):8443" "$p" \
      "$(awk '/VmRSS/{print $2}' "/proc/$p/status" 2>/dev/null)" "$(get "$n" /1.0/instances | grep -o '/1.0/instances/[^"]*' | sed 's#.*/##' | tr '\n' ' ')"
  done
}

cmd=${1:-}; [ $# -gt 0 ] && shift
[ "$cmd" != up ] && [ -e "$LAB_DIR/lab.conf" ] && . "$LAB_DIR/lab.conf"
configure
case $cmd in exec|daemon-*|host-*|net-*|throttle) known "${1:-}";; esac
case $cmd in
  deps) deps;;
  mkroot) mkroot;;
  check-incus7) missing=$(what_is_missing_for_incus7); [ -z "$missing" ] || { echo "$missing"; exit 1; };;
  deps-vms) deps_vms;;
  check) missing=$(what_is_missing); [ -z "$missing" ] || { echo "$missing"; exit 1; };;
  up) up;;
  down) down;;
  status) status;;
  incus) INCUS_CONF=$LAB_DIR/cli/incus exec incus "$@";;
  lxc) LXD_CONF=$LAB_DIR/cli/lxc exec lxc "$@";;
  instance) instance "$@";;
  exec) in_node "$@";;
  daemon-pid) daemon_pid "$1";;
  daemon-kill) daemon_kill "$@";;
  daemon-start) daemon_start "$1";;
  host-kill) host_kill "$1";;
  host-start) node_up "$1" && daemon_start "$1";;
  net-down) ip link set "$PFX-$1" down;;
  net-up) ip link set "$PFX-$1" up;;
  throttle) throttle "$@";;
  *) sed -n '2,/^set -u/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2;;
esac
