# Two commands for a newcomer: `make run` and `make test`. Everything else is listed by `make help`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE_SOURCES := $(shell find native -name '*.cc' -o -name '*.h' -o -name 'CMakeLists.txt')
BUILD_TOOLS := scikit-build-core cmake ninja

.PHONY: help run test check bench bench-peers bench-kernels soak demo-model native-test format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

# The core alone: no torch, no transformers. Rebuilt when the native sources change.
$(VENV)/core: pyproject.toml $(NATIVE_SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up the core in $(VENV) (builds the native library once)"
	@$(PIP) $(BUILD_TOOLS)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --editable .
	@touch $@

# Everything the tests need; torch first, so that nothing drags in a GPU build.
$(VENV)/dev: $(VENV)/core
	@echo "setting up the test tools in $(VENV)"
	@$(PIP) torch==2.13.0
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

run: $(VENV)/core ## start the demo model, ask it a question, keep serving at 127.0.0.1:8080 (ONCE=1: stop after the answer)
	@$(BIN)/python tools/first_answer.py $(if $(ONCE),--once)

check: $(VENV)/dev ## linters, types, layer contracts, formatting
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/check.py

native-test: $(VENV)/dev ## C++ tests under sanitizers; aarch64 under qemu-user where that is installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/native_test.sh

test: check native-test ## set up and pass all tests
	@$(BIN)/python -m pytest -m "not soak" --durations=15

soak: $(VENV)/dev ## the long forms: 100,000 hostile inputs, kill -9 rounds, long load (results go to docs/)
	@$(BIN)/python -m pytest -m soak
	@$(BIN)/python -m tests.fuzz.run --inputs 100000 --seed 1

bench: $(VENV)/core ## speed of this machine on the demo model; kernels with `make bench-kernels`
	@$(BIN)/inhouse bench demo

bench-peers: $(VENV)/core ## other engines in turns with ours: KITS=FOLDER [PLAN=full] [MINUTES=40] [TRACE=FILE] [KV=bf16] (bench/peers/README.md)
	@PYTHONPATH="$(CURDIR)" $(BIN)/python -m bench.peers.run --plan $(or $(PLAN),full) --minutes $(or $(MINUTES),0) \
		$(if $(KITS),--kits $(KITS)) $(if $(TRACE),--trace $(TRACE)) $(if $(KV),--kv $(KV))

bench-kernels: $(VENV)/core ## every linear shape of the usual models, formats and levels, beside the machine's peaks (docs/kernels.md) [KERNELS="--models NAME --limit 80"]
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S native -B build/native -G Ninja >&2 && $(BIN)/ninja -C build/native linear_bench >&2
	@$(BIN)/python tools/kernel_speed.py $(KERNELS)
	@$(BIN)/python tools/kernels_page.py

demo-model: $(VENV)/dev ## train the demo model again from its data (resumable; hours on a CPU)
	@$(BIN)/python -m demo.make

format: $(VENV)/dev ## format Python and C++
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix . && find native -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format -i

clean: ## remove what was built (not the model home)
	rm -rf $(VENV) build dist src/inhouse/lib .mypy_cache .ruff_cache .pytest_cache .hypothesis
