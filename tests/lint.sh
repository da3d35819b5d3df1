#!/bin/bash
# lint.sh - formatting, clippy without a warning, licences and sources of dependencies. `make test` begins with it.
cd "$(dirname "$0")/.." || exit 1
bad=0
check() { local what=$1; shift; if "$@"; then echo "lint: $what: ok"; else echo "lint: $what: FAILED"; bad=1; fi; }
check "formatting" cargo fmt --all --check
check "clippy" cargo clippy --quiet --workspace --all-targets -- -D warnings
check "shell syntax" bash -n tests/*.sh tests/lab/*.sh tests/lab/vms/*.sh tests/kubernetes/*.sh tests/gitops/*.sh .ci/run
if [ ! -e deny.toml ]; then :
elif command -v cargo-deny >/dev/null; then check "dependencies" cargo deny --offline check bans licenses sources
else echo "lint: dependencies: skipped, cargo-deny is not installed"; fi
exit $bad
