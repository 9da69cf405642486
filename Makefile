# cloison's commands. Each does nothing when nothing has changed; `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PREFIX ?= /usr/local
DESTDIR ?=
# One static executable, which runs on any distribution.
TARGET := x86_64-unknown-linux-gnu
STATIC := CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"
LINKS := cloison-runtime containerd-shim-cloison-v2

.PHONY: help setup setup-run setup-test build cloison kernel initramfs demo test lint bench conformance fuzz install uninstall clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup:
	@packaging/setup build

setup-run: setup
	@packaging/setup run

setup-test: setup-run
	@packaging/setup test

build: cloison kernel initramfs ## Build the product into dist/

cloison: setup
	$(STATIC) cargo build --release --locked --target $(TARGET) -p cloison
	@mkdir -p dist
	@cmp -s target/$(TARGET)/release/cloison dist/cloison || install -m 755 target/$(TARGET)/release/cloison dist/cloison
	@for link in $(LINKS); do ln -sfn cloison "dist/$$link"; done

kernel: setup
	@guest-kernel-config/build dist/vmlinux

initramfs: setup
	@agent/initramfs dist/initramfs

demo: setup-run build ## Run a real container image in a microVM
	@tests/demo

test: setup-test build ## Pass all tests
	@tests/all

lint: setup ## Check formatting, lints and licences
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny --offline check bans licenses sources; else echo "lint: cargo-deny is not installed; skipped"; fi

bench: setup-test build ## Measure what docs/benchmarks.md states
	@tests/bench/run

conformance: setup-test build ## Run the OCI runtime validation suite
	@tests/conformance/run

fuzz: setup ## Fuzz each target for a minute (FUZZ_SECONDS)
	@tests/fuzz/run

install: build ## Install below PREFIX (/usr/local)
	install -D -m 755 dist/cloison $(DESTDIR)$(PREFIX)/bin/cloison
	@for link in $(LINKS); do ln -sfn cloison "$(DESTDIR)$(PREFIX)/bin/$$link"; done
	install -D -m 644 dist/vmlinux $(DESTDIR)$(PREFIX)/lib/cloison/vmlinux
	install -D -m 644 dist/initramfs $(DESTDIR)$(PREFIX)/lib/cloison/initramfs

uninstall: ## Remove what install installed
	rm -f $(DESTDIR)$(PREFIX)/bin/cloison $(foreach link,$(LINKS),$(DESTDIR)$(PREFIX)/bin/$(link))
	rm -rf $(DESTDIR)$(PREFIX)/lib/cloison

clean: ## Remove what was built here
	cargo clean
	rm -rf dist
