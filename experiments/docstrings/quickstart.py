"""The whole job in one command: trains new heads, then evaluates base, new and shipped heads.

  python experiments/docstrings/quickstart.py [--began SECONDS]

Runs the commands that it prints, in the repository's root, and leaves all in
`runs/quickstart`: `results.json`, both evaluations, and the heads' run with its
checkpoints and operative configuration.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
import shutil
import subprocess
import sys
import time
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bpd_jax.folders import read_object, write_object
from bpd_jax.launch import run
from bpd_jax.terminal import plain_console

OUTPUT = Path("runs/quickstart")
# What shows how good heads are, and what decodes by default.
FIXED, DEFAULT = "blockwise", "auto"
TABLE_WIDTH = 140
NUM_ROWS = 25  # of each task, decoded together


def commands() -> dict[str, list[str]]:
  """Stages by name: a module of the package and its arguments."""
  evaluate = lambda name, *options: [
      "evaluate", "--gin_file=experiments/docstrings/demo.gin",
      f"--gin.OUTPUT='{OUTPUT / name}'", f"--gin.MAX_EXAMPLES={NUM_ROWS}", *options,
  ]
  return {
      "train new heads": ["train", "--gin_file=experiments/docstrings/quickstart.gin"],
      "evaluate new heads": evaluate("new", f"--gin.ADDON='{OUTPUT / 'heads/addon'}'"),
      "evaluate shipped heads": evaluate("shipped"),
  }


def summarise(results: dict[str, dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
  """What `results.json` holds: the tasks with all three, and the stages' seconds."""
  shipped = results["shipped"]
  kept = ("main_metric", "quality", "quality_interval", "quality_floors", "repetition", "learned")
  tasks = {}
  for name, task in shipped["tasks"].items():
    tasks[name] = {field: task[field] for field in ("examples", *kept)}
    tasks[name]["models"] = {
        "base": task["methods"]["greedy"],
        **{
            which: {kind: found["tasks"][name]["methods"][kind] for kind in (FIXED, DEFAULT)}
            for which, found in results.items()
        },
    }
  common = ("device", "dtype", "git_revision", "versions", "batch_size", "max_decode_length")
  return {field: shipped[field] for field in common} | {
      "seconds": seconds,
      "tasks": tasks,
      "means_over_learned_tasks": {
          which: found["means_over_learned_tasks"] for which, found in results.items()
      },
  }


def print_summary(summary: dict[str, Any], console: Console) -> None:
  """Quality of each task, block efficiency and tokens a second of all three, and the times."""
  table = Table(box=box.SIMPLE_HEAD, caption_justify="left", caption=(
      f"{summary['device']}, batch {summary['batch_size']}. Block efficiency: tokens a decoder "
      "call where all heads draft; greedy's is 1. Tokens/s are of the block sizes that are chosen "
      "by default; they have the encoder in them and compilation not."
  ))
  table.add_column("task")
  table.add_column("quality")
  for title in ("rows", "base\ntokens/s", "new heads\nefficiency", "\ntokens/s",
                "shipped heads\nefficiency", "\ntokens/s"):
    table.add_column(title, justify="right")
  for name, task in summary["tasks"].items():
    models, metric = task["models"], task["main_metric"]
    floor = max(task["quality_floors"].values())
    learned = "learned" if task["learned"] else ("not learned", "red")
    table.add_row(
        name,
        Text.assemble(f"{metric} {task['quality'][metric]:.2f}, floor {floor:.2f}: ", learned),
        str(task["examples"]), f"{models['base']['tokens_per_second']:,.0f}",
        *(cell for which in ("new", "shipped") for cell in (
            f"{models[which][FIXED]['block_efficiency']:.2f}",
            f"{models[which][DEFAULT]['tokens_per_second']:,.0f}",
        )),
    )
  # A narrower console would break words.
  console.width = max(console.width, TABLE_WIDTH)
  console.print(table)
  for which, found in summary["means_over_learned_tasks"].items():
    mean = found["methods"].get(FIXED)
    words = f"{mean['block_efficiency']:.2f}" if mean else "–, as none is learned"
    console.print(f"block efficiency over learned tasks, {which} heads: {words}")
  for stage, seconds in summary["seconds"].items():
    console.print(f"{stage:24}{seconds:7.0f} s")


def main(argv: Sequence[str]) -> int:
  """Runs the stages one by one; the first that fails ends it with its status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
      "--began", type=float, metavar="SECONDS",
      help="when installing began, since 1970, to count it as a stage",
  )
  args = parser.parse_args(argv)
  began = time.time()
  seconds = {} if args.began is None else {"install": began - args.began}
  shutil.rmtree(OUTPUT, ignore_errors=True)
  console = plain_console()
  for stage, arguments in commands().items():
    console.rule(stage)
    console.print(f"$ python -m bpd_jax.{' '.join(arguments)}", soft_wrap=True)
    start = time.time()
    module, *options = arguments
    done = subprocess.run([sys.executable, "-m", f"bpd_jax.{module}", *options], check=False)
    if done.returncode:
      return done.returncode
    seconds[stage] = time.time() - start
  seconds["all"] = time.time() - (began if args.began is None else args.began)
  results = {name: read_object(OUTPUT / name / "results.json") for name in ("new", "shipped")}
  summary = summarise(results, seconds)
  write_object(OUTPUT / "results.json", summary)
  console.rule("results")
  print_summary(summary, console)
  console.print(f"written to {OUTPUT / 'results.json'}")
  return 0


if __name__ == "__main__":
  run(main)
