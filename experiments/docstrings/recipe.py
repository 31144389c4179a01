"""The shipped model from nothing, in one command that goes on where it was stopped.

  python experiments/docstrings/recipe.py [--gin_file=FILE] [--gin.NAME=VALUE …]

Token caches; base and heads together; the learning rate's fall, with the model's own
outputs; the heads' last lesson; a small copy: the stages of `recipe.gin`, each in a process
of its own.
"""

import argparse
from collections.abc import Sequence
import contextlib
import json
from pathlib import Path
import signal
import subprocess
import sys
import time

import gin
import jax
import jax.numpy as jnp

from bpd_jax.addons.folder import load_addon, save_model_with
from bpd_jax.checkpoints import describe
from bpd_jax.data.rows import TASKS
from bpd_jax.errors import check_number
from bpd_jax.folders import new_file, read_object, write_object
from bpd_jax.generation import load
from bpd_jax.launch import read_gin, run
from bpd_jax.terminal import plain_console
from bpd_jax.train import ADDON_FOLDER, MODEL_FOLDER, train
from bpd_jax.vocabulary import vocabulary_path

RECIPE = "experiments/docstrings/recipe.gin"
# Scopes of the recipe in their order; each begins with the model of the one before.
TRAINING = ("grow", "settle", "heads")
# Beside the stages' folders: seconds of those that are done, figures of all, the copy.
DONE_FILE = "recipe.json"
CURVES_FILE = "learning_curves.jsonl"
SHIPPED_FOLDER = "shipped"
# What a stage that is stopped has to save its state.
GRACE = 60


def macro(name: str) -> str:
  """The value of a macro of the recipe."""
  return gin.query_parameter(f"{name}/gin.macro.value")


def cache_command(folder: Path) -> list[str] | None:
  """The command that makes the token caches; None where all are there."""
  missing = [task for task in TASKS if not (folder / f"{task}.train").is_dir()]
  if not missing:
    return None
  return ["-m", "bpd_jax.prepare", "cache", *missing, "--split", "train", "--to", str(folder)]


def ship(source: Path, addon: Path, target: Path) -> None:
  """Copies a base and its heads, parameters in bfloat16, read back as float32."""
  base = load(source)
  heads, own = load_addon(addon, base)
  params, own = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (base.params, own))
  # Whoever loads the folder computes in float32, however it was trained.
  config = base.config.replace(dtype="float32")
  save_model_with(
      target, config, params, vocabulary_path(source), heads, own, may_replace=True
  )
  # Orbax notes where it wrote, for file systems without renaming; nothing reads it here.
  for note in target.rglob("commit_success.txt"):
    note.unlink()
  print(describe({"base": params, "own": own}, heads.describe(config)))
  print(f"written to  {target}")


def write_curves(folder: Path) -> None:
  """Joins the figures of all stages, each line with its stage."""
  with new_file(folder / CURVES_FILE) as partial, open(partial, "w", encoding="utf-8") as file:
    for stage in TRAINING:
      path = folder / stage / "metrics.jsonl"
      for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        figures = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in json.loads(line).items()
        }
        file.write(json.dumps({"run": stage} | figures) + "\n")


def run_stage(arguments: Sequence[str], seconds: float) -> tuple[int, bool]:
  """Runs a process, asked to stop after so many seconds: its status, whether it was asked."""
  process = subprocess.Popen([sys.executable, *arguments])
  try:
    return process.wait(timeout=seconds), False
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGTERM)
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(timeout=GRACE)
  process.kill()
  # It may have been asked before it could listen, or not have been done in time: what it has
  # saved before is there.
  status = process.wait()
  return (0 if status in (-signal.SIGTERM, -signal.SIGKILL) else status), True


def main(argv: Sequence[str]) -> int:
  """Runs the stages that aren't done; the first that fails ends it with its status."""
  parser = argparse.ArgumentParser(
      description=__doc__.splitlines()[0], epilog="Other options are those of bpd_jax.train."
  )
  parser.add_argument(
      "--stop_after", type=float, metavar="SECONDS", default=float("inf"),
      help="save and end after about so many; the same command goes on",
  )
  parser.add_argument("--stage", choices=TRAINING, help="train this one alone, in this process")
  args, rest = parser.parse_known_args(argv)
  check_number("--stop_after", args.stop_after, "a positive number", lambda x: x > 0)
  if not any(option.startswith("--gin_file") for option in rest):
    rest = [f"--gin_file={RECIPE}", *rest]
  read_gin(rest, "python experiments/docstrings/recipe.py", __doc__.splitlines()[0])
  if args.stage:
    with gin.config_scope(args.stage):
      train()
    return 0

  ends = time.monotonic() + args.stop_after
  console, folder = plain_console(), Path(macro("RUNS"))
  done = read_object(folder / DONE_FILE) if (folder / DONE_FILE).is_file() else {}
  stages, checkpoint = {}, None
  for stage in TRAINING:
    places = {"WORKDIR": str(folder / stage), "CHECKPOINT": checkpoint}
    bindings = [f"--gin.{name}={value!r}" for name, value in places.items()]
    stages[stage] = [__file__, "--stage", stage, *rest, *bindings]
    checkpoint = str(folder / stage / MODEL_FOLDER)
  if caching := cache_command(Path(macro("CACHES"))):
    stages = {"caches": caching} | stages
  for stage, arguments in stages.items():
    if stage in done:
      continue
    console.rule(stage)
    began = time.monotonic()
    status, was_stopped = run_stage(arguments, max(0.1, ends - began))
    if status:
      return status
    if was_stopped:
      console.print(f"{stage} was stopped; the same command goes on with it")
      return 0
    folder.mkdir(parents=True, exist_ok=True)
    done[stage] = round(time.monotonic() - began)
    write_object(folder / DONE_FILE, done)
    write_curves(folder)
  ship(
      folder / TRAINING[-2] / MODEL_FOLDER, folder / TRAINING[-1] / ADDON_FOLDER,
      folder / SHIPPED_FOLDER,
  )
  return 0


if __name__ == "__main__":
  run(main)
