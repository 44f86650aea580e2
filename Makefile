# Each target is one line into the code; `make` alone explains them.
PYTHON ?= python3
VENV := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-slow parity lint types contracts bench-overlap bench-rollout bench-dataplane bench-environments bench-weights bench-apply bench-canary bench-stale-actions bench-learner test-environments real-model learn storm storm-real push-storm sigterm resume fuzz mutations simulate simulate-scaling clean

help: ## this list
	@echo "Countercurrent: asynchronous reinforcement learning for language models."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Start with make quickstart. Everything is installed into .venv first; running a target again is quick."

venv: ## create .venv with the locked versions (done by every other target)
	@$(PYTHON) deploy/install.py

quickstart: venv ## train a small model end to end, with a summary and a picture (two to five minutes)
	@$(VENV)/python -m deploy.quickstart

test: venv ## all tests that need neither a GPU nor patience (at most 15 minutes on 2 cores)
	@$(VENV)/python -m tests.environments --install openenv-core-0.3
	$(VENV)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow and not gpu and not environments" --durations=15

test-slow: venv ## the tests that take minutes each: learning against a control
	$(VENV)/python -m pytest -m "slow and not gpu and not environments" --timeout 1200

parity: venv ## the whole pipeline at staleness 0 against a plain synchronous trainer, step for step to 1e-5
	$(VENV)/python -m pytest -s -m slow tests/parity --timeout 300

test-environments: venv ## the clients of environment servers against the real ones, each in an installation of its own
	$(VENV)/python -m tests.environments

real-model: venv ## some steps of the whole loop with a pre-trained model of 135M parameters (fetches 93 MB once)
	@$(VENV)/python -m deploy.real_model

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

bench-environments: venv ## how busy the engine is with 256 episodes of 1 s steps, over 256 single turns; what one that is down costs
	$(VENV)/python -m tests.benchmarks.bench_environments
	$(VENV)/python -m tests.benchmarks.bench_environment_down

bench-weights: venv ## weight deltas beside what others do, of a real training run, and pushes beside PUB over TCP
	$(VENV)/python -m tests.benchmarks.bench_delta
	$(VENV)/python -m tests.benchmarks.record_deltas
	$(VENV)/python -m tests.benchmarks.bench_push
	$(VENV)/python -m tests.benchmarks.bench_push --megabytes 8 --servers 16 64 --rounds 3
	$(VENV)/python -m tests.benchmarks.bench_relays
	$(VENV)/python -m tests.benchmarks.bench_relays --keys

bench-apply: venv ## what a weight update costs real vLLM: its pause, tokens lost, the KV cache kept or cleared, joining
	$(VENV)/python -m tests.benchmarks.bench_apply

bench-canary: venv ## how far a right engine is from the learner on the canary, how far a wrong one, and what it costs
	$(VENV)/python -m tests.benchmarks.bench_canary

bench-stale-actions: venv ## wait, requeue and mask on a long-tailed task: wall time, reward, tokens sampled in vain
	$(VENV)/python -m tests.benchmarks.bench_stale_actions

bench-learner: venv ## a step on DeepSpeed over plain torch, shared prompts over repeated ones, packed over padded, and its peak memory: docs/learner.md
	$(VENV)/python -m tests.benchmarks.bench_learner

learn: venv ## staleness 0 to 8, corrected and not, 5 seeds of the demo (an hour; goes on where it was): docs/learning.md
	$(VENV)/python -m tests.learning --plot docs/learning.png

storm: venv ## real processes killed and stopped at random, and an audit of what was recorded: make storm SEEDS=20
	$(VENV)/python -m tests.storm --seeds $(or $(SEEDS),1)

storm-real: venv ## the same on vLLM and DeepSpeed, with fewer faults: these take half a minute to start
	$(VENV)/python -m tests.storm --real --seeds $(or $(SEEDS),1) --kills 20 --trajectories 2000 --servers 2

push-storm: venv ## 1,000 versions to 4 receivers over real sockets, each push cut at a random byte
	$(VENV)/python -m tests.weights.push_storm --pushes $(or $(PUSHES),1000)

sigterm: venv ## SIGTERM at random instants of any process: exit within 5 s, no orphan: make sigterm POINTS=40
	$(VENV)/python -m tests.storm.sigterm --points $(or $(POINTS),40)

resume: venv ## final weights after kills at 200 random points, bit for bit those of an undisturbed run (half an hour)
	$(VENV)/python -m tests.storm.resume --points 200

fuzz: venv ## damaged frames for every decoder of bytes from outside: make fuzz FRAMES=100000000
	$(VENV)/python -m tests.fuzz --frames $(or $(FRAMES),10000000)

mutations: venv ## guards taken out one at a time, each of which a test must miss: make mutations ONLY=relay
	$(VENV)/python -m tests.mutations $(ONLY)

simulate: venv ## many histories of the coordinator under a virtual clock: make simulate SEEDS=1000000
	$(VENV)/python -m tests.simulation --seeds $(or $(SEEDS),10000)

simulate-scaling: venv ## learner idle, staleness and waste with 1 to 10,000 simulated servers; rewrites docs/scaling.md
	$(VENV)/python -m tests.simulation.scaling --plot docs

bench-dataplane: venv ## what trajectories cost on their way: rate, CPU, memory, latency of control messages
	$(VENV)/python -m tests.benchmarks.bench_dataplane

clean: ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf .venv .venv-environments .real-model .venv.lock .venv.options .venv.removed build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
