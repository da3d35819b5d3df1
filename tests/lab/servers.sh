# servers.sh - image, keys, first configuration of the servers, clients' configuration. Read by lab.sh.

#---------------------------------------------------------------- image and keys
make_image() { # FILE: busybox, and a shell as PID 1 that counts
  local out=$1 d r a; d=$(mktemp -d); r=$d/rootfs
  mkdir -p "$r"/{bin,sbin,etc/udhcpc,proc,sys,dev,tmp,root,run,mnt,usr/bin,usr/sbin,var/log,var/lib}
  chmod 1777 "$r/tmp"; cp "$(command -v busybox)" "$r/bin/busybox"
  for a in $(busybox --list); do case $a in busybox|init|poweroff|halt|reboot) ;; *) ln -s busybox "$r/bin/$a";; esac; done
  cp "$HERE/image-init.sh" "$r/sbin/init"; chmod 755 "$r/sbin/init"
  cat >"$r/etc/udhcpc/default.script" <<'S'
#!/bin/sh
[ "$1" = bound -o "$1" = renew ] || exit 0
ip addr flush dev $interface; ip addr add $ip/${mask:-24} dev $interface
S
  chmod 755 "$r/etc/udhcpc/default.script"
  printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' >"$r/etc/passwd"
  printf 'root:x:0:\nnogroup:x:65534:\n' >"$r/etc/group"
  echo busybox >"$r/etc/hostname"; echo '127.0.0.1 localhost' >"$r/etc/hosts"; : >"$r/etc/resolv.conf"
  cat >"$d/metadata.yaml" <<M
architecture: $(uname -m)
creation_date: 1700000000
properties: {architecture: $(uname -m), description: counting busybox, os: busybox, release: lab, variant: default, name: busybox-lab}
M
  tar --sort=name --mtime=@1700000000 --numeric-owner --owner=0 --group=0 -C "$d" -czf "$out" metadata.yaml rootfs; rm -rf "$d"
}
make_client_keys() { # `client` is the controller's, `person` is what people use: servers tell who asked for a stop
  local who
  for who in client person; do
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 3650 -subj "/CN=lab-$who" -addext extendedKeyUsage=clientAuth \
      -keyout "$LAB_DIR/$who.key" -out "$LAB_DIR/$who.crt" 2>/dev/null || die "cannot make the key of $who"
  done
}

#---------------------------------------------------------------- first configuration
# The guest's kernel comes from QEMU, which takes boot index 0 for it; LXD would give that to a disk, here to one that is absent.
first_disk() { [ "$LAB_VMS" = 0 ] || [ "$(kind "$1")" = incus ] || echo ", none: {type: disk, path: /none, source: /none, required: \"false\", boot.priority: \"10\"}"; }
standalone_preseed() {
  local net=incusbr0; [ "$(kind "$1")" = lxd ] && net=lxdbr0
  cat <<Y
config: {core.https_address: "$(addr "$1"):8443"}
storage_pools:
- {name: default, driver: dir}
- {name: btr, driver: btrfs, config: {size: $LAB_POOL_SIZE}}
networks:
- {name: $net, type: bridge, config: {ipv4.address: 10.214.$(number "$1").1/24, ipv4.nat: "false", ipv6.address: none}}
profiles:
- {name: default, devices: {root: {type: disk, path: /, pool: default}, eth0: {type: nic, name: eth0, network: $net}$(first_disk "$1")}}
- {name: lan, devices: {eth0: {type: nic, name: eth0, nictype: bridged, parent: lan0}}}
Y
}
cluster_preseed() {
  cat <<Y
config: {core.https_address: "$(addr "$1"):8443", cluster.https_address: "$(addr "$1"):8443"}
cluster: {enabled: true, server_name: $1}
storage_pools:
- {name: default, driver: dir}
profiles:
- {name: default, devices: {root: {type: disk, path: /, pool: default}}}
- {name: lan, devices: {eth0: {type: nic, name: eth0, nictype: bridged, parent: lan0}}}
Y
}
member_preseed() { # NODE TOKEN
  cat <<Y
cluster:
  enabled: true
  server_name: $1
  server_address: $(addr "$1"):8443
  cluster_token: $2
  member_config:
  - {entity: storage-pool, name: default, key: source, value: ""}
Y
}
cli() { local n=$1; shift; if [ "$(kind "$n")" = lxd ]; then in_node "$n" lxc "$@"; else in_node "$n" incus "$@"; fi; }
preseed() { if [ "$(kind "$1")" = lxd ]; then in_node "$1" lxd init --preseed; else in_node "$1" incus admin init --preseed; fi; }
trust_and_image() {
  local n=$1 sub=add-certificate; [ "$(kind "$n")" = lxd ] && sub=add
  cli "$n" config trust $sub "$LAB_DIR/client.crt" --name lab-client && cli "$n" config trust $sub "$LAB_DIR/person.crt" --name lab-person && cli "$n" image import "$LAB_DIR/busybox.tar.gz" --alias bb --quiet >/dev/null
}
save_certificate() { local f="$LAB_DIR/$1/cluster.crt"; [ -e "$f" ] || f="$LAB_DIR/$1/server.crt"; cp "$f" "$LAB_DIR/$1.crt"; }
standalone_up() {
  local n=$1
  { node_up "$n" && daemon_start "$n"; } || return 1
  standalone_preseed "$n" | preseed "$n" && trust_and_image "$n" && save_certificate "$n"
}
cluster_up() {
  local first=$1 n token; shift
  for n in "$first" "$@"; do { node_up "$n" && daemon_start "$n"; } & done; wait
  cluster_preseed "$first" | preseed "$first" && trust_and_image "$first" && save_certificate "$first" || return 1
  for n in "$@"; do
    token=$(cli "$first" cluster add "$n" --quiet | tail -n 1)
    member_preseed "$n" "$token" | preseed "$n" && save_certificate "$n" || return 1
  done
}

#---------------------------------------------------------------- for clients
client_config() { # remotes for `incus` and `lxc` on this machine
  local n dir tool
  for tool in incus lxc; do
    dir=$LAB_DIR/cli/$tool; mkdir -p "$dir/servercerts"
    cp "$LAB_DIR/person.crt" "$dir/client.crt"; cp "$LAB_DIR/person.key" "$dir/client.key"
    printf 'default-remote: local\nremotes:\n' >"$dir/config.yml"
  done
  for n in $(all_nodes); do
    tool=incus; [ "$(kind "$n")" = lxd ] && tool=lxc
    dir=$LAB_DIR/cli/$tool; cp "$LAB_DIR/$n.crt" "$dir/servercerts/$n.crt"
    printf '  %s: {addr: "https://%s:8443", auth_type: tls, protocol: %s, public: false}\n' "$n" "$(addr "$n")" "$(kind "$n")" >>"$dir/config.yml"
  done
}
fingerprint() { openssl x509 -in "$1" -noout -fingerprint -sha256 | sed 's/.*=//; s/://g' | tr 'A-F' 'a-f'; }
describe() { # lab.json, for the test program
  local n sep="" c
  printf '{"id": %s, "client": {"cert": "%s/client.crt", "key": "%s/client.key"}, "image": "bb",\n "servers": [' "$LAB_ID" "$LAB_DIR" "$LAB_DIR"
  for n in $(all_nodes); do
    c=$(cluster_of "$n"); if [ -n "$c" ]; then c="\"$c\""; else c=null; fi
    printf '%s\n  {"name": "%s", "kind": "%s", "version": "%s", "url": "https://%s:8443", "certificate": "%s/%s.crt", "fingerprint": "%s", "socket": "%s/%s/unix.socket", "cluster": %s}' \
      "$sep" "$n" "$(kind "$n")" "$(version "$n")" "$(addr "$n")" "$LAB_DIR" "$n" "$(fingerprint "$LAB_DIR/$n.crt")" "$LAB_DIR" "$n" "$c"
    sep=,
  done
  printf '\n],\n "vms": %s}\n' "$(describe_vms)"
}
instance() { # SERVER NAME [POOL [MB]]
  [ $# -ge 2 ] || die "usage: lab.sh instance SERVER NAME [POOL [MB]]"
  known "$1"
  cli "$1" launch bb "$2" -q -s "${3:-default}" </dev/null || return 1
  [ "${4:-0}" = 0 ] || cli "$1" exec "$2" -- dd if=/dev/urandom of=/root/data bs=1M count="$4" 2>/dev/null
}
