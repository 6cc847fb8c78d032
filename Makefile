# Every target works alone on a fresh clone: it makes .venv and installs what it needs.
# PIP_ARGS adds options to pip, such as --extra-index-url https://download.pytorch.org/whl/cpu for torch's CPU build.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
READY := .venv/ready
DEV_READY := .venv/ready-dev

.PHONY: setup demo test test-all bench lint clean

setup: $(DEV_READY)

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch first, at its pin: what other packages ask for is then satisfied and fetches no other build.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	touch $@

$(DEV_READY): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/danube demo

test: $(DEV_READY)
	$(BIN)/python -m pytest

test-all: $(DEV_READY)
	$(BIN)/python -m pytest -m 'not gpu'

bench: $(DEV_READY)
	$(BIN)/python -m tests.benchmarks

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv
