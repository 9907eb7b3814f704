PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/tested.txt
# For example PYTEST_FLAGS="-n 2 -x", BENCH_FLAGS="--json out.json".
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

# The tests import bench/ and train/ too, so one environment serves both commands.
INSTALLED := $(VENV)/.installed
LINT_INSTALLED := $(VENV)/.installed-lint
SETUP := setup.py scripts/make_venv.py $(wildcard constraints/*.txt)

.PHONY: test bench gpu-evidence lint format clean

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

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks

$(INSTALLED): $(SETUP)
	$(PYTHON) scripts/make_venv.py $(VENV) --extras test,bench,train --constraints $(CONSTRAINTS)
	touch $@

$(LINT_INSTALLED): $(INSTALLED)
	$(PYTHON) scripts/make_venv.py $(VENV) --extras test,bench,train,lint --constraints $(CONSTRAINTS)
	touch $@
