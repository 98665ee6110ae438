# The two commands of a fresh machine: make run, make test. The others are listed by make help.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Trainings at a time, for the limit that make deploy creates.
GPUS ?= 1
# Where Prefect's server listens; 0.0.0.0 lets other machines in, and everybody on the network.
HOST ?= 127.0.0.1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := true

.PHONY: help install run test test-slow check format bench prefect-server mlflow-server worker doctor deploy rollback sample clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The first interpreter in range; PYTHON=... chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: install one, or name it with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(INSTALLED) ## Create .venv from the pinned constraints, if something changed

run: $(INSTALLED) ## Fine-tune the embedded tiny GPT-2; ARGS="epochs=1" changes parameters
	@$(BIN)/python -m flows $(ARGS)

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(INSTALLED) ## Run the tests that need real servers or minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(INSTALLED) ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED) ## Training speed beside others; ARGS="--data rows --tokenizer gpt2 --size 355m"
	$(BIN)/python -m bench.train $(ARGS)

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Leases on disk, so that a restart of the server loses no slot; UI v2 loads settings from an outside service.
prefect-server: export PREFECT_HOME := $(CURDIR)/.data/server/prefect
prefect-server: export PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE := prefect.server.concurrency.lease_storage.filesystem
prefect-server: export PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS := 2
prefect-server: export PREFECT_SERVER_UI_V2_ENABLED := false
prefect-server: export PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT := false
prefect-server: $(INSTALLED) ## Start Prefect's server on port 4200 of HOST
	@mkdir -p $(PREFECT_HOME)
	env -u PREFECT_API_URL $(BIN)/prefect server start --host $(HOST) --port 4200

mlflow-server: $(INSTALLED) ## Start MLflow's server on 127.0.0.1:5000, as mlflow/server.env says
	$(BIN)/mlflow --env-file mlflow/server.env server

worker: export PREFECT_API_URL ?= http://127.0.0.1:4200/api
worker: export MLFLOW_TRACKING_URI ?= http://127.0.0.1:5000
worker: $(INSTALLED) ## Start a worker, which runs what is deployed
	$(BIN)/prefect worker start --pool gpu

doctor: export PREFECT_API_URL ?= http://127.0.0.1:4200/api
doctor: export MLFLOW_TRACKING_URI ?= http://127.0.0.1:5000
doctor: $(INSTALLED) ## Compare limits, leases, locks, states and processes; ARGS=--fix mends
	@$(BIN)/python -m ops.doctor $(ARGS)

# Without a server, prefect would start one for each command and deploy to nobody.
deploy: export PREFECT_SERVER_ALLOW_EPHEMERAL_MODE := false
deploy: $(INSTALLED) ## Create work pool, gpu limit and all deployments on the server of PREFECT_API_URL
	@$(BIN)/prefect work-pool ls >/dev/null 2>&1 || { \
		echo "No Prefect server answers at PREFECT_API_URL ($${PREFECT_API_URL:-not set}): start one, then"; \
		echo "  export PREFECT_API_URL=http://127.0.0.1:4200/api"; exit 1; }
	$(BIN)/prefect work-pool inspect gpu >/dev/null 2>&1 || $(BIN)/prefect work-pool create gpu --type process
	$(BIN)/prefect gcl update tag:gpu --limit $(GPUS) >/dev/null 2>&1 || $(BIN)/prefect gcl create tag:gpu --limit $(GPUS)
	$(BIN)/prefect --no-prompt deploy --all

rollback: $(INSTALLED) ## Make the champion before the present one champion again: SIZE=355m
	@$(BIN)/python -m ops.rollback $(SIZE)

# As it was typed: make would expand a dollar sign.
sample: override export PROMPT := $(value PROMPT)
sample: $(INSTALLED) ## Prompt the latest tuned model: PROMPT="..."
	@$(BIN)/python -m ops.sample $(ARGS) -- "$$PROMPT"

clean: ## Delete .venv, but no results
	rm -rf $(VENV)
