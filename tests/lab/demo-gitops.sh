#!/bin/bash
# demo-gitops.sh - the story from a Git commit, with GITOPS=flux or GITOPS=argo: two real Incus servers, a real Kubernetes API server, real Flux or
# Argo CD, a Git repository. A commit moves a running container, another takes that back, a third gives it up. KEEP=1 as in demo.sh.
set -eu
# shellcheck source=demo-lib.sh
. "$(dirname "$0")/demo-lib.sh"
WORK=/tmp/berth-demo-git # the clone that the commits are made in

git() { GIT_CONFIG_GLOBAL=/dev/null command git -C "$WORK" -c user.name="Platform team" -c user.email=platform@example.com "$@"; }
head_commit() { git rev-parse HEAD; }
push() { show git push -q origin main; t=$(date +%s.%N); [ "$GITOPS" = flux ] || told; }
told() { # what a webhook does: Argo CD looks at Git now
  kubectl annotate --overwrite application shop -n argocd argocd.argoproj.io/refresh=normal >/dev/null
}
adapted() { # a manifest of examples/ with this lab's names and addresses
  local a b; a=$(fingerprint i1) b=$(fingerprint i2)
  sed -e "s|https://git.example.com/shop.git|$(cat "$GIT_URL")/shop.git|; s|namespace: shop|namespace: default|; s|targetNamespace: shop|targetNamespace: default|" \
    -e "s|interval: 1m|interval: 2s|; s|10\.0\.0\.11|10.213.9.11|; s|10\.0\.0\.12|10.213.9.12|; s|4f7c[0-9a-f]*|$a|; s|91b0[0-9a-f]*|$b|" "$ROOT/examples/$1"
}
repository() {
  rm -rf "$WORK"; mkdir -p "$WORK/shop"
  command git init -q --bare -b main "$GIT_ROOT/shop.git"
  git init -q -b main; git remote add origin "$GIT_ROOT/shop.git"
  adapted "$FOLDER/shop/servers.yaml" >"$WORK/shop/servers.yaml"
  # the first of the two placements
  adapted "$FOLDER/shop/placements.yaml" | sed 's/web-1/web/; /^---/,$d' >"$WORK/shop/placements.yaml"
  [ "$GITOPS" = argo ] || cp "$ROOT/examples/$FOLDER/shop/kustomization.yaml" "$WORK/shop/"
  git add --all; git commit -q -m "web belongs on rack-a"
}
if [ "$GITOPS" = flux ]; then
  NAME=Flux FOLDER=flux SCRIPT=$FLUX GIT_ROOT=$FLUX_DIR/git GIT_URL=$FLUX_DIR/git.url
  follow() { adapted flux/sync.yaml | kubectl apply -f -; }
  look() { show kubectl get gitrepository,kustomization; }
  is_done() { # the newest commit is applied, and all that it says is so
    [ "$(kubectl get kustomization shop -o jsonpath='{.status.lastAppliedRevision}/{.status.conditions[?(@.type=="Ready")].status}')" = "main@sha1:$(head_commit)/True" ]
  }
  look_around="kubectl get gitrepository,kustomization,isrv,iplace,imove"
else
  NAME="Argo CD" FOLDER=argocd SCRIPT=$ARGO GIT_ROOT=$ARGO_DIR/git GIT_URL=$ARGO_DIR/git.url
  # the Application itself lives in Argo CD's namespace
  follow() { adapted argocd/application.yaml | kubectl apply -f -; }
  look() { show kubectl get application shop -n argocd; }
  is_done() {
    [ "$(kubectl get application shop -n argocd -o jsonpath='{.status.sync.revision}/{.status.sync.status}/{.status.health.status}/{.status.operationState.phase}')" = "$(head_commit)/Synced/Healthy/Succeeded" ]
  }
  look_around="kubectl get application -A; kubectl get isrv,iplace,imove"
fi
is_gone() { ! kubectl get iplace web; }
change() { sed -i "s|target: {server: $1}|target: {server: $2}|" "$WORK/shop/placements.yaml"; }

missing=$("$SCRIPT" check) || fail "$missing"
begin

say "1. Two Incus servers, a Kubernetes API server, the controller, $NAME"
start_all
"$SCRIPT" up 2>/tmp/berth-demo-gitops.log || fail "$NAME did not start: $(tail -n 3 /tmp/berth-demo-gitops.log)"
echo "ready after $(seconds "$start"); the controller's log: $LOG"

say "2. A container that counts runs on i1"
container

say "3. A Git repository says that it belongs on rack-a (i1), and $NAME follows it"
secret >/dev/null
repository
show cat "$WORK/shop/placements.yaml"
git push -q origin main
follow
until_true 60 "$NAME to be done" is_done
look; show kubectl get isrv,iplace

say "4. One commit, and the container moves"
before=$(inside i1 cat /var/lib/counter)
change rack-a rack-b
git --no-pager diff --unified=0 | tail -n 2
show git commit -q -a -m "web to rack-b"
push
until_true 90 "web in place on rack-b" in_place rack-b
echo "in place $(seconds "$t") after the push"
until_true 60 "$NAME to be done" is_done
echo "and $NAME says so $(seconds "$t") after the push"
look; show kubectl get iplace,imove
[ "$(inside i2 md5sum /root/data | cut -d' ' -f1)" = "$sum" ] || fail "the data differ"
after=$(inside i2 cat /var/lib/counter); [ "$after" -gt "$before" ] || fail "the counter did not go on: $before, then $after"
echo "web on i2: counter $before -> $after, data unchanged"

say "5. The commit is taken back, and so is the move"
echo "\$ git revert --no-edit HEAD"; git revert --no-edit HEAD >/dev/null
push
until_true 90 "web in place on rack-a" in_place rack-a
until_true 60 "$NAME to be done" is_done
echo "back, and $NAME says so, $(seconds "$t") after the push"
look; show kubectl get iplace,imove

say "6. A commit takes the placement away; the container stays as it is"
: >"$WORK/shop/placements.yaml"
sed -i '/placements.yaml/d' "$WORK/shop/kustomization.yaml" 2>/dev/null || true
show git commit -q -a -m "web is not looked after any more"
push
until_true 60 "the placement to be gone" is_gone
show kubectl get isrv,iplace
show incus list i1: -c ns4

kept "$look_around" "cd $WORK   # commits are made here"
