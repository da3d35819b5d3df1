#!/bin/bash
# run.sh - all checks and suites, or with arguments those that `cargo test` selects by them: run.sh -p berth-tests --test harness -- word
# One control plane and one set of servers serve all suites; both end with this script. The last line is the sum of all.
set -u
HERE=$(cd "$(dirname "$0")" && pwd); cd "$HERE/.." || exit 1
CONTROL_PLANE=$HERE/kubernetes/control-plane.sh LAB=$HERE/lab/lab.sh
WORK=$(mktemp -d); LOG=$WORK/log; failed=0 skipped=0
KUBE_DIR=$WORK/kube; export KUBE_DIR
trap 'end' EXIT
trap 'exit 130' INT TERM HUP

end() {
  trap '' INT TERM HUP
  [ -z "${BERTH_LAB_DIR:-}" ] || "$LAB" down 2>/dev/null
  [ -z "${BERTH_KUBE_DIR:-}" ] || "$CONTROL_PLANE" down
  rm -rf "$WORK"
}
take_lab_id() { # a number no living run has; suites that are run by themselves take theirs from 100 on
  for LAB_ID in $(seq 10 60); do
    exec 9>"${TMPDIR:-/tmp}/berth-lab-$LAB_ID.lock"
    flock -n 9 && { LAB_DIR=/var/lib/berth-lab-$LAB_ID; export LAB_ID LAB_DIR; return; }
  done
  echo "run: no free number for a lab" >&2; exit 1
}
start_servers() { # in the background: cargo builds meanwhile
  ( "$CONTROL_PLANE" up || exit 1 ) >"$WORK/kube.log" 2>&1 9>&- &
  kube=$!
  ( "$LAB" down && "$LAB" up || exit 1 ) >"$WORK/lab.log" 2>&1 9>&- &
  lab=$!
}
wait_servers() {
  wait $kube || { echo "run: the control plane did not start:"; tail -n 5 "$WORK/kube.log"; failed=$((failed + 1)); }
  wait $lab || { echo "run: the lab did not start:"; tail -n 5 "$WORK/lab.log"; failed=$((failed + 1)); }
}
sum() { # of all result lines: passed, failed, skipped
  awk '/^test result:/ {for (i = 1; i < NF; i++) {if ($(i+1) ~ /^passed/) p += $i; if ($(i+1) ~ /^failed/) f += $i; if ($(i+1) ~ /^ignored/) s += $i}}
    END {print p + 0, f + 0, s + 0}' "$1"
}

if [ $# = 0 ]; then "$HERE/lint.sh" || failed=$((failed + 1)); fi
servers=1
if reason=$("$LAB" check) && reason=$("$CONTROL_PLANE" check); then
  take_lab_id; export BERTH_LAB_DIR=$LAB_DIR BERTH_KUBE_DIR=$KUBE_DIR; start_servers
else
  echo "run: suites with real servers are skipped: $reason"; servers=0
fi
targets=() words=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do targets+=("$1"); shift; done
words=("$@"); [ ${#targets[@]} -gt 0 ] || targets=(--workspace)
built=1
cargo build --quiet --package berth --bin berth 9>&- && cargo test --quiet "${targets[@]}" --no-run 9>&- || { failed=$((failed + 1)); built=0; }
[ $servers = 0 ] || wait_servers
if [ $built = 1 ]; then
  BERTH_BIN=${CARGO_TARGET_DIR:-$PWD/target}/debug/berth; export BERTH_BIN
  cargo test --no-fail-fast "${targets[@]}" "${words[@]}" 9>&- 2>&1 | tee "$LOG"
  status=${PIPESTATUS[0]}
  read -r p f s < <(sum "$LOG")
  # a suite that crashed prints no result
  [ "$status" = 0 ] || [ "$f" != 0 ] || f=1
  passed=$p failed=$((failed + f)) skipped=$s
fi
echo
echo "${passed:-0} passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
