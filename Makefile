# Two commands do everything, on a fresh machine, with or without a GPU:
#   make train    set up, then train a small model here on real text
#   make test     set up, then run the tests
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= configs/runs/tiny_cpu.yaml

.PHONY: train test test-fast clean

train: $(VENV)/.train
	$(BIN)/distca train $(RUN)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 -m "not slow"
	$(BIN)/python -m pytest -n 3 -m "slow and not alone"
	$(BIN)/python -m pytest -m alone

test-fast: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not slow"

# A stamp per set of packages: nothing is installed again until pyproject.toml or constraints.txt changes.
$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.train

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build *.egg-info
