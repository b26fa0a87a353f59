# Needs Python 3.11 or newer and make; everything else goes into .venv, once.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 4
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# One thread a worker; two workers more than cores, as tests of ranks and kills wait much of their time.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# Benchmarks of what another run leaves, one of 50 GB, and a part of another one.
APART := compress_large planted_faults ep_calibrate ep_demo pretrain_tiny prune_large prune_ranking prune_trends replay_check stun_two_stages

.DEFAULT_GOAL := help
.PHONY: help install lint format test test-all test-engines demo bench docs serve-docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

# torch goes first and alone: it is by far the largest, and what follows finds it there and takes no other build.
$(VENV)/.run: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once, up to three minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e '.[demo,eval]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "adding what tests and checks need"
	@$(PIP) -e '.[dev,docs]'
	@touch $@

install: $(VENV)/.dev ## set up .venv with everything

lint: $(VENV)/.dev ## ruff, format check, mypy --strict, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(VENV)/.dev ## all tests but the slow ones
	$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not full"

test-all: $(VENV)/.dev ## all tests, the slow ones too
	$(THREADS) $(BIN)/python -m pytest -n $(WORKERS)

demo: $(VENV)/.run ## the whole way on a real model: runs/demo/report.html
	$(BIN)/moekit run recipes/c2r-demo.yaml

# vLLM pins another transformers: it gets an environment of its own, some 2 GB.
.venv-vllm/.run: tests/engines/vllm.txt tests/engines/vllm-needs.txt
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0
	@.venv-vllm/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r tests/engines/vllm.txt
	@.venv-vllm/bin/python -m pip install -qq --disable-pip-version-check -r tests/engines/vllm-needs.txt
	@touch $@

test-engines: $(VENV)/.dev .venv-vllm/.run ## what moekit writes, in vLLM and in llama.cpp, which is compiled first
	$(PIP) -e '.[engines,export]'
	$(THREADS) $(BIN)/python -m pytest tests/engines tests/unit/exporting

bench: $(VENV)/.dev ## every benchmark that needs no run before it and no 50 GB of disk
	@for file in $(filter-out $(APART:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do \
	  echo "== $$file"; $(BIN)/python $$file || exit 1; done

docs: $(VENV)/.dev ## build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

serve-docs: $(VENV)/.dev ## the documentation at a local address
	$(BIN)/mkdocs serve

clean: ## remove what make made (the download cache and runs/ stay)
	rm -rf $(VENV) .venv-vllm site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
