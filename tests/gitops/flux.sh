#!/bin/bash
# flux.sh - real Flux (source-controller, kustomize-controller) and a Git server, as plain processes against the API server of $KUBECONFIG.
#
#   flux.sh build    build them as pinned in */go.mod (once, about 6 minutes on 2 cores after the control plane was built)
#   flux.sh check    say in one line what is missing to start them; exit 1 if something is
#   flux.sh up       start, ready in 3-4 s; repositories $FLUX_DIR/git/NAME.git are served at $(cat $FLUX_DIR/git.url)/NAME.git
#   flux.sh down     end what up started and delete $FLUX_DIR; fine to repeat
#
# Settings (environment): KUBECONFIG, FLUX_DIR=/tmp/berth-flux
set -euo pipefail
DIR=${FLUX_DIR:-/tmp/berth-flux}
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
FLUX=$CACHE/flux-source-1.9.3-kustomize-1.9.5
CONTROLLERS="source-controller kustomize-controller"
check_dir

build() {
  build_git_server
  local c
  for c in $CONTROLLERS; do
    [ -e "$FLUX/crds/$c" ] && [ -x "$FLUX/$c" ] && continue
    go_build "$HERE/$c" "$FLUX/$c" "github.com/fluxcd/$c"
    rm -rf "$FLUX/crds/$c"; mkdir -p "$FLUX/crds/$c"
    install -m644 "$(module_dir "$HERE/$c" "github.com/fluxcd/$c")"/config/crd/bases/*.yaml "$FLUX/crds/$c/"
  done
}
check() {
  local c
  for c in $CONTROLLERS; do [ -x "$FLUX/$c" ] && [ -d "$FLUX/crds/$c" ] || { echo "Flux is not built (tests/gitops/flux.sh build)"; exit 1; }; done
  [ -x "$GIT_SERVER" ] || { echo "the Git server is not built (tests/gitops/flux.sh build)"; exit 1; }
}
up() {
  down; check >&2; mkdir -p "$DIR/store"
  git_server_up
  kubectl apply --server-side --force-conflicts -f "$FLUX/crds/source-controller" -f "$FLUX/crds/kustomize-controller" >/dev/null
  established -f "$FLUX/crds/source-controller" -f "$FLUX/crds/kustomize-controller"
  kubectl create namespace flux-system --dry-run=client -o yaml | kubectl apply -f - >/dev/null
  local p; p=$(free_ports 5)
  export RUNTIME_NAMESPACE=flux-system
  local common=(--events-addr= --watch-all-namespaces=true --requeue-dependency=2s)
  launch source "$FLUX/source-controller" "${common[@]}" --storage-path="$DIR/store" --storage-addr="127.0.0.1:$p" --storage-adv-addr="127.0.0.1:$p" \
    --health-addr="127.0.0.1:$((p + 1))" --metrics-addr="127.0.0.1:$((p + 2))"
  # a commit must not wait for the end of the move that it takes back: docs/flux.md
  launch kustomize "$FLUX/kustomize-controller" "${common[@]}" --health-addr="127.0.0.1:$((p + 3))" --metrics-addr="127.0.0.1:$((p + 4))" \
    --feature-gates=CancelHealthCheckOnNewRevision=true
  until_true 30 "source-controller" source answers "http://127.0.0.1:$((p + 1))/readyz"
  until_true 30 "kustomize-controller" kustomize answers "http://127.0.0.1:$((p + 3))/readyz"
}
down() { stop kustomize; stop source; stop git; rm -rf "$DIR"; }

case ${1:-} in
  build) build;;
  check) check;;
  up) up;;
  down) down;;
  *) sed -n '2,/^set -eu/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2;;
esac
