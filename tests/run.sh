#!/bin/bash
# run.sh - all checks and suites, or with arguments those that `cargo test` selects by them: run.sh --test harness -- word
# Everything is built as one workspace: for single packages cargo would build the dependencies anew, with other features.
# Suites run side by side in lanes (LANES, default 3, one more than a small machine has cores, or 1 for chosen suites); a lane has a control plane and servers of its own, which its suites share and
# which end with this script. Suites spend most of their time waiting for servers. The last line is the sum of all.
set -u
HERE=$(cd "$(dirname "$0")" && pwd); cd "$HERE/.." || exit 1
CONTROL_PLANE=$HERE/kubernetes/control-plane.sh LAB=$HERE/lab/lab.sh
WORK=$(mktemp -d); failed=0 lanes=${LANES:-1}
trap 'end' EXIT
trap 'exit 130' INT TERM HUP

end() {
  trap '' INT TERM HUP
  local lane; for lane in "$WORK"/lane-*; do [ ! -e "$lane/env" ] || (. "$lane/env"; "$LAB" down; "$CONTROL_PLANE" down) 2>/dev/null; done
  rm -rf "$WORK"
}
make_lane() { # NUMBER: takes a lab number that no living run has; suites that are run by themselves take theirs from 100 on
  local id lane=$WORK/lane-$1; mkdir "$lane"
  for id in $(seq 10 60); do
    eval "exec $((10 + $1))>\"${TMPDIR:-/tmp}/berth-lab-$id.lock\""
    if flock -n $((10 + $1)); then
      printf 'export LAB_ID=%s LAB_DIR=/var/lib/berth-lab-%s KUBE_DIR=%s/kube\n' "$id" "$id" "$lane" >"$lane/env"
      return
    fi
  done
  echo "run: no free number for a lab" >&2; exit 1
}
close_locks() { local n; for n in $(seq $lanes); do eval "exec $((10 + n))>&-"; done; } # in children: they would keep the lock
start_lane() { # in the background: cargo builds meanwhile
  ( close_locks; . "$WORK/lane-$1/env"; "$CONTROL_PLANE" up ) >"$WORK/lane-$1/kube.log" 2>&1 & echo $! >"$WORK/lane-$1/kube.pid"
  ( close_locks; . "$WORK/lane-$1/env"; "$LAB" down && "$LAB" up ) >"$WORK/lane-$1/lab.log" 2>&1 & echo $! >"$WORK/lane-$1/lab.pid"
}
wait_lane() { # a lane without servers runs nothing: the others do its part
  local what; for what in kube lab; do
    wait "$(cat "$WORK/lane-$1/$what.pid")" ||
      { { echo "run: without lane $1: the $what did not start:"; tail -n 20 "$WORK/lane-$1/$what.log"; } | tee -a "$WORK/notes"; return 1; }
  done
  echo 'export BERTH_LAB_DIR=$LAB_DIR BERTH_KUBE_DIR=$KUBE_DIR' >>"$WORK/lane-$1/env"
}
sum() { # of all result lines: passed, failed, skipped
  awk '/^test result:/ {for (i = 1; i < NF; i++) {if ($(i+1) ~ /^passed/) p += $i; if ($(i+1) ~ /^failed/) f += $i; if ($(i+1) ~ /^ignored/) s += $i}}
    END {print p + 0, f + 0, s + 0}' "$@"
}
next_suite() { # takes the first line off the queue
  flock "$WORK/lock" bash -c 'head -n 1 "$1"; sed -i 1d "$1"' _ "$WORK/queue"
}
run_suite() { # NAME PROGRAM FOLDER: output as one piece, when it is over; a suite that crashed prints no result and counts as failed
  local began=$SECONDS out=$WORK/log-$1 yields=0
  case $1 in crash|crash_copies|*_sim) yields=10 ;; esac # time is simulated there
  (cd "$3" && nice -n $yields "$2" ${words[@]+"${words[@]}"}) >"$out" 2>&1 || grep -q '^test result:.*[1-9][0-9]* failed' "$out" || echo "test result: FAILED. 0 passed; 1 failed; 0 ignored (it crashed)" >>"$out"
  flock "$WORK/lock" bash -c 'echo; echo "---- $1 ($2 s)"; grep -v "^$" "$3"' _ "$1" $((SECONDS - began)) "$out"
}
lane() { # NUMBER: runs suites until there are no more
  close_locks; . "$WORK/lane-$1/env"
  local name program folder; while read -r name program folder < <(next_suite) && [ -n "$name" ]; do
    run_suite "$name" "$program" "$folder"
    # a daemon that crashed is told, also where no test failed of it
    [ ! -s "$LAB_DIR/ends" ] || { sed "s/^/note: in $name: /" "$LAB_DIR/ends" >>"$WORK/notes"; : >"$LAB_DIR/ends"; }
  done
}
queue() { # the programs that cargo built: NAME PROGRAM FOLDER, those that take longest first, so that no lane ends long after the others
  local order="crashes copies vms crash criu contract modes matrix moves warm late quiet rights apiserver guard overrides changes"
  grep '"overflow_checks":[a-z]*,"test":true' "$WORK/built" | sed -n 's/.*"manifest_path":"\([^"]*\)\/Cargo.toml".*"kind":\["\([^"]*\)"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\2 \3 \4 \1/p' |
    while read -r kind name program folder; do [ "$kind" = test ] || name=$name-$kind; echo "$name $program $folder"; done |
    awk -v order="$order" 'BEGIN {n = split(order, o); for (i = 1; i <= n; i++) at[o[i]] = i} {print ($1 in at ? at[$1] : n + 1), $0}' | sort -s -n | cut -d' ' -f2-
}

failures() { # for each test that failed: the suite, the test, and what it said, in less room the more there are of them
  local log room=$((2400 / (failed > 0 ? failed : 1)))
  for log in "$WORK"/log-*; do
    awk -v suite="${log##*/log-}" -v room="$((room > 200 ? room : 200))" '
      function tell() { gsub(/[[:space:]]+/, " ", said); if (name != "") print "FAILED " suite ": " name ":" substr(said, 1, room); name = said = "" }
      /^test result: FAILED.*it crashed/ {print "FAILED " suite ": " last}
      /^---- .* ----$/ {tell(); name = $0; gsub(/^---- | (stdout )?----$/, "", name); next}
      /^(failures:|test result:.*)$/ {tell()}
      name != "" && !/^thread .* panicked/ {said = said " " substr($0, 1, room / 2)}
      {if ($0 != "") last = $0}' "$log"
  done
}

targets=() words=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do targets+=("$1"); shift; done
[ $# = 0 ] || { shift; words=("$@"); }
[ ${#targets[@]} -gt 0 ] || { "$HERE/lint.sh" || failed=$((failed + 1)); targets=(--tests); lanes=${LANES:-3}; }
reason=$("$LAB" check) && reason=$("$CONTROL_PLANE" check) && reason=""
[ -z "$reason" ] || { echo "run: suites with real servers are skipped: $reason"; lanes=1; }
for n in $(seq $lanes); do make_lane "$n"; [ -n "$reason" ] || start_lane "$n"; done
cargo build --quiet --workspace --lib --bins "${targets[@]}" --message-format=json-render-diagnostics >"$WORK/built" || { failed=$((failed + 1)); : >"$WORK/built"; }
queue >"$WORK/queue"; : >"$WORK/lock"
able=""; for n in $(seq $lanes); do [ -z "$reason" ] && ! wait_lane "$n" || able="$able $n"; done
BERTH_BIN=${CARGO_TARGET_DIR:-$PWD/target}/debug/berth; export BERTH_BIN
lane_pids=""; for n in $able; do lane "$n" & lane_pids="$lane_pids $!"; done
# shellcheck disable=SC2086
[ -z "$able" ] || wait $lane_pids
left=$(wc -l <"$WORK/queue"); [ "$left" = 0 ] || { echo "FAILED: $left suites did not run"; failed=$((failed + left)); }
: >"$WORK/log-none"; read -r passed f skipped < <(sum "$WORK"/log-*)
failed=$((failed + f))
echo; failures; cat "$WORK/notes" 2>/dev/null
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
