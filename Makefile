# `make` lists the targets. `make study` and `make test` set up everything they need in .venv first (scripts/setup.sh).

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help study test slow lint docs pages notebooks stranger api bench experiments clean FORCE

PY := .venv/bin/python
STAMP := .venv/.stamp

# The stamp holds the folder it was made in. A folder that has moved, or a Python that is gone: set up again.
ready := $(shell test -x .venv/bin/pssm && $(PY) -c '' 2>/dev/null && test "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" && echo yes)
ifneq ($(ready),yes)
$(STAMP): FORCE
endif

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@sh scripts/setup.sh

study: $(STAMP) ## compare the inference methods on the Nile series; report in results/nile
	.venv/bin/pssm compare nile --out results/nile --force

test: export JAX_PLATFORMS = cpu
test: lint ## lint, then run all tests but the slow ones
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m "not slow"

slow: export JAX_PLATFORMS = cpu
slow: $(STAMP) ## the slow tests; PART=2/5: the second fifth; BUDGET=900: as many as begin in 900 s
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m slow --ignore tests/test_pages.py \
	    $(if $(PART),--part $(PART)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(DURATIONS),--durations-file $(DURATIONS))

pages: export JAX_PLATFORMS = cpu
pages: $(STAMP) ## run the Python blocks of README and docs
	$(PY) -m pytest -n 2 -q tests/test_pages.py

notebooks: export PSSM_EXECUTE_NOTEBOOKS = 1
notebooks: docs ## build the documentation and run the notebooks

stranger: $(STAMP) ## install the wheel in an empty environment and run it; quick tests with an older Python
	@sh scripts/stranger.sh

api: $(STAMP) ## write the public names and their arguments to tests/api_snapshot.txt
	JAX_PLATFORMS=cpu $(PY) scripts/api_snapshot.py >tests/api_snapshot.txt

lint: $(STAMP) ## ruff (rules and format) and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

docs: $(STAMP) ## build the documentation in docs/_build/html; a warning is an error
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(STAMP) ## run the benchmark scripts, docs/benchmarks/*.py
	@set -e; for script in docs/benchmarks/*.py; do \
	    test -e "$$script" || continue; \
	    echo "$$script"; env -u JAX_COMPILATION_CACHE_DIR $(PY) "$$script"; done # timings: no cache

experiments: $(STAMP) ## learn eight systems by every method; what is done is kept in results/experiments
	env -u JAX_COMPILATION_CACHE_DIR JAX_PLATFORMS=cpu $(PY) docs/experiments/run.py # timings: no cache
	$(PY) docs/experiments/report.py

clean: ## remove what was built, .venv included; results/ stays
	rm -rf .venv .venv-tools .jax_cache .pytest_cache .ruff_cache .hypothesis .jupyter_cache \
	    build dist docs/_build docs/tutorials
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
