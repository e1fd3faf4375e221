# `make` prints this help. Everything runs in VENV, which the first target that needs it creates.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CORES := $(shell getconf _NPROCESSORS_ONLN)
WORKERS ?= $(shell [ $(CORES) -lt 4 ] && echo $(CORES) || echo 4)
# Workers share the cores: more than one thread each makes tiny matrix products slower, not faster.
# Triton kernels run interpreted here; make test-gpu compiles them.
PYTEST := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-laws test-statistics test-gpu test-stress check format demo bench-cpu bench-engine bench-adapters bench-speculation bench-kernels bench-text profile plots readme-pictures clean

help: ## Show what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s  %s\n", $$1, $$2}' Makefile

$(INSTALLED): pyproject.toml constraints-dev.txt
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable '.[dev]'
	touch $@

install: $(INSTALLED) ## Create .venv and install specserve with its development tools

test: $(INSTALLED) ## Run the fast tests on the CPU
	$(PYTEST) -m 'not slow and not gpu and not laws_full and not stress'

test-slow: $(INSTALLED) ## Run the tests that take more than a few seconds each
	$(PYTEST) -m 'slow and not gpu and not laws_full'

test-laws: $(INSTALLED) ## Run the full product of every law
	$(PYTEST) tests/laws

test-statistics: $(INSTALLED) ## Hold sampled tokens to the target's distribution by 10^6 samples a case
	$(PYTEST) tests/laws/test_distribution.py tests/laws/test_biased.py tests/sampling/test_verify_distribution.py

# In float64 the laws hold the asynchronous steps, in float32 kernels and graphs too; a part of the cover keeps it short.
LAWS_GPU := tests/laws -m 'not slow and not laws_full' -k '(llama and depth2 and not pipeline) \
  or (mistral and (pipeline or draft_kv or coupled))' --law-device cuda

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	$(BIN)/pytest tests/gpu tests/kernels_triton
	$(BIN)/pytest $(LAWS_GPU)
	$(BIN)/pytest $(LAWS_GPU) --law-dtype float32

SECONDS ?= 180
SEED ?= 0

test-stress: $(INSTALLED) ## Load, reload, break, unload and request adapters at random: SECONDS=180 SEED=0
	STRESS_SECONDS=$(SECONDS) STRESS_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/pytest tests/stress -m stress

check: $(INSTALLED) ## Lint, check formatting, types and the layers' import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples benchmarks
	$(BIN)/lint-imports

format: $(INSTALLED) ## Apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(INSTALLED) ## Serve the bundled models and send them a mixed batch
	$(BIN)/python examples/demo.py

bench-cpu: $(INSTALLED) ## Measure against transformers' generate on this CPU
	$(BIN)/python -m benchmarks.cpu

# The pair and its twin are written once; together they take 22 GB on disk.
COMMA := ,
PAIRS ?= build/pairs
MODE ?= lora0_spec0,lora8_spec0,lora0_specauto,lora8_specauto
BATCH ?= 8

$(PAIRS)/pair/pair.json: | $(INSTALLED)
	$(BIN)/python -m benchmarks.pair $(PAIRS)/pair --companions

$(PAIRS)/twin/pair.json: | $(INSTALLED)
	$(BIN)/python -m benchmarks.pair $(PAIRS)/twin --companions --eps 1.0 --layers 4

bench-engine: $(PAIRS)/pair/pair.json $(PAIRS)/twin/pair.json ## Measure decode and prefill on a GPU: MODE=lora8_spec4,...
	$(BIN)/python -m benchmarks.engine $(PAIRS)/pair --twin $(PAIRS)/twin --mode $(MODE)

bench-adapters: $(PAIRS)/pair/pair.json $(PAIRS)/twin/pair.json ## Measure what adapters cost on a GPU: SECTION=mixes,loading
	$(BIN)/python -m benchmarks.adapters $(PAIRS)/pair --twin $(PAIRS)/twin $(if $(SECTION),--section $(SECTION))

bench-speculation: $(PAIRS)/pair/pair.json $(PAIRS)/twin/pair.json ## Measure drafting on a GPU: SECTION=modes,sampled,curve,shift
	$(BIN)/python -m benchmarks.speculation $(PAIRS)/pair --twin $(PAIRS)/twin $(if $(SECTION),--section $(SECTION))

bench-kernels: $(INSTALLED) ## Measure each kernel on a GPU against its floor: ONLY=norm,lora
	$(BIN)/python -m benchmarks.ops $(if $(ONLY),--only $(ONLY))

MINUTES ?= 8

bench-text: $(INSTALLED) ## Measure on a GPU what draft companions give on real text: MINUTES=8
	$(BIN)/python -m benchmarks.real_text build/real-text --minutes $(MINUTES)

profile: $(PAIRS)/pair/pair.json ## Show where a decode step's time goes: MODE=lora8_spec4 BATCH=8
	$(BIN)/python -m benchmarks.step_profile $(PAIRS)/pair --mode $(firstword $(subst $(COMMA), ,$(MODE))) --batch $(BATCH)

plots: $(INSTALLED) ## Draw docs/images from results: RESULTS=benchmarks/results/h200-speculation.jsonl
	$(BIN)/python -m benchmarks.plots $(if $(RESULTS),--results $(RESULTS))

readme-pictures: $(INSTALLED) ## Draw the pictures of kept comparisons, README's among them: AB=benchmarks/results/ab-cpu
	$(BIN)/python -m benchmarks.http_pictures
	$(BIN)/python -m benchmarks.ab_pictures $(AB)

clean: ## Remove the environment, caches and build products
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
