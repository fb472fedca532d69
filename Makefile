# `make demo` and `make test` do everything, on a machine with nothing but Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-slow lint types unit notebooks bench clean

$(READY): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,test]"
	touch $@

demo: $(READY)
	$(BIN)/python tutorials/cholesterol.py

test: lint types unit notebooks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/pytest -m slow

notebooks: $(READY)
	$(BIN)/python tests/run_notebooks.py

bench: $(READY)
	$(BIN)/python benchmarks/natural.py
	$(BIN)/python benchmarks/finite.py
	$(BIN)/python benchmarks/verdict.py
	$(BIN)/python benchmarks/chain.py
	$(BIN)/python benchmarks/posterior.py
	$(BIN)/torchrun --standalone --nproc_per_node=4 benchmarks/sharded.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
