# `make demo` and `make test` do everything, on a machine with nothing but Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
DIST := .venv-dist
BENCH := .venv-bench
SCRIPTS := natural total memory verdict chain finite_chain posterior overhead grid finite

.PHONY: demo test test-slow lint types unit notebooks docs pictures dist bench clean

$(READY): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,test]"
	touch $@

$(BENCH)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

demo: $(READY)
	$(BIN)/python tutorials/cholesterol.py

test: lint types unit notebooks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy --strict tests/typed_use.py

unit: $(READY)
	$(BIN)/pytest -n auto -m "not slow"

test-slow: $(READY)
	$(BIN)/pytest -m slow

notebooks: $(READY)
	$(BIN)/python tests/run_notebooks.py

$(VENV)/.docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/.docs  # into build/docs/index.html
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs build/docs

pictures: $(READY)  # those of the documentation, drawn again
	$(BIN)/python docs/pictures/draw_all.py

$(DIST)/.installed: constraints.txt
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	touch $@

# What would be published, each installed where there is nothing else, and used there
dist: $(READY) $(DIST)/.installed
	rm -rf dist
	$(BIN)/pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir dist .
	for made in dist/*.whl dist/*.tar.gz; do \
		$(DIST)/bin/pip uninstall --quiet --yes pyro_macro; \
		$(DIST)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $$made \
		&& $(DIST)/bin/python -I tests/installed.py || exit 1; \
	done

bench: $(BENCH)/.installed
	for script in $(SCRIPTS); do $(BENCH)/bin/python benchmarks/$$script.py || exit 1; done
	$(BENCH)/bin/torchrun --standalone --nproc_per_node=4 benchmarks/sharded.py
	$(BENCH)/bin/python benchmarks/report.py

clean:
	rm -rf $(VENV) $(BENCH) $(DIST) build dist docs/tutorials *.egg-info \
		.pytest_cache .mypy_cache .ruff_cache
