# make demo   set up, train the built-in stream, show the tree and the scores
# make test   set up, install what the tests need, run them
# make check  ruff, format and types, as CI does
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= run
BIN    := $(VENV)/bin

.PHONY: demo install test test-slow check clean

demo: install
	$(BIN)/treelora train-stream --run-dir $(RUN)
	$(BIN)/treelora tree show $(RUN)
	$(BIN)/treelora report $(RUN)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(BIN)/python
	$(BIN)/python -m pip install --quiet .

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
