#!/bin/bash
# demo.sh - two real Incus servers, a real Kubernetes API server, one running container: it moves because a field was edited, and comes back
# when somebody moves it away by hand. KEEP=1 leaves everything running afterwards; the next run, or `demo.sh down`, clears it away.
# GITOPS=flux or GITOPS=argo tells the story from a Git commit instead: demo-gitops.sh.
set -eu
# shellcheck source=demo-lib.sh
. "$(dirname "$0")/demo-lib.sh"

is_back() { # a move can be seen at its end only: its servers know the instance by other names before
  incus list i2: -f csv -c n | grep -qx web && in_place rack-b && [ "$(kubectl get imove -o jsonpath='{.items[*].status.outcome}')" = "Succeeded Succeeded" ]
}
runs_on() { incus list "$1:" -f csv -c ns | grep -qx web,RUNNING; }
counts_beyond() { [ "$(inside i2 cat /var/lib/counter)" -gt "$1" ]; }

if [ "${1:-}" = down ]; then stop_former; end; exit; fi
case ${GITOPS:-} in
  "") ;;
  flux | argo) exec "$HERE/demo-gitops.sh";;
  *) fail "GITOPS is flux or argo, not $GITOPS";;
esac

begin

say "1. Two Incus servers, a Kubernetes API server, the controller"
start_all
echo "ready after $(seconds "$start"); the controller's log: $LOG"

say "2. A container that counts runs on i1"
container

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

kept "kubectl get isrv,iplace,imove"
