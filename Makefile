# The two commands are `make demo` and `make test`; both install what they miss (Debian 12 or 13, as root).
export PATH := $(HOME)/.cargo/bin:/usr/local/go/bin:$(PATH)

.PHONY: help demo test bench lint deps deps-vms static

help:
	@echo "make demo    see a container move between two Incus servers (KEEP=1 leaves everything running);"
	@echo "             GITOPS=flux or GITOPS=argo: from a Git commit, with the real Flux or Argo CD"
	@echo "make test    all checks and suites; ARGS='--test harness -- word' for some of them"
	@echo "make bench   moves by Berth beside moves by hand; writes docs/benchmarks.md"
	@echo "make lint    formatting, clippy, licences"
	@echo "make static  the program as the image holds it, static and stripped: target/image/berth"
	@echo "make deps    install what the others need"

demo:
	@tests/deps.sh demo
	@tests/lab/demo.sh

test: deps deps-vms
	@tests/run.sh $(ARGS)

bench: deps deps-vms
	@cargo bench --quiet --package berth-tests

lint:
	@tests/lint.sh

deps:
	@tests/deps.sh

# where virtual machines cannot be had, their suites are skipped and say so
deps-vms: deps
	@tests/lab/lab.sh deps-vms || true

MUSL := $(shell uname -m)-unknown-linux-musl
static:
	@command -v musl-gcc >/dev/null || { echo "musl-gcc is missing: apt-get install musl-tools"; exit 1; }
	@rustup target add $(MUSL)
	@CC_$(subst -,_,$(MUSL))=musl-gcc cargo build --quiet --release --package berth --bin berth --target $(MUSL)
	@mkdir -p target/image && cp target/$(MUSL)/release/berth target/image/berth
	@ldd target/image/berth 2>&1 | grep -Eq 'statically linked|not a dynamic executable' || { echo "target/image/berth is not static"; exit 1; }
	@stat -c %s target/image/berth | awk '{printf "target/image/berth: %.1f MB\n", $$1 / 1e6} $$1 > 24.5e6 {print "that is too large: an image is to be at most 25 MB with its certificates"; exit 1}'
