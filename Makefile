# What a newcomer can do here.  Everything needed is installed under .cache by the first run.

PYTHON ?= python3
TOOLS := .cache/tools
BIN := $(TOOLS)/bin
# Tests side by side.  A real server wants a core and 2 GB.
JOBS ?= 2
# How long fuzz-c runs.
SECONDS ?= 170

.PHONY: help demo test test-unit test-install test-stress test-real test-matrix test-truth test-transfer test-gpu stress fuzz-c lint pre-commit bench tools clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: ## a real SGLang on this CPU, hooked: install, launch, read the map, update, uninstall
	@$(PYTHON) -m demo

test: lint test-unit test-install test-stress test-real ## everything CI runs (some 37 minutes on two cores; the first run installs SGLang)

test-unit: tools ## the parts, with real tensors and real processes
	$(BIN)/python -m pytest -q -n $(JOBS) tests/unit tests/compatibility

test-install: tools ## install and uninstall in fresh venvs of every Python found
	$(BIN)/python -m pytest -q -n $(JOBS) tests/install

test-stress: tools ## faults, kills and untrusted documents, in the short form
	$(BIN)/python -m pytest -q -n $(JOBS) tests/stress

test-real: tools ## real SGLang servers on the CPU
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile tests/real_sglang -m "not matrix and not truth and not transfer"

test-matrix: tools ## a real server of every SGLang line (some 25 minutes); writes docs/sglang-support.table.md
	MATRIX_TABLE=docs/sglang-support.table.md $(BIN)/python -m pytest -q -s tests/real_sglang/test_matrix.py

test-truth: tools ## maps against the bytes themselves, row by row (some 25 minutes); writes docs/truth-matrix.md
	TRUTH_TABLE=docs/truth-matrix.md $(BIN)/python -m pytest -q -s tests/real_sglang/truth tests/real_sglang/diffusion tests/real_sglang/programs tests/real_sglang/test_installation_methods.py

test-transfer: tools ## real servers with a subscriber, Mooncake and NIXL; two ranks, two network namespaces (some 10 minutes)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m transfer tests/real_sglang

test-gpu: tools ## on a machine with a CUDA device and SGLang
	$(BIN)/python -m pytest -q -m gpu tests/gpu

stress: tools ## tries to break it, with real processes (about an hour; docs/stress.md)
	$(BIN)/python -m pytest -q -s --long tests/stress

fuzz-c: tools ## the C example under sanitizers, on damaged files (SECONDS=170; prints its seed)
	$(BIN)/python -m tests.stress.fuzz_print_regions --seconds $(SECONDS)

lint: tools ## ruff, mypy --strict, who imports whom, generated pages up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python -m tools.api --check
	$(BIN)/python -m tools.format --check
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

pre-commit: tools ## runs the linters at each commit from now on
	$(BIN)/pre-commit install

bench: tools ## what the hook costs, beside named baselines; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks

tools: $(TOOLS)/stamp ## only install what the other targets need

# The tools' own venv; torch and SGLang are seen in the venv that the demo and the servers use.
$(TOOLS)/stamp: pyproject.toml tests/tools.py
	$(PYTHON) tests/tools.py $(TOOLS)
	touch $@

clean: ## remove what the targets above installed and made
	rm -rf .cache build dist *.egg-info
