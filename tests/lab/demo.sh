#!/bin/bash
# demo.sh - two real Incus servers, a real Kubernetes API server, one running container: it moves because a field was edited, and comes back
# when somebody moves it away by hand. KEEP=1 leaves everything running afterwards; the next run, or `demo.sh down`, clears it away.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd)
LAB=$HERE/lab.sh CONTROL_PLANE=$ROOT/tests/kubernetes/control-plane.sh
export LAB_ID=9 LAB_DIR=/var/lib/berth-demo LAB_INCUS="i1 i2" LAB_LXD="" LAB_CLUSTER="" LAB_INCUS7="" KUBE_DIR=/tmp/berth-demo-kube
export PATH=$HOME/.cargo/bin:/usr/local/go/bin:$PATH
LOG=/tmp/berth-demo.log

say() { printf "\n== %s\n" "$*"; }
show() { printf '$ %s\n' "$*"; "$@"; }
fail() { echo "demo: $*" >&2; [ ! -e "$LOG" ] || tail -n 15 "$LOG" >&2; exit 1; }
seconds() { awk -v a="$1" -v b="$(date +%s.%N)" 'BEGIN {printf "%.1f s", b - a}'; }
incus() { "$LAB" incus "$@"; }
inside() { incus exec "$1:web" -- "${@:2}" </dev/null; }
until_true() { # SECONDS WHAT CMD...: waits for a condition
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    kill -0 "$controller" || fail "the controller ended"
    [ $SECONDS -lt $end ] || { kubectl get isrv,iplace,imove -o yaml >"$LOG.objects" || true; fail "waited in vain: $what (objects: $LOG.objects)"; }
    sleep 0.1
  done
}
end() {
  [ -z "${controller:-}" ] || kill "$controller" 2>/dev/null || true
  "$LAB" down 2>/dev/null; "$CONTROL_PLANE" down
}
in_place() { [ "$(kubectl get iplace web -o jsonpath='{.status.location.server}/{.status.conditions[?(@.type=="Ready")].reason}')" = "$1/InPlace" ]; }
is_back() { # a move can be seen at its end only: its servers know the instance by other names before
  incus list i2: -f csv -c n | grep -qx web && in_place rack-b && [ "$(kubectl get imove -o jsonpath='{.items[*].status.outcome}')" = "Succeeded Succeeded" ]
}
runs_on() { incus list "$1:" -f csv -c ns | grep -qx web,RUNNING; }
counts_beyond() { [ "$(inside i2 cat /var/lib/counter)" -gt "$1" ]; }
secret() { # the client's key pair, which both servers trust
  kubectl create secret tls berth-client --cert="$LAB_DIR/client.crt" --key="$LAB_DIR/client.key"
}
server_yaml() { # NAME LAB-NAME ADDRESS
  cat <<Y
apiVersion: berth.dev/v1alpha1
kind: InstanceServer
metadata: {name: $1}
spec:
  addresses: ["https://$3:8443"]
  credentials: {secretRef: {name: berth-client}}
  serverCertificate: {fingerprint: $(openssl x509 -in "$LAB_DIR/$2.crt" -noout -fingerprint -sha256 | sed 's/.*=//; s/://g' | tr 'A-F' 'a-f')}
---
Y
}

stop_former() { # the controller that a run with KEEP=1 left
  local p; p=$(cat "$LOG.pid" 2>/dev/null) || return 0
  ! grep -qz '^controller$' "/proc/$p/cmdline" 2>/dev/null || kill "$p" 2>/dev/null || true
  rm -f "$LOG.pid"
}
if [ "${1:-}" = down ]; then stop_former; end; exit; fi
start=$(date +%s.%N)
[ "$(id -u)" = 0 ] || fail "root is needed to start Incus servers"
missing=$("$LAB" check) || fail "$missing"
stop_former; end
trap 'end' EXIT
trap 'exit 130' INT TERM HUP

say "1. Two Incus servers, a Kubernetes API server, the controller"
cargo build --quiet --manifest-path "$ROOT/Cargo.toml" --package berth --bin berth
"$CONTROL_PLANE" up 2>/tmp/berth-demo-kube.log & kube=$!
"$LAB" up 2>/tmp/berth-demo-lab.log || fail "the servers did not start: $(tail -n 3 /tmp/berth-demo-lab.log)"
wait $kube || fail "the control plane did not start: $(tail -n 3 /tmp/berth-demo-kube.log)"
KUBECONFIG=$KUBE_DIR/kubeconfig; export KUBECONFIG PATH="$("$CONTROL_PLANE" programs):$PATH"
kubectl apply --server-side -f "$ROOT/crds" >/dev/null
kubectl wait --for=condition=established -f "$ROOT/crds" >/dev/null
"${CARGO_TARGET_DIR:-$ROOT/target}/debug/berth" controller --namespace default --listen-address 127.0.0.1:0 >"$LOG" 2>&1 & controller=$!
echo "$controller" >"$LOG.pid"
echo "ready after $(seconds "$start"); the controller's log: $LOG"

say "2. A container that counts runs on i1"
incus launch i1:bb i1:web -q </dev/null
inside i1 dd if=/dev/urandom of=/root/data bs=1M count=20 2>/dev/null
sum=$(inside i1 md5sum /root/data | cut -d' ' -f1)
echo "web on i1: counter $(inside i1 cat /var/lib/counter), data $sum"

say "3. Kubernetes is told of both servers, and that web belongs on rack-a (i1)"
secret >/dev/null
{ server_yaml rack-a i1 10.213.9.11; server_yaml rack-b i2 10.213.9.12; } | kubectl apply -f -
kubectl apply -f - <<Y
apiVersion: berth.dev/v1alpha1
kind: InstancePlacement
metadata: {name: web}
spec: {target: {server: rack-a}}
Y
until_true 30 "web in place on rack-a" in_place rack-a
show kubectl get isrv,iplace

say "4. One field is edited, and the container moves"
before=$(inside i1 cat /var/lib/counter); t=$(date +%s.%N)
show kubectl patch iplace web --type=merge -p '{"spec": {"target": {"server": "rack-b"}}}'
until_true 60 "web in place on rack-b" in_place rack-b
echo "in place after $(seconds "$t")"
show kubectl get iplace,imove
[ "$(inside i2 md5sum /root/data | cut -d' ' -f1)" = "$sum" ] || fail "the data differ"
after=$(inside i2 cat /var/lib/counter); [ "$after" -gt "$before" ] || fail "the counter did not go on: $before, then $after"
echo "web on i2: counter $before -> $after, data unchanged"
show incus list i1: -c ns4; show incus list i2: -c ns4

say "5. Somebody stops it and moves it away by hand; it comes back"
show incus stop i2:web
show incus move i2:web i1:web -q; t=$(date +%s.%N)
until_true 90 "web back on rack-b" is_back
echo "back after $(seconds "$t"), stopped as it was left; one more field starts it"
show kubectl patch iplace web --type=merge -p '{"spec": {"powerState": "Running"}}'
until_true 30 "web running on rack-b" runs_on i2
show kubectl get iplace,imove
until_true 10 "web counting" counts_beyond "$after"
echo "web on i2: counter $(inside i2 cat /var/lib/counter), data $(inside i2 md5sum /root/data | cut -d' ' -f1)"

say "Done in $(seconds "$start")."
if [ "${KEEP:-}" = 1 ]; then
  trap - EXIT
  echo "Everything keeps running. Look around with:"
  echo "  export KUBECONFIG=$KUBECONFIG PATH=$("$CONTROL_PLANE" programs):\$PATH"
  echo "  kubectl get isrv,iplace,imove"
  echo "  LAB_ID=$LAB_ID LAB_DIR=$LAB_DIR tests/lab/lab.sh incus list i1:"
  echo "and end it with: tests/lab/demo.sh down"
fi
