# `make demo` and `make test` do all set-up on a fresh machine, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
# The tested release. Installed first, so that nothing after it chooses another build.
TORCH ?= torch==2.13.0
# Such as `transformers==5.23.0`; another release needs another VENV.
TRANSFORMERS ?=
# Such as `--cases 240` for a shorter demonstration that has learnt less.
DEMO_OPTIONS ?=
# Such as `--device cuda` or `--variant nano --variant large`; `med3dvlm bench --help` lists them.
BENCH_OPTIONS ?=
# Such as `-k processor` or `-n 0`, which runs all tests in one process.
TEST_OPTIONS ?=
BIN := $(VENV)/bin
FOLDERS := configuration modeling_med3dvlm processing hub_cards train med3dvlm

.PHONY: help demo test test-slow check style goldens bench phantom-scores ablations coverage api build clean

help:  ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]" $(if $(TRANSFORMERS),"$(TRANSFORMERS)")
	@touch $@

demo: $(VENV)/.installed  ## Train the three stages on phantoms, publish, ask and score: minutes on two cores
	HF_HUB_OFFLINE=1 $(BIN)/med3dvlm demo $(DEMO_OPTIONS)

test: $(VENV)/.installed  ## Run the test suite, in as many processes as there are cores
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(TEST_OPTIONS)

test-slow: $(VENV)/.installed  ## Run the tests that need minutes or gigabytes
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed  ## Lint, formatting and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed  ## Mend lint and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

goldens: $(VENV)/.installed  ## Print the differences from the original implementation
	HF_HUB_OFFLINE=1 $(BIN)/python tests/golden_cases.py

bench: $(VENV)/.installed  ## Measure speed and memory on this machine, and the cache of volumes
	HF_HUB_OFFLINE=1 $(BIN)/med3dvlm bench $(BENCH_OPTIONS)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/bench_cache.py

phantom-scores: $(VENV)/.installed  ## Train the recipes phantom/* in full and score them: about an hour and a half on two cores
	HF_HUB_OFFLINE=1 $(BIN)/med3dvlm demo --full --output phantom_scores

ablations: $(VENV)/.installed  ## Compare losses, encoders and projectors on phantoms, three seeds each
	HF_HUB_OFFLINE=1 $(BIN)/python -m med3dvlm.train.ablations ablations

coverage: $(VENV)/.installed  ## Run the test suite and print what it covers
	$(BIN)/python -m pytest $(FOLDERS:%=--cov=%) --cov-report=term

api: $(VENV)/.installed  ## Print the share of public definitions that are documented, typed and tested
	$(BIN)/python tests/api_summary.py

build: $(VENV)/.installed  ## Build the wheel and the source distribution
	rm -rf build dist
	$(BIN)/python -m build --outdir dist

clean:  ## Remove what the other targets made
	rm -rf $(VENV) build dist demo_output phantom_scores ablations benchmark .pytest_cache .mypy_cache .ruff_cache *.egg-info
