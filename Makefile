# `make demo` does the main job, `make test` passes the tests; each needs Python 3.11 and pip alone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow test-lowest check format docs clean

setup: .venv/.ready

# requirements.txt pins everything; pip finds the CPU build of torch where an index offers it.
.venv/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/personae demo --out runs/demo

test: setup
	$(BIN)/pytest -n 2

# Some fifty architectures, packed, rebuilt and merged: minutes.
test-slow: setup
	$(BIN)/pytest -n 2 -m slow

# The lowest versions that pyproject.toml allows, in an environment of their own: a large download.
test-lowest:
	$(PYTHON) scripts/lowest_versions.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pyright -p tests
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tables in docs/ of methods, parameters and options.
docs: setup
	$(BIN)/python scripts/write_docs.py

clean:
	rm -rf .venv runs
