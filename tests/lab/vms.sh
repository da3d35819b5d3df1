# vms.sh - virtual machines on any machine: what Incus and LXD need for them, emulated processors, a tiny guest. Read by lab.sh.
# A kernel without vhost_vsock and KVM is enough; facts: vms/vsock-shim.c. With LAB_VMS=1 every server of the lab can run them.

VMS=${BERTH_VMS_DIR:-/var/cache/berth-lab-vms} # made by `lab.sh deps-vms`; shared by all labs of the machine
VM_PACKAGES="ovmf cpio gcc libc6-dev binutils jq xz-utils"
QEMU_PACKAGES="qemu-system-x86 qemu-system-modules-spice qemu-utils" # from where incus comes from
GUEST_MODULES="virtio virtio_ring virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci failover net_failover virtio_net virtio_blk virtio_balloon evdev button"

vms_missing() { # one sentence, or nothing
  local f
  [ "$(uname -m)" = x86_64 ] || { echo "the lab's virtual machines are for x86_64"; return; }
  command -v qemu-system-x86_64 >/dev/null || { echo "not installed: QEMU (tests/lab/lab.sh deps-vms installs it on Debian)"; return; }
  for f in vsock-shim kernel initrd bin/modprobe ${LAB_LXD:+lxd-bin/qemu-system-x86_64}; do
    [ -e "$VMS/$f" ] || { echo "$VMS/$f does not exist (tests/lab/lab.sh deps-vms makes it)"; return; }
  done
  [ "$(cat "$VMS/modules/list" 2>/dev/null)" = "$GUEST_MODULES" ] || { echo "the guest in $VMS is an older one (tests/lab/lab.sh deps-vms makes it anew)"; return; }
  [ -e /dev/net/tun ] || { echo "this machine has no /dev/net/tun"; return; }
  [ -e /dev/vhost-vsock ] || mknod -m 600 /dev/vhost-vsock c 1 3 2>/dev/null || echo "/dev/vhost-vsock cannot be made"
}
deps_vms() {
  deps
  local absent="" p suite=()
  for p in $VM_PACKAGES $QEMU_PACKAGES; do dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || absent="$absent $p"; done
  if [ -n "$absent" ]; then
    [ "$(id -u)" = 0 ] || die "root is needed to install:$absent"
    p=$(. /etc/os-release; echo "$VERSION_CODENAME")-backports
    apt-cache policy incus-base | grep -q "$p" && suite=(-t "$p")
    export DEBIAN_FRONTEND=noninteractive; apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${suite[@]}" $QEMU_PACKAGES ovmf >&2 || die "apt-get could not install QEMU"
    apt-get install -y -qq --no-install-recommends $VM_PACKAGES >&2 || die "apt-get could not install: $VM_PACKAGES"
  fi
  mkdir -p "$VMS/bin" || die "cannot make $VMS"
  compiled vsock-shim -O2; compiled tick -O2 -static
  ln -sf /bin/true "$VMS/bin/modprobe" # "modprobe vhost_vsock" has to succeed, and that is all that is asked of it
  [ -e "$VMS/kernel" ] && [ "$(cat "$VMS/modules/list" 2>/dev/null)" = "$GUEST_MODULES" ] || guest_kernel
  [ "$VMS/initrd" -nt "$VMS/modules/list" ] && [ "$VMS/initrd" -nt "$HERE/vms/guest-init.sh" ] && [ "$VMS/initrd" -nt "$VMS/tick" ] || guest_initrd
  [ -e "$VMS/lxd-bin/root/usr/bin/qemu-system-x86_64" ] || qemu_for_lxd
  install -m 755 "$HERE/vms/qemu.sh" "$VMS/lxd-bin/qemu-system-x86_64"; ln -sf /bin/true "$VMS/lxd-bin/modprobe"
}
compiled() { # NAME FLAGS...
  local name=$1; shift
  [ "$VMS/$name" -nt "$HERE/vms/$name.c" ] || gcc "$@" -o "$VMS/$name" "$HERE/vms/$name.c" || die "cannot compile $name.c"
}
guest_kernel() { # the newest of the release for clouds: small, with EFI stub and serial console built in
  local d p; d=$(mktemp -d)
  p=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
  (cd "$d" && { apt-get download -q "$p-unsigned" || apt-get download -q "$p"; } >/dev/null 2>&1 && dpkg-deb -x ./*.deb k) || { rm -rf "$d"; die "cannot download the guest's kernel ($p)"; }
  mkdir -p "$VMS/modules"
  for p in $GUEST_MODULES; do find "$d/k" -name "$p.ko*" -exec cp {} "$VMS/modules/" \;; done
  find "$VMS/modules" -name '*.xz' -exec unxz -f {} \;
  echo "$GUEST_MODULES" >"$VMS/modules/list"
  cp "$d"/k/boot/vmlinuz-* "$VMS/kernel.new" && mv "$VMS/kernel.new" "$VMS/kernel"; rm -rf "$d"
}
guest_initrd() {
  local d m; d=$(mktemp -d); mkdir -p "$d/bin"
  cp "$(command -v busybox)" "$d/bin/busybox"; cp "$VMS/tick" "$d/tick"; install -m 755 "$HERE/vms/guest-init.sh" "$d/init"
  for m in $GUEST_MODULES; do
    [ -e "$VMS/modules/$m.ko" ] && strip --strip-debug -o "$d/$m.ko" "$VMS/modules/$m.ko" && echo "$m.ko" >>"$d/modules"
  done
  (cd "$d" && find . | cpio -o -H newc --quiet | gzip -9) >"$VMS/initrd.new" && mv "$VMS/initrd.new" "$VMS/initrd"; rm -rf "$d"
}
qemu_for_lxd() { # LXD 5.0 speaks the dialect of QEMU 7.2, which stays in a folder of its own
  local d p v; d=$(mktemp -d)
  for p in qemu-system-x86 qemu-system-common qemu-system-data; do
    v=$(apt-cache madison "$p" | awk '$3 ~ /:7\.2/ {print $3; exit}')
    (cd "$d" && apt-get download -q "$p=$v") >/dev/null 2>&1 || { rm -rf "$d"; die "cannot download $p 7.2 for LXD"; }
  done
  mkdir -p "$VMS/lxd-bin/root.new"
  for p in "$d"/*.deb; do dpkg-deb -x "$p" "$VMS/lxd-bin/root.new" || die "cannot unpack $p"; done
  rm -rf "$d" "$VMS/lxd-bin/root"; mv "$VMS/lxd-bin/root.new" "$VMS/lxd-bin/root"
}
runs_vms() { [ "$LAB_VMS" = 1 ] && [ -z "$(root_of "$1")" ]; } # NODE
vm_path() { # what comes first in the path of a node's daemon
  runs_vms "$1" || return 0
  if [ "$(kind "$1")" = lxd ]; then echo "$VMS/lxd-bin:"; else echo "$VMS/bin:"; fi
}
vm_shim() { runs_vms "$1" && echo "$VMS/vsock-shim"; }
describe_vms() { # for lab.json
  if [ "$LAB_VMS" = 1 ]; then printf '{"kernel": "%s/kernel", "initrd": "%s/initrd", "network": "%s"}' "$VMS" "$VMS" "$LAN"; else printf null; fi
}
