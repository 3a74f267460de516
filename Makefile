# `make train` needs Python >= 3.11 and make, nothing else: it creates .venv here and trains the default model.

.DEFAULT_GOAL := help
.PHONY: help env train test lint types format clean
SHELL := /bin/bash

# The first interpreter that is new enough and can create an environment.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
  if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
  echo "$$p"; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
CONFIG ?= configs/quickstart.yaml
# The quickstart is in fp32, which a GPU of compute capability 8.0 or newer is faster without.
FOR_GPU := $(if $(filter configs/quickstart.yaml,$(CONFIG)),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
  awk -F. 'NR == 1 && $$1 >= 8 { print "--bf16 true" }'))
export DS_BUILD_OPS := 0
export PIP_REQUIRE_VIRTUALENV := 1

help:
	@echo "make train    create .venv, train the default model (CONFIG=..., ARGS='--max_steps 10 ...')"
	@echo "make test     run the tests (ARGS='-k ...')"
	@echo "make lint     ruff format --check, ruff check, lint-imports"
	@echo "make types    mypy --strict"
	@echo "make format   write the format"
	@echo "make clean    remove .venv and caches"

env: $(READY)

# Without an NVIDIA driver the CPU build of torch is taken if some index has it: the default one brings gigabytes of
# CUDA. Bytecode is not compiled at installation: most of it is never imported. An environment whose creation was
# interrupted is made again.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 with venv found: install one, or write PYTHON=/path/to/python" >&2; exit 1; }
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --upgrade -c constraints.txt pip
	command -v nvidia-smi >/dev/null || \
	  $(PIP) install --quiet --no-compile --no-deps --retries 1 --extra-index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu" || \
	  echo "make: no CPU build of torch $(TORCH) found, the default build is taken"
	$(PIP) install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

# On its own, `accelerate launch` gives a process one thread. Threads that wait for each other sleep: spinning, as is the
# default, makes a step several times slower where anything else runs on the machine.
train: $(READY)
	HF_HUB_DISABLE_TELEMETRY=1 OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} \
	  $(BIN)/accelerate launch --quiet --config_file configs/accelerate/single.yaml \
	  launchers/train.py --config $(CONFIG) $(FOR_GPU) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info build
