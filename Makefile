# make demo and make test create the virtual environment .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-fast campaign lint format clean
help:
	@echo "make demo       set up; train, evaluate and sample a digits model in runs/digits (minutes)"
	@echo "make test       set up and run all tests (minutes)"
	@echo "make test-fast  set up and run the fast tests of the core (under a minute)"
	@echo "make campaign   set up; damage files and kill trainings at random (FILES=, KILLS=)"
	@echo "make lint       check style and types"
	@echo "make format     format the code"
	@echo "make clean      remove the virtual environment and caches, but not runs"

# Install torch first: the pin selects its CPU build, which later packages must not replace.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# By default waiting threads spin, and starve one another on a busy machine.
demo: export OMP_WAIT_POLICY = PASSIVE
demo: $(READY)
	$(BIN)/ndm train --config digits --out runs/digits
	$(BIN)/ndm evaluate runs/digits --split test --json runs/digits/evaluation.json
	$(BIN)/ndm sample runs/digits --n 64 --method ancestral --steps 250 --seed 1 --out runs/digits/samples-ancestral.png

# One thread per process: on two cores, two processes of two threads each are ten times slower.
test: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 -q

FAST := tests/test_*.py tests/variants tests/value_grid tests/autodiff tests/data
test-fast: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 -q -m "not slow" $(FAST)

# An hour or more; FILES=500 KILLS=4 take two minutes.
FILES ?= 20000
KILLS ?= 60
campaign: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m campaign.campaign --files $(FILES) --kills $(KILLS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/ndm.egg-info
