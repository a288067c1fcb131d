# make demo   set everything up, then watch ConDU learn a sequence of tasks (results in runs/demo)
# make test   set everything up, then run the tests
# make bench  the benchmarks (condu bench, under pytest-benchmark); make lint: the linters

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/* benchmarks/lab/*.cpp tests/condu_ext/cuda_on_cpu/*)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: demo test bench lint format clean

demo: $(VENV)/train.stamp
	$(BIN)/condu demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

bench: $(VENV)/dev.stamp
	$(BIN)/python -m pytest benchmarks

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/readme_table.py --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[train]"
	touch $@

$(VENV)/dev.stamp: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[train,dev]"
	touch $@ $(VENV)/train.stamp

clean:
	rm -rf build dist $(VENV) condu_ext/*.so *.egg-info
