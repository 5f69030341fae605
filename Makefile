# Needs Python 3.11 or newer with venv, and make. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: .venv/.demo ## run the whole system in one command (ARGS="--port 8001 --ephemeral" to change it)
	@exec $(BIN)/orders demo $(ARGS)

.PHONY: test
test: .venv/.dev ## run every test, on real servers; installs servers with apt where it may (ARGS="-k outbox")
	@scripts/install-servers
	@$(BIN)/pytest $(ARGS)

.PHONY: test-unit
test-unit: .venv/.dev ## run the tests that need no server
	@$(BIN)/pytest tests/unit $(ARGS)

.PHONY: test-contract
test-contract: .venv/.dev ## run one suite against the partner sandbox and the clients alike
	@$(BIN)/pytest tests/contract $(ARGS)

.PHONY: test-integration
test-integration: .venv/.dev ## run each component on real servers
	@scripts/install-servers
	@$(BIN)/pytest tests/integration $(ARGS)

.PHONY: test-e2e
test-e2e: .venv/.dev ## run whole services, killed and started again
	@scripts/install-servers
	@$(BIN)/pytest tests/e2e $(ARGS)

.PHONY: verify
verify: .venv/.dev ## check style, types, architecture and generated files
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/generate_docs.py --check

.PHONY: generate
generate: .venv/.dev ## bring the generated files up to date
	@$(BIN)/python scripts/generate_docs.py

.PHONY: requirements
requirements: .venv/.dev ## pin the newest versions that pyproject.toml allows
	@$(BIN)/uv pip compile --quiet --upgrade $(COMPILE) --group dev --output-file requirements/dev.txt
	@$(BIN)/uv pip compile --quiet --upgrade $(COMPILE) --group build --constraint requirements/dev.txt --output-file requirements/demo.txt

COMPILE := pyproject.toml --extra demo --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-find-links --no-emit-index-url

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
