# The two commands a newcomer needs are `make demo` and `make test`; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests start hundreds of processes. Where this is set each of them compiles torch and transformers anew, for 9 seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check wheel clean

help: ## list what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(STAMP) ## make .venv and install everything into it (quick when nothing changed)

# pip 25.1 is the first that reads [dependency-groups]; the stamp is written last, so a broken install is redone. Python
# compiles what is imported when it is, which is a small part of what there is.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "make: could not create .venv; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1,<27'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable . --group dev
	@touch $@

demo: setup ## plan, train, evaluate, generate, benchmark, and write the PDF report (under 10 minutes on 2 cores)
	@$(BIN)/python benchmarks/demo.py

test: setup ## run every test, files side by side on two cores, and at the end those that need the machine alone
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40 -m "not alone"
	$(BIN)/python -m pytest -m alone --durations=5 tests/bench

test-fast: setup ## run the tests that take a moment
	$(BIN)/python -m pytest -m "not slow"

check: setup ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: setup ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove what make made (runs/ stays)
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
