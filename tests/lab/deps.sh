# deps.sh - what the lab needs on this machine, and its installation on Debian. Read by lab.sh.

PACKAGES="incus-base incus-client lxd lxd-client btrfs-progs busybox-static dnsmasq-base nftables attr acl rsync squashfs-tools
  uidmap iproute2 util-linux procps curl openssl e2fsprogs debootstrap prometheus"

what_is_missing() { # one sentence, or nothing
  local p absent=""
  [ "$(id -u)" = 0 ] || { echo "root is needed to start Incus and LXD servers"; return; }
  [ -z "$LAB_INCUS$LAB_CLUSTER" ] || { [ -n "$INCUSD" ] && command -v incus >/dev/null; } || absent="$absent incus"
  [ -z "$LAB_LXD$LAB_LXD_CLUSTER" ] || { [ -n "$LXD" ] && command -v lxc >/dev/null; } || absent="$absent lxd"
  for p in mkfs.btrfs dnsmasq busybox nft rsync unsquashfs newuidmap setfacl ip nsenter pgrep curl openssl; do command -v $p >/dev/null || absent="$absent $p"; done
  [ -z "$absent" ] || { echo "not installed:$absent (tests/lab/lab.sh deps installs them on Debian)"; return; }
  unshare --mount --uts --ipc --pid --fork true 2>/dev/null || { echo "this machine does not allow new namespaces"; return; }
  [ "$LAB_CRIU" != 1 ] || what_is_missing_for_incus7
  [ "$LAB_VMS" != 1 ] || vms_missing
}
mirror() { # the Debian mirror this machine's apt is set to
  cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
    awk '/^URIs:/{print $2; exit} /^deb /{for(i=2;i<=NF;i++) if ($i ~ /^http/) {print $i; exit}}'
}
deps() {
  local f p absent="" codename
  for p in $PACKAGES; do dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || absent="$absent $p"; done
  if [ -n "$absent" ]; then
    [ "$(id -u)" = 0 ] || die "root is needed to install:$absent"
    [ -e /etc/debian_version ] || die "this machine is no Debian; install what corresponds to:$absent"
    export DEBIAN_FRONTEND=noninteractive; apt-get update -qq
    if ! apt-cache show incus-base >/dev/null 2>&1; then # Debian 12 has it in backports only
      codename=$(. /etc/os-release; echo "$VERSION_CODENAME"); f=$(mirror); [ -n "$f" ] || die "apt names no mirror to take $codename-backports from"
      printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' "$f" "$codename" \
        >/etc/apt/sources.list.d/berth-lab-backports.sources
      apt-get update -qq
    fi
    # the packages' own daemons must not start on this machine: the lab starts its own
    local made=0; [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; made=1; }
    apt-get install -y -qq --no-install-recommends $absent >&2; p=$?
    [ $made = 0 ] || rm -f /usr/sbin/policy-rc.d
    [ $p = 0 ] || die "apt-get could not install:$absent"
  fi
}
