# Needs Python 3.11 or newer with venv, and make. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets; times are those of an idle machine with 2 cores, once everything is installed
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: .venv/.demo ## run the whole system in one command, with a page that breaks it (ARGS="--port 8002 --ephemeral" to change it)
	@exec $(BIN)/orders demo $(ARGS)

.PHONY: up
up: ## build and start everything in containers, and wait until it is ready (ARGS="--profile scale --profile obs")
	@$(TRACES) docker compose $(ARGS) up --detach --build --wait
	@echo "API http://localhost:$${ORDERS_PORT:-8000}/docs  sandbox http://localhost:$${SANDBOX_PORT:-9000}/docs"

# With the profile `obs` there is a collector, so the service sends traces to it.
TRACES := $(if $(filter obs,$(ARGS)),OTEL_EXPORTER_OTLP_ENDPOINT=$${OTEL_EXPORTER_OTLP_ENDPOINT:-http://otel-collector:4318})

.PHONY: down
down: ## stop the containers; the data stays in its volumes (VOLUMES=1 removes it)
	@docker compose --profile "*" down $(if $(VOLUMES),--volumes)

URL ?= http://127.0.0.1:8000

.PHONY: load
load: .venv/.demo ## load a running service (URL=http://127.0.0.1:8000) and judge it (ARGS="--orders 10000 --rate 100")
	@$(BIN)/orders load $(URL) $(ARGS)

.PHONY: chaos
chaos: .venv/.dev .servers ## send orders while everything is killed, frozen and disconnected, and judge (ARGS="--orders 300"; 10,000: 5 minutes)
	@$(BIN)/python -m chaos.runner $(ARGS)

.PHONY: sweep
sweep: .venv/.dev .servers ## kill the service, the janitor and the commands at every point of their way, and check that all recovers (under an hour; ARGS="--every 15")
	@$(BIN)/python -m chaos.sweep $(ARGS)

.PHONY: planted-bugs
planted-bugs: .venv/.dev .servers ## plant known bugs in a copy, one at a time, and check that a test catches each (5 minutes; ARGS="--only fencing")
	@$(BIN)/python -m chaos.bugs $(ARGS)

.PHONY: bench
bench: .venv/.dev .servers ## measure the service beside floors and peers, as ratios (20 minutes; ARGS="--only accept": 1 minute)
	@$(BIN)/python -m bench $(ARGS)

.PHONY: profile
profile: .venv/.dev .servers ## draw where the processor time of an order goes, in bench-report
	@$(BIN)/python -m bench.profile $(ARGS)

.PHONY: test
test: .venv/.dev .servers ## run every test, on real servers; installs them with apt where it may (many minutes; ARGS="-k outbox")
	@$(BIN)/pytest $(ARGS)

# The model of sagas takes as long as half of the rest, so it is left to `make test-unit`.
FAST := tests/unit tests/contract --deselect tests/unit/saga/test_saga_model.py --quiet

.PHONY: test-fast
test-fast: .venv/.dev ## run most tests that need no server (50 s)
	@$(BIN)/pytest $(FAST) $(ARGS)

.PHONY: coverage
coverage: .venv/.dev ## report the branch coverage of test-fast; fails below the number in pyproject.toml (50 s)
	@$(BIN)/pytest $(FAST) --cov --cov-report=term $(ARGS)

.PHONY: test-unit
test-unit: .venv/.dev ## run the tests of functions and classes, without servers (40 s)
	@$(BIN)/pytest tests/unit $(ARGS)

.PHONY: test-pythons
test-pythons: .venv/.dev ## run the unit tests on each Python from 3.11 up that is on this machine (1 minute each)
	@scripts/test-pythons $(ARGS)

.PHONY: test-contract
test-contract: .venv/.dev ## run one suite against the partner sandbox and the clients alike (40 s)
	@$(BIN)/pytest tests/contract $(ARGS)

.PHONY: test-integration
test-integration: .venv/.dev .servers ## run each component on real servers (minutes)
	@$(BIN)/pytest tests/integration $(ARGS)

.PHONY: test-e2e
test-e2e: .venv/.dev .servers ## run whole services, killed and started again (minutes)
	@$(BIN)/pytest tests/e2e $(ARGS)

.PHONY: verify
verify: .venv/.dev ## check style, types, architecture and generated files (10 s; the first time 2 minutes)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m scripts.generate_docs --check
	@$(BIN)/python scripts/check_monitoring.py
	@$(BIN)/hadolint Dockerfile deploy/edge/Dockerfile
	@if docker compose version >/dev/null 2>&1; then docker compose --profile "*" config --quiet; \
		else echo "docker compose is not installed: docker-compose.yml was not checked"; fi

.PHONY: fmt
fmt: .venv/.dev ## format the code, and fix what ruff can fix (1 s)
	@$(BIN)/ruff format --quiet
	@$(BIN)/ruff check --fix --quiet

.PHONY: generate
generate: .venv/.dev ## update the generated files (5 s)
	@$(BIN)/python -m scripts.generate_docs

.PHONY: screenshots
screenshots: .venv/.dev ## make the pictures of the console and the playground in docs/images (1 minute)
	@scripts/install-servers chromium-headless-shell
	@$(BIN)/python -m scripts.screenshots

.PHONY: requirements
requirements: .venv/.dev ## pin the newest versions that pyproject.toml allows
	@$(COMPILE) --upgrade --extra demo --group dev --output-file requirements/dev.txt
	@$(COMPILE) --extra demo --group build --constraint requirements/dev.txt --output-file requirements/demo.txt
	@$(COMPILE) --constraint requirements/dev.txt --output-file requirements/runtime.txt
	@$(COMPILE:pyproject.toml=) --group build --constraint requirements/dev.txt --output-file requirements/build.txt

COMPILE := $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-annotate --no-emit-find-links --no-emit-index-url

# Tests start servers of their own: in containers where there is an engine for them, else as processes; PgBouncer,
# Prometheus and the browser always as processes; libfaketime and libfiu are loaded into some.
.PHONY: .servers
.servers: .venv/.dev
	@if $(BIN)/python -m tests.harness.containers --pull; then \
		scripts/install-servers pgbouncer libfaketime fiu-utils prometheus chromium-headless-shell; \
		else scripts/install-servers; fi

.venv/.dev: requirements/dev.txt pyproject.toml
	@echo "Installing the development environment into .venv ..."
	$(INSTALL)

.venv/.demo: requirements/demo.txt pyproject.toml
	@echo "Installing the demo into .venv ..."
	$(INSTALL)

# The project itself is built without isolation: its build backend is among the pinned requirements.
define INSTALL
@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")'
@test -x $(BIN)/python || $(PYTHON) -m venv .venv
@$(PIP) install --require-hashes --requirement $<
@$(PIP) install --no-deps --no-build-isolation --editable .
@touch $@
endef
