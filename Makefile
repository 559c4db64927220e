# make example   starts servers and workers, sends real work, and shows live what happens
# make test      runs all tests; PG=16 chooses another embedded PostgreSQL, ARGS go to pytest
# make check     everything that a change must pass
#
# DATABASE_URL and CELERY_BROKER_URL name servers to use instead of embedded ones.

PYTHON ?= python3
PG ?= 18
ARGS ?=
SECONDS ?= 20

VENV := .venv
BIN := $(VENV)/bin
WITH_SERVERS := $(BIN)/python -m example_project.servers --postgresql $(PG) --

.PHONY: example test check lint clean
.DEFAULT_GOAL := example

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.example: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[example]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.example

example: $(VENV)/.example
	@$(WITH_SERVERS) $(BIN)/python -m example_project.run --seconds $(SECONDS)

test: $(VENV)/.dev
	$(WITH_SERVERS) $(BIN)/python -m pytest --cov --cov-report= $(ARGS)
	$(BIN)/python -m coverage report

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

check: lint test

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
