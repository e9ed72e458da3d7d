# The commands of this repository. `make demo` and `make test` work on a bare machine
# with python3.11 or newer; everything is installed into .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests beside each other, a file of them in one process, the longest first (tests/conftest.py); each
# with one thread, as the cores are taken.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all check format clean help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# uv resolves and installs in parallel; bytecode is compiled once here, because every Ray process
# would otherwise compile torch and ray again at its start.
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --requirement requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: $(READY)  ## sample collection -> pseudo labels -> CorLoc -> pictures (WEIGHTS=FILE for another ViT)
	$(BIN)/python jobs/demo.py $(if $(WEIGHTS),--weights $(WEIGHTS))

test: $(READY)  ## the whole test suite but the slow tests (JOBS=4: four at a time)
	$(PYTEST) -m "not slow"

test-slow: $(READY)  ## the slow tests alone
	$(PYTEST) -m slow

test-all: test test-slow  ## both

check: $(READY)  ## formatting, lint, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the demo and the tools left (not .venv)
	rm -rf demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
