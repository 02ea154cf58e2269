# make serve    serves the default artifact: PORT=8000, ARGS='--max-rows 128'
# make test     the tests;  make test-slow  those that take minutes;  make test-docker  those of the image
# make check    ruff, mypy, import contracts
# make lock     deploy/lock anew, after a change of dependencies
# make audit    known weaknesses of what an image holds (asks the registry);  make sbom  a list of it: build/sbom-cpu.json
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
ARGS ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: serve test test-slow test-docker check lock audit sbom clean

serve: $(VENV)/serve.stamp
	$(VENV)/bin/transduce serve --port $(PORT) $(ARGS)

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest $(ARGS)

test-slow: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

test-docker: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -m docker -rs $(ARGS)

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

# torch is not in it: its builds are no registry's matter, and no image holds it.
COMPILE = $(VENV)/bin/uv pip compile --quiet --upgrade --generate-hashes --no-header --no-emit-index-url \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --override deploy/lock/left-out.txt

lock: | $(VENV)/bin/python
	$(PIP) install uv
	$(COMPILE) --extra cpu pyproject.toml --output-file deploy/lock/cpu.txt
	$(COMPILE) --extra gpu pyproject.toml --output-file deploy/lock/gpu.txt
	echo 'hatchling>=1.27' | $(COMPILE) - --output-file deploy/lock/build.txt

# Both images, by the locks. torch is in neither.
audit: | $(VENV)/bin/python
	$(PIP) install pip-audit
	$(VENV)/bin/pip-audit --strict --disable-pip --require-hashes -r deploy/lock/cpu.txt
	$(VENV)/bin/pip-audit --strict --disable-pip --require-hashes -r deploy/lock/gpu.txt

sbom: | $(VENV)/bin/python
	$(PIP) install cyclonedx-bom
	mkdir -p build
	$(VENV)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o build/sbom-cpu.json deploy/lock/cpu.txt
	$(VENV)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o build/sbom-gpu.json deploy/lock/gpu.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
