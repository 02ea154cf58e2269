# make serve    serves the default artifact: PORT=8000, ARGS='--max-rows 128'
# make test     the tests;  make test-slow  those that take minutes
# make check    ruff, mypy, import contracts
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
ARGS ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: serve test test-slow check clean

serve: $(VENV)/serve.stamp
	$(VENV)/bin/transduce serve --port $(PORT) $(ARGS)

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest $(ARGS)

test-slow: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

check: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Transduce needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.stamp: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -e '.[cpu]'
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -e '.[cpu,train,test]'
	touch $@ $(VENV)/serve.stamp

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
