# Every target makes .venv if there is none and installs what it needs, pinned in constraints.txt.
# pip's own settings (indexes, find-links, certificates) are respected. Without an NVIDIA GPU the
# CPU build of torch saves gigabytes:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# One worker per core, one thread each: torch's own threads would only fight over the cores.
TEST_WORKERS ?= auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
BUILD_TOOLS := scikit-build-core cmake ninja
# An editable install knows the modules by name and holds the built kernels, so a new, moved or deleted
# module, or a change in csrc/, means installing again.
MODULES := $(shell (find src/tqai -name '*.py' | LC_ALL=C sort; cat CMakeLists.txt csrc/*) | cksum | tr ' ' '-')
USER_STAMP := $(VENV)/.tqai-user-$(MODULES)
DEV_STAMP := $(VENV)/.tqai-dev-$(MODULES)
INSTALL := $(PIP) install --no-build-isolation -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint format docs check-docs picture bench wheel clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(USER_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt $(BUILD_TOOLS)
	$(INSTALL) -q -e '.[torch]'
	@rm -f $(VENV)/.tqai-user-* && touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt $(BUILD_TOOLS)
	$(INSTALL) -q -e '.[dev]'
	@rm -f $(VENV)/.tqai-* && touch $(USER_STAMP) $@

demo: $(USER_STAMP)  ## the embedded model reads a long document with a compressed cache
	$(BIN)/tqai demo

test: $(DEV_STAMP)  ## all tests (those for a GPU skip themselves where there is none)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

test-gpu: $(DEV_STAMP)  ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: $(DEV_STAMP) check-docs  ## ruff, mypy, and whether the generated docs are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_STAMP)  ## ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV_STAMP)  ## the generated parts of README.md and docs/
	$(BIN)/python scripts/generate_docs.py

check-docs: $(DEV_STAMP)  ## fails when the generated parts differ from what `make docs` would write
	$(BIN)/python scripts/generate_docs.py --check

picture: $(DEV_STAMP)  ## docs/images/demo.svg, from a real run of `tqai demo`
	$(BIN)/python scripts/record_demo.py
	$(BIN)/python scripts/generate_docs.py

bench: $(DEV_STAMP)  ## the benchmark on the embedded model; writes benchmarks/results/
	$(BIN)/python benchmarks/demo_model.py

wheel: $(DEV_STAMP)  ## dist/*.whl
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .

clean:  ## build outputs and caches, not .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
