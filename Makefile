# make demo: the main job, end to end. make test: the tests. make check: what to run between two edits.
# Each sets up .venv on its first run.
.DEFAULT_GOAL := help
SHELL := /bin/bash
BIN := .venv/bin
READY := .venv/.ready
# one thread a process: the models are small, and OpenMP's threads of two processes wait for each other on two cores
# and bytecode is written, whatever the machine's images say: children import our modules hundreds of times
PYTEST := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ON_ALL_CORES := -n auto --maxprocesses 8 --dist loadscope

LIGHT := not engine and not slow and not gpu and not hub and not ollama

.PHONY: help setup demo lifecycle-demo check light test test-slow test-gpu test-hub test-ollama lint style types docs constraints bench-merge bench-gguf bench-vllm bench-gateway gpu-slot wheel clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## Make .venv with every dependency.

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	bash scripts/setup.sh
	@touch $(READY)

demo: $(READY)  ## Train the shipped model, export it, prove parity.
	$(BIN)/lora2serve train demo
	$(BIN)/lora2serve export --target vllm --target ollama --target adapter
	$(BIN)/lora2serve parity --ask "$$(cat recipes/demo/question.txt)"

lifecycle-demo: $(READY)  ## Train two versions, try one on live traffic, roll it back, promote the better.
	$(BIN)/python -m scripts.lifecycle_demo

check: style  ## Check style, types and every test without an engine or a training.
	@$(MAKE) --no-print-directory -j 2 types light

# thousands of small files: written to memory where there is some, and gone with the tests
light: $(READY)
	if [ -w /dev/shm ] && [ "$$(df -Pm /dev/shm | awk 'NR == 2 { print $$4 }')" -gt 4000 ]; then \
		export PYTEST_DEBUG_TEMPROOT=/dev/shm; \
	fi; \
	$(PYTEST) -m "$(LIGHT)" -o tmp_path_retention_policy=failed -o tmp_path_retention_count=1 $(ON_ALL_CORES) $(ARGS)

test: $(READY)  ## Run the tests; the slowest 25 are listed.
	$(PYTEST) --durations=25 $(ON_ALL_CORES) --no-loadscope-reorder $(ARGS)

test-slow: $(READY)  ## Run the slow tests too.
	$(PYTEST) -m "not gpu and not hub and not ollama" $(ON_ALL_CORES) --no-loadscope-reorder $(ARGS)

test-gpu: $(READY)  ## Run the tests that need an NVIDIA GPU.
	$(PYTEST) -m gpu tests/gpu $(ARGS)

test-hub: $(READY)  ## Run the tests against the real Hub (needs HF_TOKEN).
	HF_HUB_OFFLINE=0 $(BIN)/python -m pytest -m hub $(ARGS)

test-ollama: $(READY)  ## Run the tests against the Ollama at OLLAMA_HOST.
	$(PYTEST) -m ollama $(ARGS)

lint: style types  ## Check style (ruff) and types (mypy --strict).

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)  ## Write the tables of docs/ and the plans of recipes/, which are made from code and tests.
	$(BIN)/python scripts/model_table.py
	$(BIN)/python scripts/method_table.py
	$(BIN)/python scripts/recipe_plans.py
	$(BIN)/python -m lora2serve.cli.reference > docs/cli.md

constraints: $(READY)  ## Write constraints.txt from the packages in .venv.
	$(BIN)/python scripts/constraints.py

bench-merge: $(READY)  ## Time the merge beside a durable copy and PEFT.
	$(BIN)/python -m benchmarks.merge

bench-gguf: $(READY)  ## Time the GGUF export beside the usual chain.
	$(BIN)/python -m benchmarks.gguf

bench-vllm: $(READY)  ## Time the quantized exports beside the 16-bit one.
	$(BIN)/python -m benchmarks.vllm

gpu-slot:  ## Measure on an NVIDIA GPU what is worth knowing, in nine minutes.
	bash scripts/gpu_slot.sh $(ARGS)

bench-gateway: $(READY)  ## Time the gateway beside none and beside LiteLLM's proxy.
	$(BIN)/python -m benchmarks.gateway

wheel: $(READY)  ## Build the wheel.
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:  ## Remove runs, exports and caches; .venv stays.
	rm -rf runs exports dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
