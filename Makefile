# make run and make test set up everything they need, in .venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# which of benchmarks/*.py `make bench` runs
NAME ?= sparse_attention

.PHONY: run test test-slow fuzz check format bench clean

run: $(VENV)/installed
	$(BIN)/python run_recbole_mm.py --model=MUFASA $(or $(ARGS),--epochs=12)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -n auto -m "not slow" $(ARGS)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow $(ARGS)

fuzz: $(VENV)/installed-test
	$(BIN)/python -m tests.data.test_fuzz_readers $(ARGS)

check: $(VENV)/installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit -q -r recbole_mm run_recbole_mm.py
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$(NAME).py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# one stamp for each set of packages: pip runs again only when what it would install changed
$(VENV)/installed: $(VENV)/bin/python setup.cfg constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e .[test]
	@touch $@

$(VENV)/installed-check: $(VENV)/installed-test
	$(BIN)/python -m pip install -q -c constraints.txt -e .[test,check]
	@touch $@
