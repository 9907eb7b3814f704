PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/tested.txt
# For example PYTEST_FLAGS="-n 2 -x", BENCH_FLAGS="--json out.json".
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

# The tests import bench/ and train/ too, so one environment serves both commands.
INSTALLED := $(VENV)/.installed
LINT_INSTALLED := $(VENV)/.installed-lint
DOCS_INSTALLED := $(VENV)/.installed-docs
SETUP := setup.py scripts/make_venv.py $(wildcard constraints/*.txt)

.PHONY: test bench gpu-evidence lint format docs clean

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

bench: $(INSTALLED)
	$(VENV)/bin/python bench/run.py $(BENCH_FLAGS)

# The GPU's own Python, not .venv: it is the one with a torch, a Triton and peers built for that GPU.
gpu-evidence:
	$(PYTHON) bench/gpu_evidence.py

lint: $(LINT_INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy $(wildcard copg_kernels bench train scripts)

format: $(LINT_INSTALLED)
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

# Into site/. A broken link or a name that is not there is an error.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks

$(INSTALLED): $(SETUP)
	$(PYTHON) scripts/make_venv.py $(VENV) --extras test,bench,train --constraints $(CONSTRAINTS)
	touch $@

$(LINT_INSTALLED): $(INSTALLED)
	$(PYTHON) scripts/make_venv.py $(VENV) --extras test,bench,train,lint --constraints $(CONSTRAINTS)
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(PYTHON) scripts/make_venv.py $(VENV) --extras test,bench,train,docs --constraints $(CONSTRAINTS)
	touch $@
