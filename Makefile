PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu

.PHONY: install run test test-slow mutate lint benchmark clean

install: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,test]'
	touch $@

run: install
	$(BIN)/python -m experiments.quickstart.run

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

mutate: install
	$(BIN)/python tests/mutate.py

lint: install
	$(BIN)/ruff check .

benchmark: install
	$(BIN)/python -m bpd_jax.benchmark decode

clean:
	rm -rf .venv build dist *.egg-info
