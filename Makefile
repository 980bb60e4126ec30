# make demo   set up, train the built-in stream, show the tree and the scores
# make test   set up, install what the tests need, run them
# make mutate break the code in many places, and see that the tests notice
# make check  ruff, format and types, as CI does
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= run
BIN    := $(VENV)/bin

.PHONY: demo install test test-slow mutate check clean

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
	$(BIN)/python -m pip install --quiet -e '.[deepspeed]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

mutate: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py --jobs 2

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
