#!/bin/bash
# argo.sh - a real Argo CD (application controller, repo server, redis) and a Git server, as plain processes against the API server of $KUBECONFIG,
# with Berth's health checks and actions (charts/berth/argocd) installed as the documents say.
#
#   argo.sh build    build it as pinned in argo/go.mod (once, about 5 minutes on 2 cores)
#   argo.sh check    say in one line what is missing to start it; exit 1 if something is
#   argo.sh up       start, ready in about 5 s; repositories $ARGO_DIR/git/NAME.git are served at $(cat $ARGO_DIR/git.url)/NAME.git
#   argo.sh lua ARGS...   health checks and actions in Argo CD's own Lua engine: see argo/main.go
#   argo.sh down     end what up started and delete $ARGO_DIR; fine to repeat
#
# Settings (environment): KUBECONFIG, ARGO_DIR=/tmp/berth-argo, ARGO_POLL=10 (seconds between two looks at a Git repository)
set -euo pipefail
DIR=${ARGO_DIR:-/tmp/berth-argo}
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
ARGO=$CACHE/argo-cd-3.5.7
PROGRAM=$(own argo-cd-3.5.7/argo argo)
: "${ARGO_POLL:=10}"
check_dir

build() {
  build_git_server
  go_build "$HERE/argo" "$PROGRAM" .
  [ ! -d "$ARGO/files" ] || return 0
  local src; src=$(module_dir "$HERE/argo" github.com/argoproj/argo-cd/v3)
  rm -rf "$ARGO/files.new"; mkdir -p "$ARGO/files.new/crds" "$ARGO/files.new/bin"
  install -m644 "$src"/manifests/crds/{application,appproject,applicationset}-crd.yaml "$ARGO/files.new/crds/"
  # the repo server calls them by name
  install -m755 "$src"/hack/{git-verify-wrapper,gpg-wrapper}.sh "$ARGO/files.new/bin/"
  mv "$ARGO/files.new" "$ARGO/files"
}
check() {
  [ -x "$PROGRAM" ] && [ -d "$ARGO/files" ] && [ -x "$GIT_SERVER" ] || { echo "Argo CD is not built (tests/gitops/argo.sh build)"; exit 1; }
  local p
  for p in redis-server gpg git; do command -v $p >/dev/null || { echo "Argo CD needs $p"; exit 1; }; done
}
settings() { # what an installation of Argo CD consists of, as far as these programs look at it
  local c
  for c in argocd-cm argocd-rbac-cm argocd-gpg-keys-cm argocd-ssh-known-hosts-cm argocd-tls-certs-cm; do
    cat <<K
apiVersion: v1
kind: ConfigMap
metadata: {name: $c, namespace: argocd, labels: {app.kubernetes.io/name: $c, app.kubernetes.io/part-of: argocd}}
---
K
  done
  cat <<K
apiVersion: v1
kind: Secret
metadata: {name: argocd-secret, namespace: argocd, labels: {app.kubernetes.io/name: argocd-secret, app.kubernetes.io/part-of: argocd}}
stringData: {server.secretkey: "$(openssl rand -hex 16)"}
---
apiVersion: argoproj.io/v1alpha1
kind: AppProject
metadata: {name: default, namespace: argocd}
spec: {sourceRepos: ["*"], destinations: [{namespace: "*", server: "*"}], clusterResourceWhitelist: [{group: "*", kind: "*"}]}
K
}
install_settings() {
  kubectl apply --server-side --force-conflicts -f "$ARGO/files/crds" >/dev/null
  established -f "$ARGO/files/crds"
  kubectl create namespace argocd --dry-run=client -o yaml | kubectl apply -f - >/dev/null
  settings | kubectl apply --server-side --force-conflicts -f - >/dev/null
  kubectl apply --server-side --field-manager=berth --namespace=argocd -f "$HERE/../../charts/berth/argocd/argocd-cm.yaml" >/dev/null
  # other suites use the same API server: their Secrets and ConfigMaps are nothing to look at
  kubectl patch configmap argocd-cm --namespace=argocd --type=merge -p '{"data": {"resource.inclusions": "- {apiGroups: [berth.dev], kinds: [\"*\"], clusters: [\"*\"]}\n"}}' >/dev/null
}
up() {
  down; check >&2; mkdir -p "$DIR"/{tls,ssh,gpg,gnupg,redis}; chmod 700 "$DIR/gnupg"; touch "$DIR/ssh/ssh_known_hosts"
  git_server_up
  local p redis; p=$(free_ports 4); redis=127.0.0.1:$p
  launch redis redis-server --port "$p" --bind 127.0.0.1 --save '' --dir "$DIR/redis"
  install_settings
  PATH=$ARGO/files/bin:$PATH; export PATH ARGOCD_FAKE_IN_CLUSTER=true ARGOCD_GPG_ENABLED=false GNUPGHOME=$DIR/gnupg \
    ARGOCD_TLS_DATA_PATH=$DIR/tls ARGOCD_SSH_DATA_PATH=$DIR/ssh ARGOCD_GPG_DATA_PATH=$DIR/gpg \
    ARGOCD_RECONCILIATION_TIMEOUT=${ARGO_POLL}s ARGOCD_RECONCILIATION_JITTER=0s
  local repo=127.0.0.1:$((p + 1))
  launch repo "$PROGRAM" repo-server --redis "$redis" --disable-tls --client-ca-path= --address 127.0.0.1 --port $((p + 1)) \
    --metrics-address 127.0.0.1 --metrics-port $((p + 2))
  # the message of each resource's health is kept in the Application, where it can be read
  launch controller "$PROGRAM" application-controller --kubeconfig "$KUBECONFIG" --namespace argocd --redis "$redis" --repo-server "$repo" \
    --repo-server-plaintext --metrics-port $((p + 3)) --persist-resource-health
  until_true 30 "the repo server" repo answers "http://127.0.0.1:$((p + 2))/healthz"
  until_true 60 "the application controller" controller answers "http://127.0.0.1:$((p + 3))/healthz"
}
down() { stop controller; stop repo; stop redis; stop git; rm -rf "$DIR"; }

case ${1:-} in
  build) build;;
  check) check;;
  up) up;;
  lua) shift; "$PROGRAM" lua "$@";;
  down) down;;
  *) sed -n '2,/^set -eu/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2;;
esac
