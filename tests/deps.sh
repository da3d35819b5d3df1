#!/bin/bash
# deps.sh - what building, `make test` and `make demo` need on Debian 12 or 13: compilers, the lab's packages, the control plane's programs,
# Flux and Argo CD.
# Quick where nothing is missing; `deps.sh demo` leaves out what only the suites need. Elsewhere than on Debian it says what to install.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
export PATH=$HOME/.cargo/bin:/usr/local/go/bin:$PATH DEBIAN_FRONTEND=noninteractive
RUST=1.95 # rust-version in Cargo.toml
what=${1:-}

die() { echo "deps: $*" >&2; exit 1; }
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; } # WANTED HAVE
candidate() { apt-cache policy "$1" 2>/dev/null | awk '/Candidate:/{print $2}'; }
updated=0
install() {
  [ "$(id -u)" = 0 ] || die "root is needed to install: $*"
  command -v apt-get >/dev/null || die "this is no Debian; please install what corresponds to: $*"
  [ $updated = 1 ] || { apt-get update -qq; updated=1; }
  # a server that comes with a package is not started
  local made=0; [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; made=1; }
  apt-get install -y -qq --no-install-recommends "$@" >&2; local status=$?
  [ $made = 0 ] || rm -f /usr/sbin/policy-rc.d
  [ $status = 0 ] || die "apt-get could not install: $*"
}
rust() {
  if command -v rustup >/dev/null; then # rust-toolchain.toml names the version
    rustup show active-toolchain >/dev/null 2>&1 || rustup toolchain install "$(sed -n 's/^channel = "\(.*\)"/\1/p' "$HERE/../rust-toolchain.toml")" --profile minimal -c rustfmt -c clippy ||
      die "rustup could not install the toolchain of rust-toolchain.toml"
    return
  fi
  command -v cargo >/dev/null && at_least $RUST "$(rustc --version | awk '{print $2}')" && return
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && { apt-get update -qq; updated=1; }
  if at_least $RUST "$(candidate rustc-web)"; then install rustc-web cargo-web rustfmt-web rust-web-clippy # Debian 12: kept new for browsers
  elif [ -n "$(candidate rustup | grep -v none)" ]; then install rustup; rust # Debian 13
  else die "Rust $RUST or later is needed: see https://rustup.rs"; fi
}
gitops() { [ "$what" = demo ] && echo "${GITOPS:-}" || echo flux argo; } # which are needed
gitops_built() { local tool; for tool in $(gitops); do "$HERE/gitops/$tool.sh" check >/dev/null || return 1; done; }
go() {
  "$HERE/kubernetes/control-plane.sh" check >/dev/null && gitops_built &&
    { [ "$what" = demo ] || "$HERE/kubernetes/control-plane.sh" check-tools >/dev/null; } && return
  "$HERE/kubernetes/control-plane.sh" find-go >/dev/null 2>&1 && return
  # shellcheck disable=SC1091
  local backports; backports=$(. /etc/os-release && echo "${VERSION_CODENAME:-}-backports")
  [ $updated = 1 ] || { apt-get update -qq; updated=1; }
  if at_least 1.21 "$(candidate golang-go | sed 's/.*://; s/~.*//')"; then install golang-go
  else install -t "$backports" golang-go; fi
}

for tool in cc:gcc make:make git:git curl:curl openssl:openssl flock:util-linux; do
  command -v "${tool%:*}" >/dev/null || missing="${missing:-} ${tool#*:}"
done
for tool in redis-server:redis-server gpg:gpg; do # Argo CD's
  case $(gitops) in *argo*) command -v "${tool%:*}" >/dev/null || missing="${missing:-} ${tool#*:}";; esac
done
# shellcheck disable=SC2086
[ -z "${missing:-}" ] || install $missing libc6-dev ca-certificates
rust
"$HERE/lab/lab.sh" deps || exit 1
[ "$what" = demo ] || "$HERE/lab/lab.sh" mkroot || echo "deps: suites with Incus 7 will be skipped" >&2
go
"$HERE/kubernetes/control-plane.sh" build || exit 1
[ "$what" = demo ] || "$HERE/kubernetes/control-plane.sh" build-tools || exit 1
for tool in $(gitops); do "$HERE/gitops/$tool.sh" build || exit 1; done
