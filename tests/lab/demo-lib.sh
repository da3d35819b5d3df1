# demo-lib.sh - what demo.sh and demo-gitops.sh share: two servers, a control plane, the controller, and a way to show things. To be sourced.
# shellcheck shell=bash
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd); ROOT=$(cd "$HERE/../.." && pwd)
LAB=$HERE/lab.sh CONTROL_PLANE=$ROOT/tests/kubernetes/control-plane.sh FLUX=$ROOT/tests/gitops/flux.sh ARGO=$ROOT/tests/gitops/argo.sh
export LAB_ID=9 LAB_DIR=/var/lib/berth-demo LAB_INCUS="i1 i2" LAB_LXD="" LAB_CLUSTER="" LAB_INCUS7="" KUBE_DIR=/tmp/berth-demo-kube
export FLUX_DIR=/tmp/berth-demo-flux ARGO_DIR=/tmp/berth-demo-argo
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
in_place() { [ "$(kubectl get iplace web -o jsonpath='{.status.location.server}/{.status.conditions[?(@.type=="Ready")].reason}')" = "$1/InPlace" ]; }
secret() { # the client's key pair, which both servers trust
  kubectl create secret tls berth-client --cert="$LAB_DIR/client.crt" --key="$LAB_DIR/client.key"
}
fingerprint() { openssl x509 -in "$LAB_DIR/$1.crt" -noout -fingerprint -sha256 | sed 's/.*=//; s/://g' | tr 'A-F' 'a-f'; } # LAB-NAME
server_yaml() { # NAME LAB-NAME ADDRESS
  cat <<Y
apiVersion: berth.dev/v1alpha1
kind: InstanceServer
metadata: {name: $1}
spec:
  addresses: ["https://$3:8443"]
  credentials: {secretRef: {name: berth-client}}
  serverCertificate: {fingerprint: $(fingerprint "$2")}
---
Y
}

stop_former() { # the controller that a run with KEEP=1 left
  local p; p=$(cat "$LOG.pid" 2>/dev/null) || return 0
  ! grep -qz '^controller$' "/proc/$p/cmdline" 2>/dev/null || kill "$p" 2>/dev/null || true
  rm -f "$LOG.pid"
}
end() {
  [ -z "${controller:-}" ] || kill "$controller" 2>/dev/null || true
  "$FLUX" down; "$ARGO" down
  "$LAB" down 2>/dev/null; "$CONTROL_PLANE" down
}
begin() { # ends what an earlier run left; whatever happens from here on, nothing is left
  start=$(date +%s.%N)
  [ "$(id -u)" = 0 ] || fail "root is needed to start Incus servers"
  missing=$("$LAB" check) || fail "$missing"
  stop_former; end
  trap 'end' EXIT
  trap 'exit 130' INT TERM HUP
}
start_all() { # servers, control plane, controller
  cargo build --quiet --manifest-path "$ROOT/Cargo.toml" --package berth --bin berth
  "$CONTROL_PLANE" up 2>/tmp/berth-demo-kube.log & kube=$!
  "$LAB" up 2>/tmp/berth-demo-lab.log || fail "the servers did not start: $(tail -n 3 /tmp/berth-demo-lab.log)"
  wait $kube || fail "the control plane did not start: $(tail -n 3 /tmp/berth-demo-kube.log)"
  KUBECONFIG=$KUBE_DIR/kubeconfig; export KUBECONFIG PATH="$("$CONTROL_PLANE" programs):$PATH"
  kubectl apply --server-side -f "$ROOT/crds" >/dev/null
  kubectl wait --for=condition=established -f "$ROOT/crds" >/dev/null
  "${CARGO_TARGET_DIR:-$ROOT/target}/debug/berth" controller --namespace default --listen-address 127.0.0.1:0 >"$LOG" 2>&1 & controller=$!
  echo "$controller" >"$LOG.pid"
}
container() { # a running container with data, on i1
  incus launch i1:bb i1:web -q </dev/null
  inside i1 dd if=/dev/urandom of=/root/data bs=1M count=20 2>/dev/null
  sum=$(inside i1 md5sum /root/data | cut -d' ' -f1)
  echo "web on i1: counter $(inside i1 cat /var/lib/counter), data $sum"
}
kept() { # with KEEP=1: how to look around; further lines are arguments
  say "Done in $(seconds "$start")."
  [ "${KEEP:-}" = 1 ] || return 0
  trap - EXIT
  echo "Everything keeps running. Look around with:"
  echo "  export KUBECONFIG=$KUBECONFIG PATH=$("$CONTROL_PLANE" programs):\$PATH"
  printf '  %s\n' "$@"
  echo "  LAB_ID=$LAB_ID LAB_DIR=$LAB_DIR tests/lab/lab.sh incus list i1:"
  echo "and end it with: tests/lab/demo.sh down"
}
