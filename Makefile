# Everything starts here: `make demo` and `make test` set themselves up, in .venv and nowhere else.
#
#   make test ARGS="-k masks -x"        hands ARGS to pytest; likewise for demo, bench, gpu-test, gpu-bench, check, check-all
#   make setup PYTHON=python3.12        makes .venv with another Python (>= 3.10)
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup       torch without CUDA, much smaller

PYTHON ?= python3
ARGS ?=
WORKERS ?= auto

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTEST := $(PY) -m pytest -n $(WORKERS) --maxprocesses=4 --dist=worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test gpu-test check check-all lint bench bench-masks gpu-bench aot clean

help:  ## print this list
	@awk -F ':.*## +' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install everything for development (the other targets do it by themselves)

demo: $(STAMP)  ## draw digits by diffusion, by every backend that this machine can run
	@$(VENV)/bin/heedful demo $(ARGS)

# Each worker is a process: one thread each, or they fight over the cores.
test gpu-test check check-all: export OMP_NUM_THREADS ?= 1

test: $(STAMP)  ## run the tests, without the slow proofs
	@$(PYTEST) -m "not slow" $(ARGS)

gpu-test: $(STAMP)  ## run the contract on the GPU here, and write benchmarks/results/<device>/contract.json
	@$(PYTEST) tests/gpu tests/kernels/on_device --record benchmarks/results -m "gpu and not slow" $(ARGS)

check: lint  ## ruff, mypy and the tests without the slow proofs: what CI runs
	@$(PYTEST) -m "not slow" $(ARGS)

check-all: lint  ## check, with the slow proofs
	@$(PYTEST) $(ARGS)

lint: $(STAMP)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

bench: BENCHMARKS := overhead routing import_time guard regret
bench-masks: BENCHMARKS := padding masks lowerings
gpu-bench: BENCHMARKS := kernels

bench: $(STAMP)  ## measure what calls cost, and what auto's choices lose and win (ARGS="--quick" tries it)
bench-masks: $(STAMP)  ## measure what padding, masks and rewrites cost
gpu-bench: $(STAMP)  ## measure our own kernels beside every other backend on the GPU here, and write kernels.json
bench bench-masks gpu-bench:
	@status=0; for name in $(BENCHMARKS); do $(PY) benchmarks/$$name.py $(ARGS) || status=1; done; exit $$status

aot: $(STAMP)  ## compile our own kernels for GPUs that are not here: registers, shared memory, spills
	@$(PY) benchmarks/aot.py $(ARGS)

clean:  ## remove caches and builds (.venv stays: rm -rf .venv removes it)
	@rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The stamp holds the folder it was made in: in a checkout that moved, the editable install points at the old one.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

# Written last, so an install that was killed goes on with the next make. pip alone would take the newest torch, and
# with it gigabytes: always under the constraints.
$(STAMP): pyproject.toml constraints.txt
	@$(PY) -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || { \
	    $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	        echo "heedful needs Python >= 3.10, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	             "Name another one: make PYTHON=python3.12" >&2; exit 1; }; \
	    echo "making $(VENV) with $$($(PYTHON) --version)" && $(PYTHON) -m venv --clear $(VENV); }
	@echo "setting up $(VENV): a few minutes, once"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install -qq -c constraints.txt -e '.[dev]' || { \
	    echo "set-up failed; the next make goes on from here. To start afresh: rm -rf $(VENV)" >&2; exit 1; }
	@echo '$(CURDIR)' > $@
