"""The recipe of the shipped model, on a few rows: stopped, gone on with, and its copy."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import orbax.checkpoint as ocp
import pytest

from bpd_jax.addons.heads import Heads
from bpd_jax.data.rows import load_rows, TASKS, VOCABULARY_FILE
from bpd_jax.data.token_cache import write_cache
from bpd_jax.folders import read_object
from bpd_jax.generation import load
from bpd_jax.vocabulary import open_vocabulary

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "STEPS": 4, "SETTLE_STEPS": 30, "HEADS_STEPS": 110, "SETTLE_OUTPUTS": 4, "HEADS_OUTPUTS": 4,
    "BATCH_SIZE": 8, "MICROBATCHES": 1, "INPUT_LENGTH": 256, "NUM_DECODED": 1,
    "ModelConfig.d_model": 16, "ModelConfig.d_ff": 16, "ModelConfig.d_kv": 8,
    "ModelConfig.num_heads": 2, "ModelConfig.num_encoder_layers": 1,
    "ModelConfig.num_decoder_layers": 1, "Heads.d_ff": 16,
    "Validation.max_examples": 8,
}


@pytest.mark.slow  # Trains, decodes and trains again in four processes.
@pytest.mark.parametrize("file", ["recipe.gin", "recipe_gpu.gin"])
def test_one_command_from_caches_to_the_copy(tmp_path, file):
  vocabulary = open_vocabulary(VOCABULARY_FILE, 4096)
  encode = lambda text: [*vocabulary.encode(text), 1]
  for task in TASKS:
    rows = load_rows(task, "validation")[:12]
    write_cache(
        tmp_path / f"caches/{task}.train",
        ((encode(row["inputs"]), encode(row["targets"])) for row in rows),
        task=task, split="train", vocabulary=vocabulary,
    )
  folder = tmp_path / "runs"
  values = {"RUNS": str(folder), "CACHES": str(tmp_path / "caches"), **TINY}
  command = [
      sys.executable, "experiments/docstrings/recipe.py",
      f"--gin_file=experiments/docstrings/{file}",
      *(f"--gin.{name}={value!r}" for name, value in values.items()),
  ]

  def run(*more):
    done = subprocess.run(
        [*command, *more], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  # Before a stage could end, and then as if nothing had been.
  assert "grow was stopped; the same command goes on" in run("--stop_after", "1")
  assert not (folder / "recipe.json").exists()
  out = run()
  assert list(read_object(folder / "recipe.json")) == ["grow", "settle", "heads"]
  for stage in ("grow", "settle"):
    assert f"heads: from {folder}/{stage}/model" in out
  lines = [
      json.loads(line) for line in (folder / "learning_curves.jsonl").read_text().splitlines()
  ]
  last = {line["run"]: line["step"] for line in lines}
  assert last == {"grow": 4, "settle": 30, "heads": 110}
  model = load(folder / "shipped")
  assert model.own_heads[0] == Heads(9, 16) and model.config.dtype == "float32"
  for part in ("params", "addons/heads/params"):
    with ocp.StandardCheckpointer() as checkpointer:
      stored = checkpointer.metadata(folder / "shipped" / part).item_metadata.tree
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(stored)} == {"bfloat16"}, part
  prompts = [load_rows("grammar")[0]["inputs"]]
  assert model.generate(prompts, "blockwise", max_length=4).block_efficiency >= 1
  # All is done: nothing is trained again.
  assert "new run in" not in run() and "goes on in" not in run()
