PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NEMO_VENV := .venv-nemo
COMPAT_PYTHON ?= python3.11
COMPAT_VENV := .venv-compat
COMPAT_INSTALLED := $(COMPAT_VENV)/.installed
# pyenv's interpreters run only where their version is selected.
$(INSTALLED) $(NEMO_VENV)/.installed: export PYENV_VERSION = 3.12
$(COMPAT_INSTALLED): export PYENV_VERSION = 3.11

.PHONY: help setup demo test test-faults test-slurm test-compat lint docs lock slurm-deps browser-deps nemo-env clean

help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(INSTALLED) ## make .venv with the pinned packages (demo and test do this)

$(INSTALLED): requirements/torch.txt requirements/cpu.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; install Python 3.12, or run make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements/torch.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED) ## RLAD end to end on two CPU cores; replaces runs/kk_tiny_cpu, ends with its report.html
	rm -rf runs/kk_tiny_cpu
	$(BIN)/rlad train kk_tiny_cpu

test: $(INSTALLED) ## lint, types and all tests that need neither a GPU nor Slurm
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests --ignore tests/slurm --ignore tests/faults --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-faults: $(INSTALLED) ## faults put in on purpose, in whole runs (docs/reliability.md)
	$(BIN)/python -m pytest tests/faults

test-slurm: $(INSTALLED) ## tests on a real Slurm cluster on this machine; skipped without root or Slurm
	$(BIN)/python -m pytest tests/slurm

test-compat: $(COMPAT_INSTALLED) ## unit and multi-process tests on Python 3.11 with the oldest Megatron-Core (.venv-compat)
	$(COMPAT_VENV)/bin/python -m pytest tests/multiproc tests/unit --numprocesses 2 --dist loadfile --no-loadscope-reorder

$(COMPAT_INSTALLED): requirements/torch.txt requirements/compat.txt pyproject.toml
	@$(COMPAT_PYTHON) --version >/dev/null 2>&1 || { echo "$(COMPAT_PYTHON) not found; install Python 3.11, or run make test-compat COMPAT_PYTHON=..."; exit 1; }
	$(COMPAT_PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/python -m pip install --quiet $$(grep ^torch= requirements/torch.txt)
	$(COMPAT_VENV)/bin/python -m pip install --quiet --no-deps -r requirements/compat.txt
	$(COMPAT_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lint: $(INSTALLED) ## format, fix what can be fixed, check types
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

# Without --quiet, which hides the warnings from --strict too.
docs: $(INSTALLED) ## build the documentation into site/; a broken link or a page without a place is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: $(INSTALLED) ## resolve requirements/*.in again
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile requirements/cpu.in --excludes requirements/cpu-excluded.txt \
		--python-version 3.12 --no-header --no-annotate --output-file requirements/cpu.txt
	$(BIN)/uv pip compile requirements/cpu.in --override requirements/compat.in \
		--excludes requirements/cpu-excluded.txt \
		--python-version 3.11 --no-header --no-annotate --output-file requirements/compat.txt
	$(BIN)/uv pip compile requirements/nemo.in \
		--python-version 3.12 --no-header --no-annotate --output-file requirements/nemo.txt
	$(BIN)/uv pip compile requirements/gpu.in --python-platform x86_64-manylinux_2_28 \
		--python-version 3.12 --no-header --no-annotate --output-file requirements/gpu.txt
	$(BIN)/uv pip compile requirements/gpu-kit.in --constraint requirements/gpu.txt \
		--excludes requirements/cpu-excluded.txt --python-platform x86_64-manylinux_2_28 \
		--python-version 3.12 --no-header --no-annotate --output-file requirements/gpu-kit.txt

slurm-deps: ## install Debian's Slurm for the tests; does nothing where it cannot be installed
	tests/slurm/install.sh

browser-deps: ## install Debian's Chromium for the tests of `rlad watch`; does nothing where it cannot be installed
	tests/browser/install.sh

nemo-env: $(NEMO_VENV)/.installed ## make .venv-nemo, which launches recipes with NeMo-Run (rlad-nemo)

$(NEMO_VENV)/.installed: requirements/nemo.txt pyproject.toml
	$(PYTHON) -m venv $(NEMO_VENV)
	$(NEMO_VENV)/bin/python -m pip install --quiet --no-deps -r requirements/nemo.txt
	$(NEMO_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean: ## remove .venv, .venv-nemo and .venv-compat
	rm -rf $(VENV) $(NEMO_VENV) $(COMPAT_VENV)
