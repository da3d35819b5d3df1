#!/bin/bash
# control-plane.sh - a real Kubernetes control plane (etcd, kube-apiserver, kube-controller-manager) on loopback; no containers, no root.
#
#   control-plane.sh build                 build etcd, kube-apiserver, kube-controller-manager and kubectl of the versions pinned in go.mod
#                                          (once, about 7 minutes on 2 cores); nothing to do if they are found
#   control-plane.sh build-tools           the same for helm and kubeconform (tools/go.mod, 1-2 minutes)
#   control-plane.sh programs              print the folder of the programs
#   control-plane.sh check                 say in one line what is missing to start one; exit 1 if something is
#   control-plane.sh check-tools           the same for helm and kubeconform, which lie in the cache folder only
#   control-plane.sh find-go               print the go command that build would use
#   control-plane.sh up                    start, ready in 2-3 s; writes $KUBE_DIR/kubeconfig (cluster admin) and $KUBE_DIR/audit.log (every write)
#   control-plane.sh restart-apiserver [SIGNAL]   kill and start the API server
#   control-plane.sh kill-apiserver | start-apiserver
#   control-plane.sh down                  end what up started and delete $KUBE_DIR; fine to repeat
#
# Programs are looked for in $KUBEBUILDER_ASSETS (setup-envtest's; any kube-controller-manager must be there too), else in the cache folder
# ${XDG_CACHE_HOME:-~/.cache}/berth-kube/VERSION. kube-controller-manager runs what objects need to live and die properly: owner references,
# namespaces, service accounts and their tokens. There is no kubelet: pods stay Pending.
#
# Settings (environment): KUBE_DIR=/tmp/berth-kube, KUBE_PORT (API server; +1 and +2 are etcd's; default: three free ports)
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
VERSION=v1.36.3
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/berth-kube/$VERSION
: "${KUBE_DIR:=/tmp/berth-kube}"
PROGRAMS="etcd kube-apiserver kube-controller-manager kubectl"
TOOLS="helm kubeconform"
case $KUBE_DIR in /*/*) ;; *) echo "control-plane: KUBE_DIR must be a folder of its own, not '$KUBE_DIR'" >&2; exit 2;; esac

log() { echo "control-plane: $*" >&2; }
die() { log "ERROR: $*"; exit 1; }
has() { local dir=$1 p; shift; for p in "$@"; do [ -x "$dir/$p" ] || return 1; done; }
programs() {
  if [ -n "${KUBEBUILDER_ASSETS:-}" ] && has "$KUBEBUILDER_ASSETS" $PROGRAMS; then echo "$KUBEBUILDER_ASSETS"; else echo "$CACHE"; fi
}

#---------------------------------------------------------------- build
find_go() { # prints the go command; one sentence if there is none that will do
  local g have
  for g in "$(command -v go || true)" /usr/local/go/bin/go /usr/lib/go-*/bin/go; do
    [ -x "$g" ] || continue
    have=$("$g" env GOVERSION 2>/dev/null | sed 's/^go//')
    # from 1.21 on go fetches the toolchain that go.mod asks for (GOTOOLCHAIN=auto, which Debian turns off)
    [ "$(printf '%s\n1.21\n' "$have" | sort -V | head -n 1)" = 1.21 ] && { echo "$g"; return; }
  done
  die "Go 1.21 or later is needed to build the control plane (go.dev/dl, unpacked to /usr/local/go), or KUBEBUILDER_ASSETS with $PROGRAMS"
}
go_build() { # MODULE-FOLDER PROGRAM PACKAGE LDFLAGS
  [ ! -x "$CACHE/$2" ] || return 0
  log "building $2"
  mkdir -p "$CACHE"
  # under another name first: a build that was interrupted leaves nothing that looks complete
  (cd "$1" && CGO_ENABLED=0 GOTOOLCHAIN=auto "$GO" build -trimpath -ldflags "-s -w ${4:-}" -o "$CACHE/.$2.new" "$3") && mv "$CACHE/.$2.new" "$CACHE/$2"
}
build() {
  has "$(programs)" $PROGRAMS && return 0
  local v="-X k8s.io/component-base/version.gitVersion=$VERSION -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36" p
  GO=$(find_go)
  for p in kube-apiserver kube-controller-manager kubectl; do go_build "$HERE" $p k8s.io/kubernetes/cmd/$p "$v"; done
  go_build "$HERE" etcd go.etcd.io/etcd/server/v3
}
build_tools() {
  has "$CACHE" $TOOLS && return 0
  GO=$(find_go)
  go_build "$HERE/tools" helm helm.sh/helm/v4/cmd/helm
  go_build "$HERE/tools" kubeconform github.com/yannh/kubeconform/cmd/kubeconform
}

#---------------------------------------------------------------- run
is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
free_ports() { # the first of three free ones
  local p; for _ in $(seq 50); do
    p=$((20000 + RANDOM % 4000 * 3)); is_free $p && is_free $((p + 1)) && is_free $((p + 2)) && { echo $p; return; }
  done; die "no free ports"
}
launch() { # NAME CMD...: in a session of its own, so that ^C at the terminal does not end it before its user
  local name=$1; shift
  setsid "$@" </dev/null >>"$KUBE_DIR/$name.log" 2>&1 & echo $! >"$KUBE_DIR/$name.pid"
}
runs() { local p; p=$(cat "$KUBE_DIR/$1.pid" 2>/dev/null) && [ -e "/proc/$p" ] && ! grep -q '^State:.*Z' "/proc/$p/status"; }
stop() { # NAME SIGNAL
  local p; p=$(cat "$KUBE_DIR/$1.pid" 2>/dev/null) || return 0
  # a pid that an earlier life of this machine wrote down may be somebody else's by now
  if grep -qz "$KUBE_DIR" "/proc/$p/cmdline" 2>/dev/null; then
    kill "-$2" "$p" 2>/dev/null || true; for _ in $(seq 200); do runs "$1" || break; sleep 0.05; done
  fi
  rm -f "$KUBE_DIR/$1.pid"
}
start_etcd() {
  launch etcd "$BIN/etcd" --data-dir "$KUBE_DIR/etcd" --unsafe-no-fsync --log-level warn --listen-client-urls "http://127.0.0.1:$((PORT + 1))" \
    --advertise-client-urls "http://127.0.0.1:$((PORT + 1))" --listen-peer-urls "http://127.0.0.1:$((PORT + 2))" \
    --initial-advertise-peer-urls "http://127.0.0.1:$((PORT + 2))" --initial-cluster "default=http://127.0.0.1:$((PORT + 2))"
}
start_apiserver() {
  launch apiserver "$BIN/kube-apiserver" --etcd-servers="http://127.0.0.1:$((PORT + 1))" --cert-dir="$KUBE_DIR/pki" --bind-address=127.0.0.1 \
    --secure-port="$PORT" --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$KUBE_DIR/pki/sa.pub" \
    --service-account-signing-key-file="$KUBE_DIR/pki/sa.key" --token-auth-file="$KUBE_DIR/pki/tokens.csv" --authorization-mode=RBAC \
    --service-cluster-ip-range=10.0.0.0/24 --disable-admission-plugins=ServiceAccount --endpoint-reconciler-type=none \
    --audit-policy-file="$HERE/audit-policy.yaml" --audit-log-path="$KUBE_DIR/audit.log"
  for _ in $(seq 600); do
    curl -sk -m 2 "https://127.0.0.1:$PORT/readyz" -H "Authorization: Bearer $(token admin)" 2>/dev/null | grep -qx ok && return 0
    runs apiserver || break
    sleep 0.05
  done
  tail -n 5 "$KUBE_DIR/apiserver.log" >&2; return 1
}
token() { sed -n "s/,$1,.*//p" "$KUBE_DIR/pki/tokens.csv"; }
kubeconfig() { # USER
  cat <<K
apiVersion: v1
kind: Config
clusters: [{name: berth, cluster: {server: "https://127.0.0.1:$PORT", certificate-authority: $KUBE_DIR/pki/apiserver.crt}}]
users: [{name: $1, user: {token: $(token "$1")}}]
contexts: [{name: berth, context: {cluster: berth, user: $1}}]
current-context: berth
K
}
start_controller_manager() {
  launch controller-manager "$BIN/kube-controller-manager" --kubeconfig="$KUBE_DIR/controller-manager.kubeconfig" \
    --service-account-private-key-file="$KUBE_DIR/pki/sa.key" --use-service-account-credentials=false --leader-elect=false --secure-port=0 \
    --controllers=namespace-controller,garbage-collector-controller,serviceaccount-controller,serviceaccount-token-controller \
    --authentication-skip-lookup --kube-api-qps=200 --kube-api-burst=400
}
up() {
  if runs apiserver && [ -e "$KUBE_DIR/kubeconfig" ]; then log "is up already: $KUBE_DIR"; return; fi
  down
  build
  mkdir -p "$KUBE_DIR/pki"; chmod 700 "$KUBE_DIR"
  openssl genrsa -out "$KUBE_DIR/pki/sa.key" 2048 2>/dev/null; openssl rsa -in "$KUBE_DIR/pki/sa.key" -pubout -out "$KUBE_DIR/pki/sa.pub" 2>/dev/null
  printf '%s,admin,admin,system:masters\n%s,controller-manager,controller-manager,system:masters\n' "$(openssl rand -hex 16)" "$(openssl rand -hex 16)" >"$KUBE_DIR/pki/tokens.csv"
  local try
  for try in 1 2 3; do # somebody else may have taken a port between the look and the start
    PORT=${KUBE_PORT:-$(free_ports)}; echo "$PORT" >"$KUBE_DIR/port"
    start_etcd
    start_apiserver && break
    stop apiserver KILL; stop etcd KILL; rm -rf "$KUBE_DIR/etcd"
    [ "$try" != 3 ] || die "the API server did not start; see $KUBE_DIR/apiserver.log and etcd.log"
  done
  kubeconfig controller-manager >"$KUBE_DIR/controller-manager.kubeconfig"
  start_controller_manager
  kubeconfig admin >"$KUBE_DIR/kubeconfig.new" && mv "$KUBE_DIR/kubeconfig.new" "$KUBE_DIR/kubeconfig"
  log "is up: export KUBECONFIG=$KUBE_DIR/kubeconfig PATH=$BIN:\$PATH"
}
down() { # SIGKILL: without etcd the API server lingers and keeps its port
  stop controller-manager KILL; stop apiserver KILL; stop etcd KILL; rm -rf "$KUBE_DIR"
}

BIN=$(programs)
PORT=$(cat "$KUBE_DIR/port" 2>/dev/null || true)
case ${1:-} in
  build) build;;
  build-tools) build_tools;;
  programs) programs;;
  check) has "$BIN" $PROGRAMS || { echo "the control plane is not built (tests/kubernetes/control-plane.sh build)"; exit 1; };;
  up) up;;
  restart-apiserver) stop apiserver "${2:-KILL}"; start_apiserver;;
  kill-apiserver) stop apiserver "${2:-KILL}";;
  start-apiserver) start_apiserver;;
  down) down;;
  check-tools) has "$CACHE" $TOOLS || { echo "helm and kubeconform are not built (tests/kubernetes/control-plane.sh build-tools)"; exit 1; };;
  find-go) find_go;;
  *) sed -n '2,/^set -eu/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2;;
esac
