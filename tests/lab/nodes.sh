# nodes.sh - nodes (sets of namespaces) and the daemons in them. Read by lab.sh; what runs inside a node is in inside.sh.

mac() { printf '02:be:00:%02x:01:%02x' "$LAB_ID" "$(number "$1")"; }
holder() { cat "$LAB_DIR/$1.holder" 2>/dev/null; }
get() { curl -s -m 5 --unix-socket "$LAB_DIR/$1/unix.socket" "http://node$2"; } # NODE PATH
answers() { [ -S "$LAB_DIR/$1/unix.socket" ] && get "$1" /1.0 >/dev/null; }
version() { get "$1" /1.0 | grep -o '"server_version":"[^"]*"' | cut -d'"' -f4; }

in_node() { # NODE CMD...; every node has its clients' folder: a client that finds an empty file, which another one just makes, fails
  local n=$1 h; shift; h=$(holder "$n"); [ -n "$h" ] || die "node $n is not up"
  nsenter -t "$h" -m -n -u -i -p -C -- env -i HOME=/root TERM=dumb LANG=C.UTF-8 LAB_DIR="$LAB_DIR" \
    PATH="$(vm_path "$n")$(criu_path "$n")$(dirname "${INCUSD:-/usr/bin/incusd}"):/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin" \
    INCUS_DIR=/var/lib/incus LXD_DIR=/var/lib/lxd INCUS_CONF="$LAB_DIR/cli/$n" LXD_CONF="$LAB_DIR/cli/$n" $(shifted "$n") "$@"
}
node_up() {
  local n=$1 i ns=$PFX-$1
  [ -e "/run/netns/$ns" ] || ip netns add "$ns" || return 1
  cable "$PFX-$n" "$PFX" "$ns" eth0 address "$(mac "$n")" || return 1
  ip -n "$ns" addr add "$(addr "$n")/24" dev eth0; ip -n "$ns" link set eth0 up
  cable "${PFX}l-$n" "$PFX-lan" "$ns" eth1 || return 1 # the containers' common network, bridge lan0 in every node
  ip -n "$ns" link add lan0 type bridge 2>/dev/null; ip -n "$ns" link set eth1 master lan0 up; ip -n "$ns" link set lan0 up
  rm -f "$LAB_DIR/$n.holder" "$LAB_DIR/$n.parent"
  LAB_DIR=$LAB_DIR CG=$CG KIND=$(kind "$n") ROOT=$(root_of "$n") LAB_VMS=$LAB_VMS setsid nsenter --net="/run/netns/$ns" \
    unshare --mount --uts --ipc --pid --fork bash "$LAB_DIR/inside.sh" enter "$n" </dev/null >"$LAB_DIR/$n.node.log" 2>&1 &
  for i in $(seq 1500); do [ -s "$LAB_DIR/$n.holder" ] && return 0; sleep 0.02; done
  log "node $n did not come up:"; cat "$LAB_DIR/$n.node.log" >&2; return 1
}
cable() { # OUTER BRIDGE NETNS INNER [address MAC]: a rebooted node gets new cables
  local outer=$1 br=$2 ns=$3 inner=$4; shift 4
  ip link del "$outer" 2>/dev/null
  ip link add "$outer" type veth peer name "$inner" "$@" netns "$ns" && ip link set "$outer" master "$br" up
}
node_end() { # all that lives in the node's network; the containers have their own but die with PID 1
  rm -f "$LAB_DIR/$1.runs"
  local p i; for p in $(ip netns pids "$PFX-$1" 2>/dev/null); do kill -9 "$p" 2>/dev/null; done
  for i in $(seq 250); do [ -n "$(ip netns pids "$PFX-$1" 2>/dev/null)" ] || break; sleep 0.02; done
}
host_kill() { # the cables first: a machine that loses power sends neither FIN nor RST
  ip link del "$PFX-$1" 2>/dev/null; ip link del "${PFX}l-$1" 2>/dev/null
  node_end "$1"; rm -f "$LAB_DIR/$1.holder" "$LAB_DIR/$1.parent"; ip netns del "$PFX-$1" 2>/dev/null; true
}
daemon_start() { # start a node's daemon and wait until it answers
  local n=$1 i status words debug="" bin=$INCUSD
  [ "$LAB_DEBUG" = 1 ] && debug=--debug
  [ -n "$(root_of "$n")" ] && bin=/usr/libexec/incus/incusd
  [ "$(kind "$n")" = lxd ] && bin=$LXD
  mkdir -p "$LAB_DIR/$n"
  while :; do
    in_node "$n" setsid bash "$LAB_DIR/inside.sh" daemon $(vm_shim "$n") "$bin" $debug --logfile "$LAB_DIR/$n.log"
    status=$? # one that ran and was not stopped is started again, as by systemd on a real host (Restart=on-failure in both products' units)
    [ -e "$LAB_DIR/$n.runs" ] || break
    words=$(grep -E -m 1 -A 8 '^(panic|fatal error|SIG)' "$LAB_DIR/$n.out" | tr -s '\n\t' ' ' | cut -c1-600)
    echo "$(date -u +%FT%TZ) the daemon of $n ended by itself ($status): $words" >>"$LAB_DIR/ends"
    cp "$LAB_DIR/$n.out" "$LAB_DIR/$n.ended.out"; : >"$LAB_DIR/$n.out"
    sleep 0.1
  done </dev/null >>"$LAB_DIR/$n.out" 2>&1 &
  echo $! >"$LAB_DIR/$n.parent"
  for i in $(seq 2400); do
    answers "$n" && { : >"$LAB_DIR/$n.runs"; return 0; }
    kill -0 "$(cat "$LAB_DIR/$n.parent")" 2>/dev/null || { tail -n 5 "$LAB_DIR/$n.out" >&2; log "the daemon of $n ended"; return 1; }
    sleep 0.05
  done
  log "the daemon of $n does not answer"; return 1
}
daemon_pid() { # as the machine counts it
  local p c; p=$(cat "$LAB_DIR/$1.parent" 2>/dev/null) || return 1
  while [ -e "/proc/$p" ]; do
    case $(cat "/proc/$p/comm") in incusd|lxd) echo "$p"; return 0;; esac
    c=$(pgrep -P "$p" | head -n 1); [ -n "$c" ] || return 1; p=$c
  done
  return 1
}
daemon_kill() { # NODE [SIGNAL]; waits for the end where the signal ends it
  local p i sig=${2:-KILL}; p=$(daemon_pid "$1") || die "the daemon of $1 does not run"
  case $sig in STOP|CONT|HUP) kill "-$sig" "$p"; return;; esac
  rm -f "$LAB_DIR/$1.runs"; kill "-$sig" "$p"
  for i in $(seq 500); do [ -e "/proc/$p" ] || return 0; sleep 0.02; done
  die "the daemon of $1 ($p) did not end on $sig"
}
throttle() { # NODE RATE|off
  if [ "${2:-off}" = off ]; then ip netns exec "$PFX-$1" tc qdisc del dev eth0 root 2>/dev/null; true
  else ip netns exec "$PFX-$1" tc qdisc replace dev eth0 root tbf rate "$2" burst 256kb latency 400ms; fi
}
