# Everything here sets itself up on a machine that has Python 3.11 or later and pip: `make demo`, `make test`.
#
#   make test TORCH_INDEX=<url>     take torch from another index, for example one with CPU-only wheels
#   make test PYTHON=python3.12     the Python that .venv is made with

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test lint type format install clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# One thread per product: the models of the tests are so small that a second one costs more than it brings.
test: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(INSTALLED)

# torch comes first and alone, so that only torch is looked up in TORCH_INDEX; the second line installs what torch needs.
# pip is upgraded because the one that comes with Python 3.11 does not know `--group`.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps $(TORCH)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[serve,train,evaluate,baselines,signals,monitor,rank,harness,plot]" --group dev
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
