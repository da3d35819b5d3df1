# The two commands are `make demo` and `make test`; both install what they miss (Debian 12 or 13, as root).
export PATH := $(HOME)/.cargo/bin:/usr/local/go/bin:$(PATH)

.PHONY: help demo test bench lint deps

help:
	@echo "make demo    see a container move between two Incus servers (KEEP=1 leaves everything running)"
	@echo "make test    all checks and suites; ARGS='--test harness -- word' for some of them"
	@echo "make bench   moves by Berth beside moves by hand; writes docs/benchmarks.md"
	@echo "make lint    formatting, clippy, licences"
	@echo "make deps    install what the others need"

demo:
	@tests/deps.sh demo
	@tests/lab/demo.sh

test: deps
	@tests/run.sh $(ARGS)

bench: deps
	@cargo bench --quiet --package berth-tests

lint:
	@tests/lint.sh

deps:
	@tests/deps.sh
