# Two commands are enough: `make demo` and `make test`. Each sets up what it needs and can be run again in seconds.

PYTHON ?= python3
# The environment's own tools first, uv among them; make setup runs before there are any. Tests and demo start hundreds of
# processes: whoever asked Python not to keep compiled modules would wait for the compiler in each of them.
RUN = env PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONDONTWRITEBYTECODE= .venv/bin/python
TIERS ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full parity e2e lint verify generate docs clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: ## Make .venv from the pinned packages (a second call returns at once)
	@$(PYTHON) scripts/environment.py

demo: setup ## Bring up a cluster, train a model through two faults, report (ARGS=--help says more)
	@$(RUN) scripts/demo.py $(ARGS)

test: setup ## Run all tests, tier by tier (TIERS="static unit" picks some; ARGS go to pytest)
	@$(RUN) scripts/tiers.py $(TIERS) $(if $(ARGS),-- $(ARGS))

test-full: setup ## Run the long tests; resumes where it was stopped; writes docs/results/
	@$(RUN) scripts/full.py

parity: setup ## Run the whole parity matrix, two hours of CPU; resumes; ARGS=NAME for one cell
	@env PYTHONPATH=tests OMP_NUM_THREADS=1 .venv/bin/python -m parity $(if $(ARGS),$(ARGS),--full --write)

e2e: setup ## Run the tests on a cluster only
	@$(RUN) scripts/tiers.py cluster $(if $(ARGS),-- $(ARGS))

lint: setup ## Ruff, mypy, import contracts, generated files
	@$(RUN) scripts/tiers.py static

verify: setup ## Fail if a generated file is not what its source says
	@$(RUN) scripts/generate.py --check

generate: setup ## Write all generated files: CRD, reference, pinned packages
	@$(RUN) scripts/generate.py

docs: setup ## Build the documentation into build/docs
	@$(RUN) -m sphinx -W --keep-going -q docs build/docs && echo "build/docs/index.html"

clean: ## Take the cluster down and remove what was built here (.venv and the shared cache stay)
	@if [ -x .venv/bin/python ] && [ "$$(id -u)" = 0 ]; then $(RUN) -m localcluster down; fi
	@rm -rf build dist report .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find crds operator trainer tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
