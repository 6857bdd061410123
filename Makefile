# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto
SEEDS ?= 20000
RACE_ROUNDS ?= 1000
KILLS ?= 200
FUZZ_CASES ?= 200000

.PHONY: help demo test lint format bench simulate soak notebooks clean

help:
	@echo "make demo       flights through a windowed job that is killed three times; compares the outputs"
	@echo "make test       all tests, WORKERS=$(WORKERS) at a time"
	@echo "make lint       ruff and mypy --strict"
	@echo "make bench      benchmarks; figures are printed and written to build/bench"
	@echo "make simulate   SEEDS=$(SEEDS) simulated schedules of writers, compactor, collector and faults"
	@echo "make soak       the large counts: KILLS=$(KILLS) real kills, RACE_ROUNDS=$(RACE_ROUNDS) races of eight openers, FUZZ_CASES=$(FUZZ_CASES)"
	@echo "make notebooks  execute the notebooks in place"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# A stamp for each set of extras, renewed when the dependencies change; dev includes the others.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	@test -f $(VENV)/.dev -a $(VENV)/.dev -nt pyproject.toml || $(BIN)/python -m pip install --quiet -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m operators demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not soak" -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks $(ARGS)

simulate: $(VENV)/.dev
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

soak: $(VENV)/.dev
	KILLS=$(KILLS) RACE_ROUNDS=$(RACE_ROUNDS) FUZZ_CASES=$(FUZZ_CASES) $(BIN)/python -m pytest -m soak -s --timeout=0 $(ARGS)

notebooks: $(VENV)/.dev
	$(BIN)/python -m tests.support.notebooks notebooks/*.ipynb

clean:
	rm -rf $(VENV) build *.egg-info
