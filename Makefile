# flea: what a person types. Everything lands under $(TARGET); nothing outside it is touched, but by install.
#
# make            the release programs
# make demo       see it work: a small real model, streamed and resident, then line rate on a synthetic one
# make test       every test, also against stock llama.cpp (fetched and built on the first run)
# make help       all targets

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
CARGO ?= cargo
CMAKE ?= cmake
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
CAPI := $(TARGET)/capi
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# Two libraries of one soname agree in their ABI; the file name carries the release.
SONAME := libflea.so.0
LIBRARY := libflea.so.$(VERSION)

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
MANDIR ?= $(PREFIX)/share/man
DOCDIR ?= $(PREFIX)/share/doc/flea
# systemd, systemd-sysusers and their like look below /usr/local/lib as well as /usr/lib.
SYSTEMDDIR ?= $(PREFIX)/lib
# flead reads /etc/flea/flead.toml; an installation into a place of its own keeps to that place.
SYSCONFDIR ?= $(if $(filter /usr /usr/local,$(PREFIX)),/etc,$(PREFIX)/etc)
DESTDIR ?=

.PHONY: build lib ggml-flea header examples test demo install uninstall fmt clippy clean help
.DEFAULT_GOAL := build

build: ## the release programs: $(TARGET)/release/{flea,flead,flea-ctl}
	$(CARGO) build --release --locked

# A build of its own: libflea must never contain ggml, and the two must not overwrite each other's libflea.rlib.
# cargo's own name for the result is libflea.so; programs ask for the soname at run time, so it gets its links here.
# CUDA=1: with weights on GPUs. Nothing of CUDA is needed to build, and it runs without.
lib: ## the C library (CUDA=1: also for GPUs): $(CAPI)/lib/{libflea.so*,libflea.a,pkgconfig/flea.pc}, $(CAPI)/include/flea.h
	$(CARGO) rustc --lib --locked --release --no-default-features $(if $(CUDA),--features cuda) --crate-type cdylib,staticlib --target-dir $(CAPI)/cargo -- -C link-arg=-Wl,-soname,libflea.so.0
	@mkdir -p $(CAPI)/lib/pkgconfig $(CAPI)/include # copied only when different: hosts need no new link then
	@install -C -m 755 $(CAPI)/cargo/release/libflea.so $(CAPI)/lib/$(LIBRARY)
	@install -C -m 644 $(CAPI)/cargo/release/libflea.a $(CAPI)/lib/libflea.a
	@install -C -m 644 include/flea.h $(CAPI)/include/flea.h
	@ln -sf $(LIBRARY) $(CAPI)/lib/$(SONAME)
	@ln -sf $(SONAME) $(CAPI)/lib/libflea.so
	@scripts/flea-pc.sh $(VERSION) $(CAPI) $(CAPI)/lib $(CAPI)/include > $(CAPI)/lib/pkgconfig/flea.pc

ggml-flea: lib ## the ggml device for a llama.cpp: make ggml-flea LLAMA_CPP=<source directory> [CUDA=1]
	@test -n "$(LLAMA_CPP)" || { echo "usage: make ggml-flea LLAMA_CPP=<llama.cpp source directory>" >&2; exit 2; }
	$(CMAKE) -S ffi-examples/ggml-flea -B $(TARGET)/ggml-flea/build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CPP=$(abspath $(LLAMA_CPP)) \
	  -DFLEA_INCLUDE=$(CAPI)/include -DFLEA_LIB=$(CAPI)/lib/libflea.a -DOUTPUT_DIR=$(TARGET)/ggml-flea
	$(CMAKE) --build $(TARGET)/ggml-flea/build
	@ls $(TARGET)/ggml-flea/libggml-flea.so

header: ## writes include/flea.h anew from the sources
	FLEA_BLESS=1 $(CARGO) test --locked --no-default-features --test header

examples: lib ## the C and C++ hosts of ffi-examples: $(TARGET)/examples
	$(CMAKE) -S ffi-examples -B $(TARGET)/examples -DFLEA_INCLUDE=$(CAPI)/include -DFLEA_LIB=$(CAPI)/lib/libflea.so
	$(CMAKE) --build $(TARGET)/examples

test: ## every test
	scripts/test.sh

demo: ## runs the model in assets/ and a synthetic one; under a minute after the first build
	scripts/demo.sh

install: build lib ## into $(DESTDIR)$(PREFIX); libggml-flea.so too if it was built
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(INCLUDEDIR) $(DESTDIR)$(DOCDIR)
	install -m 755 $(TARGET)/release/flea $(TARGET)/release/flead $(TARGET)/release/flea-ctl $(DESTDIR)$(BINDIR)
	install -m 755 $(CAPI)/lib/$(LIBRARY) $(DESTDIR)$(LIBDIR)/$(LIBRARY)
	ln -sf $(LIBRARY) $(DESTDIR)$(LIBDIR)/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(LIBDIR)/libflea.so
	install -m 644 $(CAPI)/lib/libflea.a $(DESTDIR)$(LIBDIR)/libflea.a
	install -m 644 include/flea.h $(DESTDIR)$(INCLUDEDIR)/flea.h
	scripts/flea-pc.sh $(VERSION) $(PREFIX) $(LIBDIR) $(INCLUDEDIR) > $(DESTDIR)$(LIBDIR)/pkgconfig/flea.pc
	install -D -m 644 -t $(DESTDIR)$(MANDIR)/man1 docs/flea.1 docs/flea-ctl.1
	install -D -m 644 -t $(DESTDIR)$(MANDIR)/man5 docs/flead.toml.5
	install -D -m 644 -t $(DESTDIR)$(MANDIR)/man8 docs/flead.8
	install -D -m 644 -t $(DESTDIR)$(SYSTEMDDIR)/systemd/system systemd/flead.service systemd/flead.socket
	for kind in sysusers.d tmpfiles.d sysctl.d; do install -D -m 644 -t $(DESTDIR)$(SYSTEMDDIR)/$$kind systemd/$$kind/*.conf; done
	sed -i 's|/usr/local/bin|$(BINDIR)|' $(DESTDIR)$(SYSTEMDDIR)/systemd/system/flead.service
	install -D -m 644 systemd/examples/gpu.conf $(DESTDIR)$(DOCDIR)/examples/gpu.conf
	install -D -m 644 systemd/flead.toml $(DESTDIR)$(DOCDIR)/examples/flead.toml
	[[ -e $(DESTDIR)$(SYSCONFDIR)/flea/flead.toml ]] || install -D -m 644 systemd/flead.toml $(DESTDIR)$(SYSCONFDIR)/flea/flead.toml
	install -D -m 644 docs/protocol.md $(DESTDIR)$(DOCDIR)/protocol.md
	install -m 644 README.md ARCHITECTURE.md CHANGELOG.md LICENSE LICENSE-MIT LICENSE-APACHE $(DESTDIR)$(DOCDIR)
	if [[ -f $(TARGET)/ggml-flea/libggml-flea.so ]]; then install -m 755 $(TARGET)/ggml-flea/libggml-flea.so $(DESTDIR)$(LIBDIR)/; fi

uninstall: ## takes away what install put there, but not $(SYSCONFDIR)/flea
	rm -f $(DESTDIR)$(BINDIR)/{flea,flead,flea-ctl} $(DESTDIR)$(LIBDIR)/{$(LIBRARY),$(SONAME),libflea.so,libflea.a,libggml-flea.so,pkgconfig/flea.pc}
	rm -f $(DESTDIR)$(INCLUDEDIR)/flea.h $(DESTDIR)$(MANDIR)/{man1/flea.1,man1/flea-ctl.1,man5/flead.toml.5,man8/flead.8}
	rm -f $(DESTDIR)$(SYSTEMDDIR)/{systemd/system/flead.{service,socket},{sysusers,tmpfiles}.d/flea.conf,sysctl.d/60-flea.conf}
	rm -rf $(DESTDIR)$(DOCDIR)

fmt: ## formats the Rust sources
	$(CARGO) fmt

clippy: ## what .ci/run asks of the Rust sources
	$(CARGO) clippy --locked --no-default-features --all-targets -- -D warnings
	$(CARGO) clippy --locked --release --all-targets -- -D warnings
	$(CARGO) clippy --locked --release --all-features --all-targets -- -D warnings

clean: ## deletes everything that was built here
	rm -rf $(TARGET)

help: ## this text
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | sed 's/\$$(TARGET)/target/g; s/\$$(CAPI)/target\/capi/g; s/\$$(DESTDIR)\$$(PREFIX)/DESTDIR PREFIX/; s/\$$(SYSCONFDIR)/SYSCONFDIR/' | awk -F'\t' '{ printf "  %-10s %s\n", $$1, $$2 }'
