# Each target is one line into the code; `make` alone explains them.
PYTHON ?= python3
VENV := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-slow lint types contracts bench-overlap bench-rollout bench-delta clean

help: ## this list
	@echo "Countercurrent: asynchronous reinforcement learning for language models."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Start with make quickstart. Everything is installed into .venv first; running a target again is quick."

venv: ## create .venv with the locked versions (done by every other target)
	@$(PYTHON) deploy/install.py

quickstart: venv ## train a small model end to end, with a summary and a picture (two to five minutes)
	@$(VENV)/python -m deploy.quickstart

test: venv ## all tests that need neither a GPU nor patience (at most 15 minutes on 2 cores)
	$(VENV)/python -m pytest -m "not slow and not gpu" --durations=15

test-slow: venv ## the tests that take minutes each: learning against a control
	$(VENV)/python -m pytest -m "slow and not gpu" --timeout 1200

lint: venv ## style
	$(VENV)/ruff check . && $(VENV)/ruff format --check .

types: venv ## mypy, strict
	$(VENV)/mypy

contracts: venv ## who may import whom
	$(VENV)/lint-imports

bench-overlap: venv ## wall time of the pipeline over the slower of generation and training alone
	$(VENV)/python -m tests.benchmarks.bench_overlap

bench-rollout: venv ## tokens per second of the rollout server's engine over bare vLLM
	$(VENV)/python -m tests.benchmarks.bench_rollout

bench-delta: venv ## bytes and times of weight deltas, synthetic and of a real run, beside what others do
	$(VENV)/python -m tests.benchmarks.bench_delta
	$(VENV)/python -m tests.benchmarks.record_deltas

clean: ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf .venv .venv.lock .venv.options .venv.removed build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
