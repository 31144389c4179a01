"""Measures decoding methods on the rows of tasks, from one model folder.

  python -m bpd_jax.evaluate --gin_file=gin/runs/evaluate.gin \\
      --gin.CHECKPOINT="'models/flan-small'" --gin.ROWS="'rows.jsonl'"

Prints a table, and writes `results.json` and each method's outputs as JSONL.
"""

from collections.abc import Sequence
import importlib.metadata
import json
from pathlib import Path
import platform
import subprocess
from typing import Any

import gin
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.errors import InputError
from bpd_jax.evaluation.run import (
    describe_device,
    describe_repetition,
    fingerprint,
    GREEDY,
    measure_methods,
    Measurement,
    Method,
)
from bpd_jax.folders import check_new, write_object
from bpd_jax.generation import load
from bpd_jax.launch import read_gin, run
from bpd_jax.partitioning import Partitioning

# A narrower console would cut figures off.
TABLE_WIDTH = 110

PACKAGES = ("bpd_jax", "jax", "jaxlib", "flax", "numpy")


@gin.configurable(module="bpd_jax")
def evaluate(
    checkpoint: str,
    tasks: Sequence[JsonlTask],
    methods: Sequence[Method],
    output: str,
    *,
    batch_size: int = 8,
    max_decode_length: int = 128,
    repeats: int = 3,
    dtype: str | None = None,
    partitioning: Partitioning | None = None,
) -> dict[str, Any]:
  """Evaluates; greedy is always among the methods.

  Args:
    checkpoint: a model folder.
    tasks: whose rows to decode.
    methods: how.
    output: a folder that doesn't exist yet, for `results.json` and
      `TASK.METHOD.jsonl`.
    batch_size: rows decoded together.
    max_decode_length: most tokens of an output.
    repeats: timed passes of each method.
    dtype: to compute in, instead of the checkpoint's.
    partitioning: where the model lives; one device by default.

  Returns:
    What `results.json` holds.

  Raises:
    InputError: for a bad argument or row, before anything is compiled.
    SystemExit: with status 1 at the end where a method's tokens aren't
      greedy's and can't be near ties.
  """
  check_new(output)
  names = [task.name for task in tasks]
  if not names or len(set(names)) < len(names):
    raise InputError("tasks", names, "at least one, with names that differ")
  rows = {task.name: task.rows() for task in tasks}
  model = load(checkpoint, partitioning=partitioning, dtype=dtype)
  results = {
      "device": describe_device(),
      "dtype": model.config.dtype,
      "git_revision": git_revision(),
      "versions": versions(),
      "rows_fingerprint": fingerprint([row["inputs"] for name in names for row in rows[name]]),
      "checkpoint": checkpoint,
      "batch_size": batch_size,
      "max_decode_length": max_decode_length,
      "tasks": {},
  }
  console, measured = Console(), {}
  console.width = max(console.width, TABLE_WIDTH)
  columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
             TimeRemainingColumn())
  with Progress(*columns, console=console) as progress:
    for task in tasks:
      measured[task.name] = measure_methods(
          model, [row["inputs"] for row in rows[task.name]], methods,
          max_decode_length=max_decode_length, batch_size=batch_size, repeats=repeats,
          progress=progress, label=task.name,
      )
  for task in tasks:
    results["tasks"][task.name] = {
        "split": task.split,
        "examples": len(rows[task.name]),
        "repetition": describe_repetition(measured[task.name][GREEDY.name].generation),
        "methods": {name: x.results for name, x in measured[task.name].items()},
    }
    console.print(result_table(task.name, results["tasks"][task.name]))
    for name, measurement in measured[task.name].items():
      for difference in measurement.differences:
        console.print(f"{task.name}, {name}: {difference}", highlight=False)
  _write(Path(output), results, rows, measured)
  console.print(f"written to {output}", highlight=False)
  wrong = [
      f"{task} {name}" for task, methods in measured.items() for name, x in methods.items()
      if not x.is_exact
  ]
  if wrong:
    raise SystemExit(f"error: tokens that aren't greedy's: {', '.join(wrong)}")
  return results


def result_table(task: str, results: dict[str, Any]) -> Table:
  """A task's methods, one a row."""
  repetition = results["repetition"]
  table = Table(
      title=f"{task}: {results['examples']} rows of {results['split']}, "
      f"{repetition['looping_rows']:.0%} of greedy's outputs loop",
      box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0),
  )
  table.add_column("method", no_wrap=True)
  for name in ("width of h", "calls", "tokens", "block efficiency", "95 %", "loop-free",
               "identical", "near ties", "tokens/s", "speed-up"):
    table.add_column(name, justify="right")
  for name, entry in results["methods"].items():
    low, high = entry["block_efficiency_interval"]
    free = entry["block_efficiency_loop_free"]
    table.add_row(
        name, f"{entry['verify_width']}/{entry['block_size']}",
        f"{entry['decoder_calls']:,}", f"{entry['tokens']:,}",
        f"{entry['block_efficiency']:.3f}", f"{low:.2f}–{high:.2f}",
        "–" if free is None else f"{free:.3f}", f"{entry['identical_to_greedy']:.1%}",
        str(entry["near_tie_rows"]), f"{entry['tokens_per_second']:,.0f}",
        f"{entry['speedup_over_greedy']:.2f}×",
    )
  return table


def git_revision() -> str | None:
  """The revision of the source tree, None outside one."""
  done = subprocess.run(
      ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
      capture_output=True, text=True, check=False,
  )
  return done.stdout.strip() or None


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that compute."""
  return {"python": platform.python_version()} | {
      name: importlib.metadata.version(name) for name in PACKAGES
  }


def _write(
    folder: Path, results: dict[str, Any], rows: dict[str, list[dict[str, str]]],
    measured: dict[str, dict[str, Measurement]],
) -> None:
  """Writes `results.json` and the outputs."""
  try:
    folder.mkdir(parents=True)
    for task, methods in measured.items():
      for name, measurement in methods.items():
        out = measurement.generation
        with open(folder / f"{task}.{name}.jsonl", "w", encoding="utf-8") as file:
          for row, text, tokens, calls in zip(rows[task], out.texts, out.tokens, out.calls):
            line = {**row, "output": text, "tokens": tokens.tolist(), "decoder_calls": calls}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_object(folder / "results.json", results)
  except OSError as error:
    allowed = f"a path that can be written ({error.strerror})"
    raise InputError("output", str(folder), allowed) from error


def main(argv: Sequence[str]) -> None:
  """Evaluates as gin says; see `--help`."""
  read_gin(argv, "python -m bpd_jax.evaluate", __doc__.splitlines()[0])
  evaluate()


if __name__ == "__main__":
  run(main)
