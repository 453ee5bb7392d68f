# Every command of the project, on a machine with Python 3.11 or newer and nothing else:
#
#   make demo     train vanilla, minimum-time, the search and controls, print a table for each task, draw the pictures
#   make test     all tests, doctests included        make test WORKERS=0 ARGS="-k span -x" for some, in one process
#   make coverage lines and branches that the tests reach, an error below 95 %; a quarter of an hour
#   make mutation small defects in the core that the tests must find; two hours on one core
#   make lint     ruff: rules and format              make format   mends what it can
#   make types    mypy over the package
#   make docs     the documentation, warnings are errors: docs/_build/html/index.html
#   make bench    the cost beside a plain NeuralODE and a plain loop
#   make gpu      the same and more on a GPU, in eight minutes       make gpu ARGS="--tiny" rehearses on the CPU
#   make upstream the patches for torchdyn, tried on a copy of it: a table of its faults, without and with them
#   make span-patch  the learnable span and solver as a patch of torchdyn: torchdyn-span.patch; both need git
#   make release  sdist and wheel in dist/, each tried in a new environment; nothing is uploaded
#   make clean    removes caches and built pages      make distclean   the environment too
#
# The environment is made once, and installed again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= auto
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test coverage mutation lint format types docs bench gpu upstream span-patch release clean distclean

demo: $(VENV)/.test-installed
	$(BIN)/python -m torchdyn_mintime demo $(ARGS)

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Without the tutorials: their kernels are processes of their own, which are not measured.
coverage: $(VENV)/.test-installed
	$(BIN)/python -m pytest --cov --cov-branch --cov-fail-under=95 torchdyn_mintime tests $(ARGS)

mutation: $(VENV)/.test-installed
	$(PIP_INSTALL) 'cosmic-ray>=8.3'
	CI=1 OMP_NUM_THREADS=1 $(BIN)/python tests/mutation.py $(ARGS)

lint: $(VENV)/.test-installed
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

format: $(VENV)/.test-installed
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

types: $(VENV)/.test-installed
	$(BIN)/python -m mypy

docs: $(VENV)/.docs-installed
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html $(ARGS)

bench: $(VENV)/.test-installed
	$(BIN)/python -m torchdyn_mintime bench $(ARGS)

gpu: $(VENV)/.test-installed
	$(BIN)/python -m benchmarks.gpu $(ARGS)

upstream: $(VENV)/.test-installed
	$(BIN)/python tests/upstream/series.py $(ARGS)

span-patch: $(VENV)/.test-installed
	$(BIN)/python tests/upstream/branch.py $(ARGS)

release: $(VENV)/.test-installed
	$(PIP_INSTALL) -e '.[release]'
	.ci/release $(BIN)/python

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage .coverage.* htmlcov build dist docs/_build torchdyn-span.patch
	find torchdyn_mintime tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.test-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the package and its test tools into $(VENV): a few minutes, once."
	$(PIP_INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.docs-installed: $(VENV)/.test-installed
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@
