# root.sh - the root file system of Incus 7: Debian trixie with incus from its backports and CRIU, made once into the user's cache folder.
# Read by lab.sh. Servers start in it as in a machine of their own; what they write there is gone with them.

ROOT_SUITE=trixie
ROOT_RECIPE=2 # raise it whenever the packages change: the folder's name tells one root from another
ROOT_SERVER="incus-base incus-client" # from backports, the rest from the suite itself
ROOT_TOOLS="btrfs-progs dnsmasq-base nftables iptables attr acl rsync squashfs-tools uidmap iproute2 procps e2fsprogs"
ROOT_CRIU=forky # from 4.2 on it moves open TCP connections on kernels from 6.16 on; the suite's own is the second choice
ROOTS=${XDG_CACHE_HOME:-$HOME/.cache}/berth-lab
INCUS7_ROOT=$ROOTS/$ROOT_SUITE-$ROOT_RECIPE

root_of() { case " $LAB_INCUS7 " in *" $1 "*) echo "$INCUS7_ROOT";; esac; } # NODE: its root, nothing if it is this machine's own
what_is_missing_for_incus7() { # one sentence, or nothing
  [ -x "$INCUS7_ROOT/usr/libexec/incus/incusd" ] || echo "no root for Incus 7 (tests/lab/lab.sh mkroot makes one on Debian)"
}
mkroot() {
  local lock
  [ -n "$(what_is_missing_for_incus7)" ] || return 0
  [ "$(id -u)" = 0 ] || die "root is needed to make a root for Incus 7"
  command -v debootstrap >/dev/null || die "not installed: debootstrap (tests/lab/lab.sh deps installs it on Debian)"
  mkdir -p "$ROOTS" && exec {lock}>"$ROOTS/lock" || die "cannot write to $ROOTS"
  flock "$lock" # two runs side by side make one
  [ -z "$(what_is_missing_for_incus7)" ] || make_root "$INCUS7_ROOT.new" || { log "no root for Incus 7 was made, see $INCUS7_ROOT.log"; tail -n 3 "$INCUS7_ROOT.log" >&2; exec {lock}>&-; return 1; }
  exec {lock}>&-
}
make_root() { # DIR
  local dir=$1 mirror; mirror=$(mirror); [ -n "$mirror" ] || die "apt names no mirror to take $ROOT_SUITE from"
  log "making the root for Incus 7: $INCUS7_ROOT"
  rm -rf --one-file-system "$dir"
  { debootstrap --variant=minbase "$ROOT_SUITE" "$dir" "$mirror" && fill_root "$dir" "$mirror"; } >"$INCUS7_ROOT.log" 2>&1 || return 1
  rm -rf "$dir"/var/cache/apt/*.bin "$dir"/var/cache/apt/archives/*.deb "$dir"/var/lib/apt/lists/*
  mv "$dir" "$INCUS7_ROOT" && rm -f "$INCUS7_ROOT.log"
  log "made: $(chroot "$INCUS7_ROOT" dpkg-query -W -f '${Package} ${Version}  ' incus-base criu)"
}
fill_root() { # DIR MIRROR, with the proxy of this machine's apt if it has one
  local dir=$1 suite
  for suite in "$ROOT_SUITE" "$ROOT_SUITE-backports"; do echo "deb $2 $suite main"; done >"$dir/etc/apt/sources.list"
  printf 'Package: *\nPin: release n=%s\nPin-Priority: 1\n' "$ROOT_CRIU" >"$dir/etc/apt/preferences.d/criu"
  apt-config dump | grep -E '^Acquire::https?::Proxy' >"$dir/etc/apt/apt.conf.d/90proxy"
  cp /etc/resolv.conf /etc/hosts "$dir/etc/"
  printf '#!/bin/sh\nexit 101\n' >"$dir/usr/sbin/policy-rc.d"; chmod 755 "$dir/usr/sbin/policy-rc.d"
  # shellcheck disable=SC2016
  unshare --mount bash -c 'mount -t proc proc "$1/proc"; export DEBIAN_FRONTEND=noninteractive
    apt() { chroot "$DIR" apt-get install -y -q --no-install-recommends "$@"; }; DIR=$1 LIST=$1/etc/apt/sources.list.d/criu.list
    chroot "$1" apt-get update -q && apt -t "$2" $3 && apt $4 || exit 1
    echo "deb [check-valid-until=no] $6 $5 main" >"$LIST"
    chroot "$1" apt-get update -q && apt "criu/$5" || { rm "$LIST"; apt criu; }' - "$dir" "$ROOT_SUITE-backports" "$ROOT_SERVER" "$ROOT_TOOLS" "$ROOT_CRIU" "$2"
}
