# On a fresh machine use make run and make test. make help lists all targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOP := $(VENV)/.installed-dev
DOCUMENT := $(VENV)/.installed-docs
# As the command `finetune`, which `make install` puts beside it.
FINETUNE := $(BIN)/python -m flows
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := true

.PHONY: help install run test test-slow fuzz soak check docs format parameters bench up down doctor deploy worker watch rollback sample report compare export clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The first interpreter of a supported version; PYTHON=... chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)

# What is coming and how large it is, is said first. TORCH_INDEX=cpu, pypi or an address chooses PyTorch's build.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: install one, or name it with PYTHON=..."; exit 1; }
	@$(PYTHON) .ci/install.py $(VENV)
	@touch $@

# The developers' tools come with the first target that needs them.
$(DEVELOP): $(INSTALLED)
	@$(BIN)/python .ci/install.py $(VENV) dev
	@touch $@

$(DOCUMENT): $(INSTALLED)
	@$(BIN)/python .ci/install.py $(VENV) docs
	@touch $@

install: $(INSTALLED) ## Create or update .venv from the pinned constraints, if they have changed

run: $(INSTALLED) ## Fine-tune the embedded tiny GPT-2; ARGS="epochs=1" changes parameters
	@$(FINETUNE) run $(ARGS)

# Two to four processes; the tests of a file stay in one, as many share a server.
test: $(DEVELOP) ## Run the tests
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(DEVELOP) ## Run the tests that need real servers or minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

fuzz: $(DEVELOP) ## Fuzz all that is read, for about an hour; EXAMPLES=1000 for minutes
	FINETUNE_FUZZ_EXAMPLES=$(or $(EXAMPLES),5000) $(BIN)/python -m pytest -k fuzz $(ARGS)

soak: export PYTHONPATH := .:tests/helpers
soak: $(DEVELOP) ## Kill servers, worker and runs 50 times over a training and three nights, and compare; ARGS="--seed 1"
	$(BIN)/python -m soak $(ARGS)

check: $(DEVELOP) ## Check lint, format, types, and the pinned versions for known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit.py

bench: $(INSTALLED) ## Compare the training speed with other trainers; ARGS="--data rows --tokenizer DIR --size 355m"
	$(FINETUNE) bench $(ARGS)

parameters: $(INSTALLED) ## Write the tables of docs/parameters.md
	$(BIN)/python -m flows.job docs/parameters.md

docs: $(DOCUMENT) ## Build the pages into site/, and fail on a broken link
	$(BIN)/python .ci/docs.py

format: $(DEVELOP) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ifdef SECURE
up: export FINETUNE_SECURE := $(SECURE)
endif
up: $(INSTALLED) ## Start Prefect, MLflow, a worker and the watcher, until Ctrl-C; SECURE=1 requires a password
	@exec $(FINETUNE) up

down: $(INSTALLED) ## End make up, or the processes that a crash left behind
	@exec $(FINETUNE) down

doctor: $(INSTALLED) ## Check limits, leases, locks, states and processes; ARGS=--fix repairs them
	@$(FINETUNE) doctor $(ARGS)

deploy: $(INSTALLED) ## Set up the Prefect server of PREFECT_API_URL, if make up did not start it
	@exec $(FINETUNE) deploy

worker: $(INSTALLED) ## Start a worker on another machine, for the servers of PREFECT_API_URL and MLFLOW_TRACKING_URI
	@exec $(FINETUNE) worker

watch: $(INSTALLED) ## Start the watcher beside such a worker: it closes the runs of processes that died on this machine
	@exec $(FINETUNE) watch

rollback: $(INSTALLED) ## Make the previous champion champion again: SIZE=355m
	@test -n "$(SIZE)" || { echo "which size? make rollback SIZE=355m"; exit 2; }
	@$(FINETUNE) rollback $(SIZE)

# The prompt is passed on unexpanded: make would expand a dollar sign.
sample: override export PROMPT := $(value PROMPT)
sample: $(INSTALLED) ## Prompt the latest tuned model: PROMPT="..."
	@$(FINETUNE) sample $(ARGS) -- "$$PROMPT"

export: $(INSTALLED) ## Take a model out of MLflow: MODEL=models:/NAME@champion DIR=...; ARGS="--push USER/NAME --gguf FILE"
	@test -n "$(MODEL)" || { echo "which model? make export MODEL=models:/gpt2-code-355m@champion DIR=..."; exit 2; }
	@$(FINETUNE) export $(if $(DIR),--directory "$(DIR)") $(ARGS) -- "$(MODEL)"

report: $(INSTALLED) ## Write the report of a finished run: RUN=<id, models:/NAME/1 or models:/NAME@champion>
	@test -n "$(RUN)" || { echo "which run? make report RUN=<run id>, RUN=models:/NAME/VERSION or RUN=models:/NAME@ALIAS"; exit 2; }
	@$(FINETUNE) report $(ARGS) -- "$(RUN)"

compare: $(INSTALLED) ## Compare two runs or versions: A=... B=... as RUN of make report; ARGS="--html FILE" also writes a page
	@test -n "$(A)" -a -n "$(B)" || { echo "which runs? make compare A=<run id> B=<run id>, or models:/NAME/VERSION, models:/NAME@ALIAS"; exit 2; }
	@$(FINETUNE) compare $(ARGS) -- "$(A)" "$(B)"

clean: ## Delete .venv; keeps all results
	rm -rf $(VENV)
