PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu

.PHONY: install run test test-slow mutate benchmark lint clean

install: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,test]'
	touch $@

# A random T5 in, all methods over real text out; see experiments/random_t5.
run: install
	rm -rf runs/random_t5
	$(BIN)/python experiments/random_t5/make_t5.py runs/random_t5
	$(BIN)/python -m bpd_jax.import_checkpoint --from runs/random_t5/transformers --to runs/random_t5/model
	$(BIN)/python -m bpd_jax.evaluate --gin_file=gin/runs/evaluate_jsonl.gin \
	  --gin.CHECKPOINT="'runs/random_t5/model'" --gin.ROWS="'runs/random_t5/rows.jsonl'" \
	  --gin.OUTPUT="'runs/random_t5/results'"

# Compiling takes one core; the files of the tests share two.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

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
	rm -rf .venv build dist *.egg-info
