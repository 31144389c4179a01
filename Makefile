PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu

.PHONY: install run demo test test-slow mutate benchmark lint clean

install: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[cpu,test]'
	touch $@

# New heads behind the shipped base, then base, new and shipped heads side by side.
run: BEGAN := $(shell date +%s)
run: install
	$(BIN)/python experiments/docstrings/quickstart.py --began $(BEGAN)

# The shipped model, greedy and blockwise, and one decode with its drafts.
demo: install
	rm -rf runs/demo
	$(BIN)/python -m bpd_jax.evaluate --gin_file=experiments/docstrings/demo.gin
	$(BIN)/python -m bpd_jax.decode --checkpoint experiments/docstrings/model --show-drafts \
	  --file experiments/docstrings/prompt.jsonl --field inputs

# Compiling takes one core; the files of the tests share two. Most of their time is
# compiling programs that run once, so LLVM optimises nothing, and fusions are emitted
# the old way, which takes a third of the time.
test: install
	XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
	  --xla_cpu_use_fusion_emitters=false" $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

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
	rm -rf .venv build dist *.egg-info runs/test_programs runs/test_bytecode
