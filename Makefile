# The same commands a person types and CI runs. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH  := 2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-torch-$(TORCH)
# TensorRT-RTX builds engines on a machine without a GPU; its packages exist for Linux on x86-64.
comma  := ,
RTX    := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' '-')),$(comma)rtx)
# One thread a process: the suite runs two processes. Each takes its tests as they stand, so that what a file builds once is built once.
TESTS  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p xdist -n 2 --dist worksteal

# A folder of goldens for the method tests: make test TMC_GOLDENS=DIR. Without it a subset in the repository is used.
ifdef TMC_GOLDENS
export TMC_GOLDENS
endif
# The demo's bundle, where it has been built, is verified by the packaging check.
TMC_BUNDLE ?= $(wildcard out/quickstart)
export TMC_BUNDLE

.PHONY: help setup demo test test-all lint types docs cli-reference methods-table package clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

setup: $(STAMP) ## make .venv and install the project in it, editable, with all that building and testing needs

# torch comes first and alone, so that pip takes a CPU build where its index offers one.
$(STAMP): pyproject.toml tools/tensorrt_stubs.py
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "building needs Python 3.11 or later, $(PYTHON) is %d.%d: make setup PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q -e '.[export,dev$(RTX)]'
	$(BIN)/python tools/tensorrt_stubs.py
	@touch $@

demo: $(STAMP) ## build the quickstart bundle and ask it about pictures
	$(BIN)/python examples/demo.py

test: $(STAMP) ## the quick test suite
	$(TESTS)

test-all: $(STAMP) ## the slow proofs as well
	$(TESTS) -m ""

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict; what is asked of TensorRT against tensorrt-stubs
	$(BIN)/mypy

docs: $(STAMP) ## the CLI reference and the table of methods are current, the documents are true, every >>> example runs
	$(BIN)/python tools/generate_cli_reference.py --check
	$(BIN)/python tools/generate_methods_table.py --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_docs.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --doctest-modules --import-mode=importlib tmc_export tools

cli-reference: $(STAMP) ## write docs/cli.md
	$(BIN)/python tools/generate_cli_reference.py

methods-table: $(STAMP) ## write docs/methods.md
	$(BIN)/python tools/generate_methods_table.py

package: $(STAMP) ## sdist, wheel from it, bare environment, Python 3.10
	$(BIN)/python tools/check_packaging.py

clean: ## remove what the targets made, .venv included
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
