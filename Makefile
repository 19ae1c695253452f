# Every target works alone on a fresh machine: it makes .venv and installs what it needs.
# To start over (for instance with another TORCH), remove .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet

.DEFAULT_GOAL := test
.NOTPARALLEL:
.PHONY: venv demo quality-demo bench-gpu test test-all docs lint clean

venv: $(VENV)/.stamp-dev

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# ca-tome asks for a torch of 2023, but what the tests compare with works in today's, too.
# torch comes first: the version is pinned, and the next line keeps what it finds installed
$(VENV)/.stamp-demo: pyproject.toml | $(BIN)/pip
	@echo "Installing toma_fx into $(VENV): a few minutes the first time"
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(BIN)/pip
	@echo "Installing toma_fx and its development tools into $(VENV): a few minutes the first time"
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) -e ".[dev]"
	$(PIP_INSTALL) --no-deps ca-tome==0.1.3
	@touch $@

demo: $(VENV)/.stamp-demo
	$(BIN)/toma-fx demo --out demo

# tuned on four prompts, compared on all twelve, from other noise
quality-demo: $(VENV)/.stamp-demo
	mkdir -p quality-demo
	$(BIN)/toma-fx tune --model tiny-sdxl --prompts examples/prompts-tiny.txt --limit 4 --batch 4 \
		--speedup 2 --rounds 0 --out quality-demo/search --recipe quality-demo/recipe.json
	$(BIN)/toma-fx quality --model tiny-sdxl --prompts examples/prompts-tiny.txt --batch 4 \
		--seed 500 --seeds 3 --rounds 1 --config quality-demo/recipe.json --config lossless --config fast \
		--config toma:ratio=0.5 --out quality-demo/quality

# the tables, too, of what could be measured
bench-gpu: $(VENV)/.stamp-demo
	$(BIN)/python benchmarks/gpu.py --quick; status=$$?; $(BIN)/python benchmarks/table.py; exit $$status

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest

# -m "" replaces the "not slow" of pyproject.toml
test-all: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -m ""

# README, docs/ and the docstrings of public names as a site in site/; it needs no torch, and nothing but
# the registry to install from
$(VENV)/.stamp-docs: pyproject.toml | $(BIN)/pip
	$(PIP_INSTALL) $$($(BIN)/python tools/extra.py docs)
	@touch $@

docs: $(VENV)/.stamp-docs
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Outputs and caches; .venv stays, because it is slow to make again.
clean:
	rm -rf demo quality-demo site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
