# Everything a newcomer needs; `make` alone lists it.
PYTHON ?= python3
BIN := .venv/bin
SWEEP := -m step.chunk_rows=16,32,64 seq_len=8,32

.DEFAULT_GOAL := help
.PHONY: help sweep test lint format notebooks clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

sweep: .venv/.run ## install, then six supervised runs of the shipped model and a table that compares them
	$(BIN)/python run.py $(SWEEP) $(ARGS)

test: .venv/.dev lint notebooks ## install, then all that CI runs: lint, types, tests, notebooks, one real sweep
	$(BIN)/python -m pytest
	rm -rf outputs/ci && $(BIN)/python run.py -m step.chunk_rows=16,64 seq_len=8 hydra.sweep.dir=outputs/ci
	$(BIN)/fp4lab compare outputs/ci

lint: .venv/.dev ## ruff and the type checker
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

notebooks: .venv/.dev ## run the notebooks, where there are any
	@if ls notebooks/*.ipynb >/dev/null 2>&1; then $(BIN)/python -m pytest --nbmake notebooks; fi

clean: ## remove the environment and all outputs
	rm -rf .venv outputs build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Without .pyc files torch takes twice as long to import, so they are made once, here.
.venv/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true
	touch $@
