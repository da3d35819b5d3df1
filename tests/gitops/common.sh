# common.sh - what flux.sh and argo.sh share: programs that are built once into the cache folder, and processes. To be sourced.
# The cache folder is that of the control plane, ${XDG_CACHE_HOME:-~/.cache}/berth-kube.
# shellcheck shell=bash
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONTROL_PLANE=$HERE/../kubernetes/control-plane.sh
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/berth-kube

log() { echo "$(basename "$0" .sh): $*" >&2; }
die() { log "ERROR: $*"; exit 1; }

#---------------------------------------------------------------- build
# A small program of our own is kept under the checksum of its sources: who changes it builds it anew.
own() { echo "$CACHE/$1-$(cat "$HERE/$2"/* | sha256sum | cut -c1-12)"; } # NAME FOLDER
GIT_SERVER=$(own git-server git-server)
go_build() { # MODULE-FOLDER PROGRAM PACKAGE [LDFLAGS]
  [ ! -x "$2" ] || return 0
  : "${GO:=$("$CONTROL_PLANE" find-go)}"; [ -n "$GO" ] || exit 1
  log "building $(basename "$2")"
  mkdir -p "$(dirname "$2")"
  # under another name first: a build that was interrupted leaves nothing that looks complete
  (cd "$1" && CGO_ENABLED=0 GOTOOLCHAIN=auto "$GO" build -mod=readonly -trimpath -ldflags "-s -w ${4:-}" -o "$2.new" "$3") && mv "$2.new" "$2"
}
module_dir() { # MODULE-FOLDER MODULE: where go keeps the module's sources
  (cd "$1" && GOTOOLCHAIN=auto "${GO:=$("$CONTROL_PLANE" find-go)}" list -mod=readonly -m -f '{{.Dir}}' "$2")
}
build_git_server() { go_build "$HERE/git-server" "$GIT_SERVER" .; }

#---------------------------------------------------------------- run
# DIR is the folder of a running set of processes; it is on their command lines or in their environment, and tells them from others.
kubectl() { "$("$CONTROL_PLANE" programs)/kubectl" "$@"; }
established() { # KUBECTL-ARGS: waits for definitions; kubectl fails on one so new that it has no conditions yet
  local i; for i in $(seq 20); do kubectl wait --for=condition=Established --timeout=30s "$@" >/dev/null 2>&1 && return; sleep 0.2; done
  die "the definitions are not accepted: $*"
}
launch() { # NAME CMD...: in a session of its own, so that ^C at the terminal does not end it before its user
  local name=$1; shift
  BERTH_RUN_DIR=$DIR setsid "$@" </dev/null >>"$DIR/$name.log" 2>&1 & echo $! >"$DIR/$name.pid"
}
runs() { local p; p=$(cat "$DIR/$1.pid" 2>/dev/null) && [ -e "/proc/$p" ] && ! grep -q '^State:.*Z' "/proc/$p/status"; }
stop() { # NAME
  local p; p=$(cat "$DIR/$1.pid" 2>/dev/null) || return 0
  # a pid that an earlier life of this machine wrote down may be somebody else's by now
  if grep -qzxF "BERTH_RUN_DIR=$DIR" "/proc/$p/environ" 2>/dev/null; then
    kill -KILL "$p" 2>/dev/null || true; for _ in $(seq 200); do runs "$1" || break; sleep 0.05; done
  fi
  rm -f "$DIR/$1.pid"
}
is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
free_ports() { # COUNT: the first of so many free ones in a row
  local p i; for _ in $(seq 50); do
    p=$((12000 + RANDOM % 780 * 10))
    for i in $(seq 0 $(($1 - 1))); do is_free $((p + i)) || continue 2; done
    echo "$p"; return
  done; die "no free ports"
}
until_true() { # SECONDS WHAT NAME CMD...: waits for a condition while the process NAME runs
  local end=$((SECONDS + $1)) what=$2 name=$3; shift 3
  until "$@" >/dev/null 2>&1; do
    runs "$name" || { tail -n 5 "$DIR/$name.log" >&2; die "$name ended; see $DIR/$name.log"; }
    [ $SECONDS -lt "$end" ] || { tail -n 5 "$DIR/$name.log" >&2; die "waited in vain: $what; see $DIR/$name.log"; }
    sleep 0.1
  done
}
git_server_up() { # repositories in $DIR/git/NAME.git, URL in $DIR/git.url
  mkdir -p "$DIR/git"
  launch git "$GIT_SERVER" "$DIR/git" "$DIR/git.url"
  until_true 10 "the Git server" git test -s "$DIR/git.url"
}
answers() { curl -s -m 2 -o /dev/null "$1"; }
check_dir() { case $DIR in /*/*) ;; *) die "the folder must be one of its own, not '$DIR'";; esac; }
