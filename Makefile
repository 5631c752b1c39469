# Everything a newcomer types. Each target installs what it needs into .venv and nothing else.
#   make demo            convert the bundled checkpoint to 4 bits and watch it answer
#   make test            the whole test suite; no torch
#   make test-reference  live comparison with transformers and mlx-vlm (installs torch)
#   make check           formatting and lint
#   make bench           our step against mlx-vlm's, and where the time goes on ggml (installs torch)
# The first of these that runs and is new enough.
PYTHON ?= $(or $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done),python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := build/demo-q4

.PHONY: demo test test-reference check bench clean

demo: .venv/.base $(DEMO)
	@echo; cat demo/prompt.txt; echo
	@$(BIN)/python -m mlx_dgemma.generate --model $(DEMO) --seed 0 --prompt - < demo/prompt.txt

$(DEMO): demo/checkpoint/config.json | .venv/.base
	@rm -rf $(DEMO) && mkdir -p build
	@$(BIN)/python -m convert demo/checkpoint $(DEMO) --to mlx --recipe q4

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --ignore tests/reference

test-reference: .venv/.reference
	$(BIN)/python -m pytest tests/reference

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: .venv/.reference
	$(BIN)/python -m benchmarks.versus --preset small
	$(BIN)/python -m benchmarks.ggml_step

clean:
	rm -rf .venv build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: found $$($(PYTHON) --version), expected Python 3.11 or newer; run make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "error: $(PYTHON) cannot make a virtual environment; on Debian or Ubuntu install python3-venv"; exit 1; }

.venv/.base: pyproject.toml | .venv/bin/python
	$(PIP) -e .
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(PIP) -e '.[dev]'
	@touch $@ .venv/.base

.venv/.reference: pyproject.toml | .venv/bin/python
	$(PIP) -e '.[dev,reference]'
	@touch $@ .venv/.dev .venv/.base
