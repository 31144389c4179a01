"""Tiny runs of `python -m bpd_jax.train`, in this process or in one of their own."""

import functools
import json
import os
from pathlib import Path
import random
import subprocess
import sys
from unittest import mock

import gin
import jax
import numpy as np
import orbax.checkpoint as ocp

from bpd_jax import launch, train
from bpd_jax.addons.folder import load_addon
from bpd_jax.generation import load

ROOT = Path(__file__).resolve().parent.parent
FILES = ("gin/models/tiny.gin", "gin/tasks/jsonl_train.gin", "gin/runs/train.gin")
HEADS_FILES = ("gin/tasks/jsonl_train.gin", "gin/runs/train_heads.gin")
# What makes a run tiny: T5 1.1 of width 16 on bytes.
SIZES = {
    "BLOCK_SIZE": 3, "VOCAB_SIZE": 260, "ModelConfig.d_model": 16, "ModelConfig.d_ff": 16,
    "ModelConfig.d_kv": 8, "ModelConfig.num_heads": 2, "ModelConfig.num_encoder_layers": 1,
    "ModelConfig.num_decoder_layers": 1, "Heads.d_ff": 16,
}
LENGTHS = {"BATCH_SIZE": 4, "INPUT_LENGTH": 8, "TARGET_LENGTH": 12, "WARMUP_STEPS": 4}


# Runs of one description in one process have one step, so that it is traced once for all.
SHARED_STEP = functools.lru_cache(train.Step)


def write_rows(folder, num_rows=40):
  """Words whose letters are doubled: `train.jsonl`, `validation.jsonl`, and bytes' vocabulary."""
  rng = random.Random(0)
  for name, count in (("train", num_rows), ("validation", 6)):
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(count)]
    rows = [{"inputs": word, "targets": "".join(2 * letter for letter in word)} for word in words]
    write_jsonl(folder / f"{name}.jsonl", rows)
  (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')


def write_jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(rows, workdir, files=FILES, **values):
  """The command line of a run.

  Args:
    rows: a folder from `write_rows`.
    workdir: the run's folder.
    files: of gin.
    **values: macros, and parameters with "__" for ".".
  """
  values = {
      "ROWS": str(rows / "train.jsonl"), "VALIDATION_ROWS": str(rows / "validation.jsonl"),
      "WORKDIR": str(workdir), **LENGTHS,
      **({} if "CHECKPOINT" in values
         else {"VOCABULARY": str(rows / "tokenizer_config.json"), **SIZES}),
      **{name.replace("__", "."): value for name, value in values.items()},
  }
  return [*(f"--gin_file={file}" for file in files),
          *(f"--gin.{name}={value!r}" for name, value in values.items())]


def run(argv, main=train.main):
  """Runs a command in this process; its exit status."""
  try:
    with mock.patch.object(train, "Step", SHARED_STEP):
      launch.run(main, argv)
  except SystemExit as ended:
    return ended.code or 0
  finally:
    gin.clear_config()


def error_of(argv, capsys):
  """Runs a command that must end with status 2; the only line on standard error."""
  capsys.readouterr()
  assert run(argv) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), lines
  return lines[0].removeprefix("error: ")


def start(argv, module="bpd_jax.train", **options):
  """Starts a command in a process of its own."""
  options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
  options.setdefault("env", {**os.environ, "JAX_PLATFORMS": "cpu"})
  return subprocess.Popen([sys.executable, "-m", module, *argv], cwd=ROOT, **options)


def last_state(workdir):
  """The step of a run's last state, and its arrays by name."""
  steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(workdir / "checkpoints" / str(max(steps)) / "default")
  return max(steps), leaves(tree)


def model_params(workdir):
  """Arrays of a run's model and of its heads by name, as in its state."""
  model = load(workdir / "model")
  return leaves({"base": model.params, "own": model.own_heads[1]})


def addon_params(workdir, base):
  """Arrays of what a run trained behind a model folder, by name, as in its state."""
  return leaves({"own": load_addon(workdir / "addon", load(base))[1]})


def cut(*paths):
  """Truncates files."""
  assert paths
  for path in paths:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def leaves(tree):
  return {
      jax.tree_util.keystr(path): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_same(found, expected):
  """The same names, and the same bits."""
  assert set(found) == set(expected)
  different = [name for name in found if found[name].tobytes() != expected[name].tobytes()]
  assert not different
