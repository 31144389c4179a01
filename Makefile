PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu

# The core's tests: decoding, model, training, partitioning, checkpoints, n-grams. They need
# none of the extras that data or peers need.
CORE := $(addprefix tests/test_,$(addsuffix .py, \
  accept compiled decode exactness generation lattice loop own_drafter replay rescored_model \
  rescoring search model probes shipped batches loop_training step train train_input \
  train_modes partitioning checkpoints ngram ngram_arpa ngram_arrays ngram_bounds \
  ngram_smoothing))

.PHONY: install run demo test test-slow test-newest mutate benchmark lint clean

install: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[cpu,test]'
	touch $@

# New heads behind the shipped base, then base, new and shipped heads side by side.
run: BEGAN := $(shell date +%s)
run: install
	$(BIN)/python experiments/docstrings/quickstart.py --began $(BEGAN)

# The shipped model, greedy, blockwise and by default, and one decode with its drafts.
demo: install
	rm -rf runs/demo
	$(BIN)/python -m bpd_jax.evaluate --gin_file=experiments/docstrings/demo.gin
	$(BIN)/python -m bpd_jax.decode --checkpoint experiments/docstrings/model \
	  --method blockwise --show-drafts \
	  --file experiments/docstrings/prompt.jsonl --field inputs

# Compiling takes one core; the files of the tests share two, the longest first.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

test: install
	$(BIN)/python -m pytest $(SHARED)

test-slow: install
	$(BIN)/python -m pytest -m slow

# The core, slow tests too, on the newest releases that setup.py allows and this Python has, in an environment
# of their own. Those of jax want Python 3.12 or newer: `make test-newest PYTHON=python3.13`.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --no-compile --upgrade \
	  --upgrade-strategy eager -e '.[cpu,test-core]'
	.venv-newest/bin/python -c 'from bpd_jax import environment; print(environment.versions())'
	.venv-newest/bin/python -m pytest $(SHARED) -m "" $(CORE)

mutate: install
	$(BIN)/python tests/mutate.py

# Beside transformers and CTranslate2; see docs/benchmark.md. Wants an idle machine.
benchmark: install
	$(BIN)/python -m bpd_jax.benchmark decode
	$(BIN)/python -m bpd_jax.benchmark rescoring
	$(BIN)/python -m bpd_jax.benchmark train

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-newest build dist *.egg-info runs/test_programs runs/test_bytecode
