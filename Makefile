# `make demo` and `make test` set everything up by themselves: a virtual environment, pinned versions, an install.
#
#   PYTHON=python3.12 make test    another interpreter (3.11 to 3.13)
#   TORCH=torch==2.11.0 make test  another torch (2.11 to 2.14; `make clean` first)
#   KP_USE_SYSTEM=1 make demo      no virtual environment: the torch that $(PYTHON) has, for machines with a GPU
#   ARGS="-k mask" make test       more arguments for pytest, the demo or the benchmark

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test lint format types bench readme build clean system

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
NUM_WORKERS ?= 2
CONSTRAINTS := .ci/constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu

ifeq ($(KP_USE_SYSTEM),1)
PY := $(PYTHON)
BASE := system
DEMO := system
TEST := system
else
PY := $(VENV)/bin/python
BASE := $(VENV)/.base
DEMO := $(VENV)/.demo
TEST := $(VENV)/.test
endif
PIP := $(PY) -m pip --disable-pip-version-check

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(DEMO)  ## run the main job: compile a transformers Llama with kp, report, check, plan or time
	@$(PY) -m kp_compiler.cli demo attention $(ARGS)

test: $(TEST)  ## run the tests
	$(PY) -m pytest -n $(NUM_WORKERS) $(ARGS)

lint: $(TEST)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(TEST)  ## let ruff format and fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# Type checkers can't follow the mapping of passes/ and lowering/ to kp_compiler.*, so they get a tree of links.
types: $(TEST)  ## mypy over kp_compiler, passes and lowering
	@rm -rf .types && mkdir -p .types/kp_compiler
	@ln -s $(addprefix ../../,$(filter-out %/__pycache__,$(wildcard kp_compiler/*)) passes lowering) .types/kp_compiler/
	cd .types && $(abspath $(PY)) -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p kp_compiler

bench: $(TEST)  ## whole models against their peers, into benchmarks/results (needs a GPU)
	$(PY) benchmarks/attention_models.py $(ARGS)
	$(PY) benchmarks/plots.py attention_models

readme: $(TEST)  ## fill the tables of README.md from the code and from benchmarks/results
	$(PY) benchmarks/readme_table.py $(ARGS)

build: $(TEST)  ## wheel and source archive into dist/
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) build
	$(PY) -m build

clean:  ## remove what make made
	rm -rf $(VENV) .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# ------------------------------------------------------------------------------------------------------------- set-up

ifeq ($(KP_USE_SYSTEM),1)

# The project is installed without its dependencies, if it is not yet; the rest is the machine's.
system:
	@$(PY) -c 'import torch' || { echo "KP_USE_SYSTEM=1 needs a $(PYTHON) that has torch" >&2; exit 1; }
	@$(PY) -P -c 'from importlib.metadata import version; version("kp-compiler")' 2> /dev/null || \
	  $(PIP) install --quiet --no-deps --no-build-isolation -e . || $(PIP) install --quiet --no-deps -e .

else

# A plain `torch` from PyPI brings gigabytes of CUDA libraries. Without an NVIDIA driver the CPU build is tried
# first: from the package indexes pip is configured with, then from PyTorch's own.
$(BASE):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  "kp needs Python 3.11 to 3.13, $(PYTHON) is %d.%d: set PYTHON=python3.12, for example" % v)'
	@$(PYTHON) -m venv --clear $(VENV) || { echo "no virtual environment could be made: install the venv module of \
	$(PYTHON) (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "installing $(TORCH) into $(VENV)"
	@if command -v nvidia-smi > /dev/null; then $(PIP) install $(TORCH); else \
	  $(PIP) install --quiet "$(TORCH)+cpu" 2> /dev/null || \
	  $(PIP) install --quiet --retries 1 --timeout 20 --index-url $(CPU_INDEX) "$(TORCH)+cpu" 2> /dev/null || \
	  $(PIP) install $(TORCH); fi
	$(PIP) install --quiet -c $(CONSTRAINTS) setuptools
	@touch $@

$(VENV)/.demo: $(BASE) pyproject.toml $(CONSTRAINTS)
	$(PIP) install --quiet --no-build-isolation -c $(CONSTRAINTS) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(BASE) pyproject.toml $(CONSTRAINTS)
	$(PIP) install --quiet --no-build-isolation -c $(CONSTRAINTS) -e '.[test]' ruff mypy matplotlib
	@touch $@ $(VENV)/.demo

endif
