# Everything a newcomer needs; `make` alone lists it.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input
SWEEP := -m step.chunk_rows=16,32,64 seq_len=8,32

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help sweep test lint format notebooks clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

sweep: .venv/.run ## install, then six supervised runs of the shipped model and a table that compares them
	$(BIN)/python run.py $(SWEEP) $(ARGS)

test: .venv/.dev lint ## install, then all that CI runs: lint, types, tests, notebooks, one real sweep
	$(BIN)/python -m pytest
	@$(MAKE) --no-print-directory notebooks
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	$(BIN)/python run.py -m step.chunk_rows=16,64 seq_len=8 "hydra.sweep.dir=$$dir/sweep"; \
	$(BIN)/fp4lab compare "$$dir/sweep" --plot "$$dir/sweep.png" >"$$dir/table"; \
	test "$$(grep -c 'completed.*A=B=C' "$$dir/table")" -eq 2 || { cat "$$dir/table"; echo "expected two completed runs"; exit 1; }

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

# Two stamps, so that a sweep does not wait for what only developers need. Without .pyc files torch takes twice as long to
# import, so they are made once, here.
.venv/.run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	|| { echo "fp4lab needs Python 3.11 to 3.13; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) -e '.[dev]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	@touch $@
