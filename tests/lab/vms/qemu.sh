#!/bin/bash
# qemu.sh - stands in for qemu-system-x86_64 where KVM cannot run a stock guest and the server has no raw.qemu.conf (LXD 5.0):
# what was meant for KVM is emulated. The links beside it say which QEMU is meant.
set -u
HERE=$(dirname "$0") args=()
while [ $# -gt 0 ]; do
  case $1 in
    -accel) args+=(-accel tcg); shift;;
    -cpu) args+=(-cpu max); shift;;
    -readconfig) sed -i 's/^\( *accel *= *\)"kvm"/\1"tcg"/' "$2"; args+=("$1" "$2"); shift;;
    *) args+=("$1");;
  esac
  shift
done
root=$HERE/root
export QEMU_MODULE_DIR=$root/usr/lib/x86_64-linux-gnu/qemu
exec "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/qemu" -L /usr/share/seabios -L /usr/lib/ipxe/qemu -L /usr/share/qemu "${args[@]}"
