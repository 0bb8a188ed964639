# Needs Python 3.11 or newer with pip and venv, and nothing else: `make demo` and `make test` install first.
#
#   PYTHON  the interpreter that makes the environment
#   VENV    where the environment goes
#   TORCH   what pip installs as torch, e.g. TORCH="torch==2.13.0+cpu" with PIP_EXTRA_INDEX_URL set to the
#           index of CPU builds, which are much smaller
#   OLDEST  where the environment of the oldest versions goes
#   FLOWVERIFY_DATA  the folder with the subfolder mnist; tests that need MNIST are skipped without it

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
AUTO_LIRPA ?= auto-LiRPA==0.3
OLDEST ?= .venv-oldest
QUICK := $(addprefix tests/,test_api.py test_cli.py test_data.py test_readme.py test_zoo.py \
    certifiers/test_linear.py figures/test_pictures.py network/test_load.py network/test_to_onnx.py)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint docs bench test-oldest clean

help: ## say what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(INSTALLED) ## make the environment, with torch, auto_LiRPA and all extras

# auto_LiRPA's metadata forbids every torch since 1.13, hence --no-deps; pyproject.toml lists what it imports.
$(INSTALLED): pyproject.toml flowverify/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps "$(AUTO_LIRPA)"
	touch $@

demo: install ## certify a shipped network on images of digits, and draw demo.png
	$(BIN)/flowverify demo --picture demo.png

test: install ## run the tests, but for the slow ones
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 -m "not slow" $(PYTEST_ARGS)

test-slow: install ## run the slow ones
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 -m slow $(PYTEST_ARGS)

test-oldest: ## run a quick part of the tests with the oldest versions that pyproject.toml allows
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python .ci/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint $(OLDEST)/constraints.txt \
	    --editable ".[all]" hypothesis jsonschema mpmath pytest pytest-xdist
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps "$(AUTO_LIRPA)"
	$(OLDEST)/bin/python -m pytest --numprocesses=auto --maxprocesses=4 -m "not slow" $(QUICK) $(PYTEST_ARGS)

lint: install ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## build the site of the documentation, build/site/index.html
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --strict --quiet

bench: install ## run the benchmarks, one after the other
	@for script in $(filter-out %/__init__.py %/common.py,$(wildcard benchmarks/*.py)); do \
	    name=$$(basename "$$script" .py); echo "== $$name"; $(BIN)/python -m "benchmarks.$$name" || exit 1; \
	done

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) $(OLDEST) build dist demo.png .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
