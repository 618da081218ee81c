# All tasks of the project. `make` lists them; developers and CI run the same tasks.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

# Python 3.10 or newer. To choose another: make PYTHON3=python3.13 setup
PYTHON3 ?= python3
VENV := .venv
PROTO_VENV := .venv-proto
PYTHON := $(VENV)/bin/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# The folder of generated code. tests/project generates into another folder and compares.
GENERATED := generated
BASELINE := tests/project/api_baseline.binpb
PROTOS = $(shell find protos -name '*.proto' | sort)
# Extra arguments for the tool, for example: make test ARGS="-k watch"
ARGS ?=
# pytest-xdist runs more processes than cores, because most tests wait for a process. For a debugger: make test WORKERS=
WORKERS ?= --numprocesses 4 --dist worksteal

# Without the newer protoc of .venv-proto, whose code Debian's libraries do not fit.
SYSTEM_PATH := $(PATH)
export PATH := $(abspath $(VENV)/bin):$(abspath $(PROTO_VENV)/bin):$(PATH)

.PHONY: help
help: ## list the tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

# ---- run and test

.PHONY: run
run: $(VENV)/.base ## run a server from this checkout (make run ARGS="--listen 127.0.0.1:50052")
	exec $(VENV)/bin/jobstatus serve $(ARGS)

.PHONY: setup
setup: $(VENV)/.dev $(PROTO_VENV)/.tools ## install the development environments .venv and .venv-proto

.PHONY: test
test: $(VENV)/.dev ## run the tests, without slow tests and tests that build (under 5 minutes)
	$(PYTHON) -m pytest $(WORKERS) -m 'not slow and not proto and not wheel and not interop and not release' $(ARGS)

.PHONY: check
check: lint types imports test-all ## run everything that CI runs (about 15 minutes)

.PHONY: test-all
test-all: $(VENV)/.dev $(PROTO_VENV)/.tools node browser redis systemd prometheus ## run all tests except those of make interop and make release
	$(PYTHON) -m pytest $(WORKERS) -m 'not interop and not release' $(ARGS)

# examples/Makefile lists the packages that the examples in other languages need.
INTEROP_PACKAGES = $(shell $(MAKE) --silent --no-print-directory -C examples packages)

# The packages that tests/deploy needs.
DEPLOY_PACKAGES := haproxy nginx strace

.PHONY: interop
interop: $(VENV)/.dev node systemd ## run the tests that need compilers (Go, Java, Ruby, C++) or proxies; installs them
	@dpkg-query --show $(INTEROP_PACKAGES) >/dev/null 2>&1 || $(call apt-install,$(INTEROP_PACKAGES))
	@dpkg-query --show $(DEPLOY_PACKAGES) >/dev/null 2>&1 || $(call apt-install,$(DEPLOY_PACKAGES))
	$(PYTHON) $(PIP_INSTALL) --group proxies
	PATH="$(abspath $(VENV)/bin):$(SYSTEM_PATH)" $(PYTHON) -m pytest -m interop $(ARGS)

# For systemd-analyze only, which checks a unit without a systemd that runs.
.PHONY: systemd
systemd:
	@command -v systemd-analyze >/dev/null || $(call apt-install,systemd)

.PHONY: node
node:
	@command -v npm >/dev/null || $(call apt-install,nodejs npm)

.PHONY: browser
browser:
	@command -v chromium >/dev/null || $(call apt-install,chromium)

.PHONY: redis
redis:
	@command -v redis-server >/dev/null || $(call apt-install,redis-server)

.PHONY: prometheus
prometheus:
	@command -v promtool >/dev/null || $(call apt-install,prometheus)

.PHONY: screenshots
screenshots: $(VENV)/.dev browser ## make the pictures of the board in docs/
	$(PYTHON) -m tests.support.screenshots

.PHONY: recordings
recordings: $(VENV)/.dev ## record commands in a terminal for docs/recordings (ARGS=--draw: draw the recordings again)
	$(PYTHON) -m tests.support.recordings $(ARGS)

.PHONY: architecture
architecture: $(VENV)/.dev ## draw docs/architecture.svg from the import contract in pyproject.toml
	$(PYTHON) -m tests.support.architecture

FAULT_TESTS := tests/faults tests/verify/test_seeded_bugs.py \
	$(addprefix tests/stores/,postgres/test_outages.py postgres/test_restores.py sqlite/test_displacement.py)
FAULT_ROWS := build/faults.jsonl

.PHONY: faults
faults: $(VENV)/.dev ## run the fault tests at full length, and write docs/reliability.md (one to two hours)
	@dpkg-query --show faketime >/dev/null 2>&1 || $(call apt-install,faketime)
	$(PYTHON) $(PIP_INSTALL) --group proxies
	@mkdir -p build && rm -f $(FAULT_ROWS)
	$(PYTHON) -m pytest $(WORKERS) $(FAULT_TESTS) --full --fault-report $(FAULT_ROWS) $(ARGS) \
		&& result=0 || result=$$?; $(PYTHON) -m tests.support.fault_report $(FAULT_ROWS); exit $$result

.PHONY: test-native
test-native: $(VENV)/.dev ## run server, client, CLI, interop and fault tests with --transport native (under 10 minutes)
	JOBSTATUS_TEST_TRANSPORT=native $(PYTHON) -m pytest $(WORKERS) -m 'not slow and not interop and not release' \
		tests/server tests/client tests/cli tests/interop tests/faults $(ARGS)

.PHONY: bench
bench: $(VENV)/.bench ## compare with etcd, NATS, Redis, PostgreSQL and Celery; write BENCHMARKS.md (about 16 minutes)
	$(PYTHON) -m benchmarks $(ARGS)

# ---- check the code

.PHONY: lint
lint: $(VENV)/.dev ## check rules and format with ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

.PHONY: format
format: $(VENV)/.dev $(PROTO_VENV)/.tools ## format the code and the protos
	$(PYTHON) -m ruff check --fix-only .
	$(PYTHON) -m ruff format .
	buf format --write

.PHONY: types
types: $(VENV)/.dev ## check types with mypy, strict
	$(PYTHON) -m mypy

.PHONY: imports
imports: $(VENV)/.dev ## check the layers with import-linter
	lint-imports --no-logo

.PHONY: sync
sync: $(VENV)/.dev ## generate the sync client from the asyncio one
	$(PYTHON) tests/support/generate_sync.py

# ---- the API

.PHONY: proto
proto: $(PROTO_VENV)/.tools ## generate Python code, stubs and the descriptor set from protos/
	mkdir -p $(GENERATED)
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc --proto_path=protos --python_out=$(GENERATED) \
		--grpc_python_out=$(GENERATED) --mypy_out=quiet:$(GENERATED) --mypy_grpc_out=quiet:$(GENERATED) $(PROTOS)
	buf build --as-file-descriptor-set --output $(GENERATED)/jobstatus/v1/descriptor_set.binpb

.PHONY: proto-check
proto-check: $(VENV)/.dev $(PROTO_VENV)/.tools ## check that generated code is current; buf lint, format and breaking
	$(PYTHON) -m pytest -m proto $(ARGS)

.PHONY: clients
clients: $(VENV)/.dev node ## generate clients in Go, Java and TypeScript in build/clients; make interop runs them
	@dpkg-query --show $(INTEROP_PACKAGES) >/dev/null 2>&1 || $(call apt-install,$(INTEROP_PACKAGES))
	PATH="$(SYSTEM_PATH)" $(MAKE) --no-print-directory -C examples clients

.PHONY: baseline
baseline: $(PROTO_VENV)/.tools ## save the API as the baseline of buf breaking; once per release
	buf build --exclude-source-info --output $(BASELINE)

.PHONY: stored-databases
stored-databases: $(VENV)/.dev ## save the newest schemas as files that later versions must read; once per release
	$(PYTHON) -m tests.support.stored_databases

# ---- documentation

.PHONY: docs
docs: $(VENV)/.dev ## build the documentation site in build/site; warnings, such as broken links, are errors
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs --quiet build --strict

.PHONY: docs-serve
docs-serve: $(VENV)/.dev ## serve the documentation site on 127.0.0.1:8000, and build it again when a page changes
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs serve

# ---- package

# The time of the last commit in place of the clock's: the same commit gives the same bytes.
.PHONY: wheel
wheel: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
wheel: $(VENV)/.dev ## build sdist and wheel in dist/, reproducibly
	$(PYTHON) -m build --no-isolation --outdir dist

.PHONY: wheel-check
wheel-check: $(VENV)/.dev ## build the wheel, install it outside the checkout, and run it
	$(PYTHON) -m pytest -m wheel $(ARGS)

.PHONY: release
release: $(VENV)/.dev ## build and test what is published, in dist/ (docs/release.md; to try it: make release ARGS=--draft)
	rm -rf dist
	$(MAKE) --no-print-directory wheel
	$(PYTHON) $(PIP_INSTALL) --group release
	$(PYTHON) -m tests.support.release $(ARGS)
	$(PYTHON) -m pytest -m 'wheel or release' --built dist tests/project
	cd dist && sha256sum *

.PHONY: clean
clean: ## remove all files that these tasks created, except databases
	rm -rf $(VENV) $(PROTO_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- environments: one stamp file each; reinstalled if pyproject.toml changes

$(VENV)/.base: pyproject.toml | $(VENV)/.created
	$(PYTHON) $(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.created
	$(PYTHON) $(PIP_INSTALL) --editable '.[all]' --group dev
	$(PYTHON) $(PIP_INSTALL) --no-build-isolation --group grpcurl
	@touch $(VENV)/.base $@

# Redis is optional: without it, its columns are left out.
$(VENV)/.bench: $(VENV)/.dev
	$(PYTHON) $(PIP_INSTALL) --group bench
	@command -v redis-server >/dev/null || ( $(call apt-install,redis-server) ) || true
	@touch $@

$(PROTO_VENV)/.tools: pyproject.toml | $(PROTO_VENV)/.created
	$(PROTO_VENV)/bin/python $(PIP_INSTALL) --group proto
	@touch $@

# pip has --group since 25.1.
$(VENV)/.created $(PROTO_VENV)/.created: %/.created:
	@$(PYTHON3) -c 'import ensurepip, venv' 2>/dev/null || $(call apt-install,python3 python3-venv)
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'Python 3.10 or newer is required. Choose one: make PYTHON3=python3.13 setup' >&2; exit 1; }
	$(PYTHON3) -m venv $*
	$*/bin/python $(PIP_INSTALL) --upgrade 'pip>=25.1'
	@touch $@

# Installs Debian packages if run as root; otherwise fails and prints their names. In runlevel 1 no services start.
define apt-install
{ command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] || { echo 'Install these packages first: $(1)' >&2; exit 1; }; \
	apt-get -o DPkg::Lock::Timeout=300 --quiet update; \
	RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 --quiet --yes install $(1); }
endef
