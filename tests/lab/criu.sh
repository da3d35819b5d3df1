# criu.sh - CRIU for the servers that run on this machine's own system. Read by lab.sh.
# Debian 12 has none that works with new kernels. That of the root for Incus 7 does, with the libraries from there.

make_criu() { # NODE: a command in a folder of its own, which comes first in the path of its daemon
  [ -n "$(criu_path "$1")" ] || return 0
  local dir=$LAB_DIR/$1.criu; mkdir -p "$dir"
  # the older way to hold connections back while memory is read needs iptables
  command -v iptables-restore >/dev/null || echo 'network-lock nftables' >"$dir/conf"
  cat >"$dir/criu" <<S
#!/bin/sh
[ ! -e "$dir/conf" ] || export CRIU_CONFIG_FILE="$dir/conf"
exec "$INCUS7_ROOT/lib64/ld-linux-x86-64.so.2" --library-path "$INCUS7_ROOT/usr/lib/$(uname -m)-linux-gnu" --argv0 criu "$INCUS7_ROOT/usr/sbin/criu" "\$@"
S
  chmod 755 "$dir/criu"
}
criu_path() { # NODE: what comes first in the path of its daemon; Incus 7 has its own
  if [ "$LAB_CRIU" = 1 ] && [ "$(kind "$1")" = incus ] && [ -z "$(root_of "$1")" ]; then echo "$LAB_DIR/$1.criu:"; fi
}
shifted() { # NODE: for its environment
  case " $LAB_SHIFTED " in *" $1 "*) echo INCUS_IDMAPPED_MOUNTS_DISABLE=1;; esac
}
