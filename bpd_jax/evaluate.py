"""Measures decoding methods on the rows of tasks, from one model folder.

  python -m bpd_jax.evaluate --gin_file=gin/runs/evaluate.gin \\
      --gin.CHECKPOINT="'models/docstrings'" --gin.OUTPUT="'runs/docstrings'"

Prints a table, and writes `results.json` and each method's outputs as JSONL;
docs/reading_results.md says what the figures mean.
"""

from collections.abc import Sequence
import importlib.util
import itertools
import json
from pathlib import Path
import re
from typing import Any

import gin
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
  track,
)

from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.rows import rows_fingerprint, RowsTask
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.environment import describe_device, git_revision, versions
from bpd_jax.errors import InputError
from bpd_jax.evaluation.quality import check_metric, describe_quality
from bpd_jax.evaluation.replay import record
from bpd_jax.evaluation.report import analyse_task, make_report
from bpd_jax.evaluation.run import GREEDY, measure_methods, Measurement, Method
from bpd_jax.evaluation.scoring import load_scoring
from bpd_jax.evaluation.table import means_over_learned, print_results
from bpd_jax.evaluation.tuning import split_rows, tune, Tuning
from bpd_jax.folders import new_folder, write_object
from bpd_jax.generation import Generator, input_bucket, load
from bpd_jax.launch import read_gin, run
from bpd_jax.partitioning import Partitioning

Task = RowsTask | JsonlTask


@gin.configurable(module="bpd_jax")
def evaluate(
    checkpoint: str,
    tasks: Sequence[Task],
    methods: Sequence[Method],
    output: str,
    *,
    batch_size: int = 8,
    max_decode_length: int = 128,
    repeats: int = 3,
    tuning: Tuning | None = None,
    has_report: bool = False,
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
    tuning: how the scorers' weights are chosen for each task, on rows of it that
      aren't reported then; the weights are as the scorers say without it.
    has_report: whether to analyse drafts as well and write `analysis.json` and
      `report.html`; needs the extra `report`.
    dtype: to compute in, instead of the checkpoint's.
    partitioning: where the model lives; one device by default.

  Returns:
    What `results.json` holds.

  Raises:
    InputError: for a bad argument or row, before anything is compiled.
    SystemExit: with status 1 at the end where a method's tokens aren't
      greedy's and can't be near ties.
  """
  _check_names(tasks, methods)
  if has_report and importlib.util.find_spec("matplotlib") is None:
    raise InputError("has_report", True, "False, as matplotlib isn't installed (extra report)")
  every = {task.name: task.rows() for task in tasks}
  chosen = {
      name: split_rows([row["inputs"] for row in own], tuning.num_rows if tuning else 0)
      for name, own in every.items()
  }
  rows = {name: [every[name][i] for i in reported] for name, (_, reported) in chosen.items()}
  # The folder is made first: no hours of decoding for what can't be written.
  with new_folder(output) as folder:
    model = load(checkpoint, partitioning=partitioning, dtype=dtype)
    encoded = {task.name: _encode(model, task, every[task.name]) for task in tasks}
    prompts = {name: [own[i] for i in chosen[name][1]] for name, own in encoded.items()}
    # One for all recordings, so that each method is replayed by one program.
    input_length = input_bucket(max(map(len, itertools.chain(*encoded.values()))))
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
      scoring = {
          task.name: _choose_weights(
              model, task.name, [encoded[task.name][i] for i in chosen[task.name][0]], methods,
              tuning, max_decode_length, input_length, batch_size, progress,
          )
          for task in tasks
      }
      measured = {
          task.name: measure_methods(
              model, prompts[task.name], methods, max_decode_length=max_decode_length,
              batch_size=batch_size, repeats=repeats, progress=progress, label=task.name,
              scoring=scoring[task.name],
          )
          for task in tasks
      }
    results = {
        "device": describe_device(),
        "dtype": model.config.dtype,
        "git_revision": git_revision(),
        "versions": versions(),
        "rows_fingerprint": rows_fingerprint(list(itertools.chain(*rows.values()))),
        "checkpoint": checkpoint,
        "batch_size": batch_size,
        "max_decode_length": max_decode_length,
        "repeats": repeats,
        "tasks": {
            task.name: {
                "split": task.split,
                "examples": len(rows[task.name]),
                "tuning_examples": len(chosen[task.name][0]),
                "rows_fingerprint": rows_fingerprint(rows[task.name]),
                **describe_quality(
                    measured[task.name][GREEDY.name].generation, rows[task.name],
                    task.main_metric, task.instruction, model.vocabulary, model.config.eos_id,
                ),
                "methods": {name: x.results for name, x in measured[task.name].items()},
            }
            for task in tasks
        },
    }
    results["means_over_learned_tasks"] = means_over_learned(results["tasks"])
    _write(folder, results, rows, measured)
    if has_report:
      _write_report(
          folder, results, model, prompts, input_length, measured, methods, scoring, console
      )
  print_results(results, console)
  wrong = []
  for task, by_method in measured.items():
    for name, measurement in by_method.items():
      for difference in measurement.differences:
        console.print(f"{task}, {name}: {difference}", highlight=False)
      if not measurement.is_exact:
        wrong.append(f"{task} {name}")
  console.print(f"written to {output}", highlight=False, soft_wrap=True)
  # In fewer bits a block call and a single one differ too often to be judged.
  if wrong and model.config.dtype in ("float32", "float64"):
    raise SystemExit(f"error: tokens that aren't greedy's: {', '.join(wrong)}")
  return results


def _check_names(tasks: Sequence[Task], methods: Sequence[Method]) -> None:
  """Raises InputError for names that can't be those of files, or come twice."""
  names = [task.name for task in tasks]
  if not names or len(set(names)) < len(names):
    raise InputError("tasks", names, "at least one, with names that differ")
  for named in (*tasks, *methods):
    if not re.fullmatch(r"[\w+-][\w.+-]*", named.name):
      raise InputError("name", named.name, "letters, digits, _ + - and . inside, as files have")
  for task in tasks:
    check_metric(task.name, task.main_metric)


def _choose_weights(
    model: Generator, task: str, prompts: Sequence[Sequence[int]], methods: Sequence[Method],
    tuning: Tuning | None, max_decode_length: int, input_length: int, batch_size: int,
    progress: Progress,
) -> dict[str, tuple[Scoring, ...]]:
  """The scorers of each method, with weights for this task, which are told as they come."""
  scoring = {
      method.name: load_scoring(method.scorers, model, max_decode_length) for method in methods
  }
  tunable = [method for method in methods if method.scorers]
  if tuning is None or not tunable:
    return scoring
  greedy = model.generate(
      prompts, "greedy", max_length=max_decode_length, batch_size=batch_size
  )
  recording = record(model, prompts, greedy, max_decode_length, input_length=input_length)
  bar = progress.add_task(f"{task}, weights", total=len(tunable))
  for method in tunable:
    own, efficiency = tune(model, recording, method, scoring[method.name], tuning)
    scoring[method.name] = own
    weights = ", ".join(str(part.weight) for part in own)
    progress.console.print(
        f"{task}, {method.name}: weights {weights}, block efficiency {efficiency:.3f} on the "
        "rows to tune on", highlight=False, soft_wrap=True,
    )
    progress.advance(bar)
  return scoring


def _encode(model: Generator, task: Task, rows: Sequence[dict[str, str]]) -> list[list[int]]:
  """Token ids of a task's prompts; InputError naming the task and row of a bad one."""
  try:
    return model.encode_prompts([row["inputs"] for row in rows])
  except InputError as error:
    raise InputError(f"{task.name} {error.field}", error.value, error.allowed) from error


def _write(
    folder: Path, results: dict[str, Any], rows: dict[str, list[dict[str, str]]],
    measured: dict[str, dict[str, Measurement]],
) -> None:
  """Writes `results.json` and the outputs."""
  for task, methods in measured.items():
    for name, measurement in methods.items():
      out = measurement.generation
      with open(folder / f"{task}.{name}.jsonl", "w", encoding="utf-8") as file:
        for row, text, tokens, calls in zip(rows[task], out.texts, out.tokens, out.calls):
          line = {**row, "output": text, "tokens": tokens.tolist(), "decoder_calls": calls}
          file.write(json.dumps(line, ensure_ascii=False) + "\n")
  write_object(folder / "results.json", results)


def _write_report(
    folder: Path, results: dict[str, Any], model: Generator,
    prompts: dict[str, list[list[int]]], input_length: int,
    measured: dict[str, dict[str, Measurement]], methods: Sequence[Method],
    scoring: dict[str, dict[str, tuple[Scoring, ...]]], console: Console,
) -> None:
  """Analyses every task and writes `analysis.json` and `report.html`."""
  analysis = {}
  for task in track(results["tasks"], "analysis", console=console):
    greedy = measured[task][GREEDY.name].generation
    recording = record(
        model, prompts[task], greedy, results["max_decode_length"], input_length=input_length
    )
    live = {name: measurement.generation for name, measurement in measured[task].items()}
    analysis[task] = analyse_task(model, recording, methods, scoring[task], live)
  write_object(folder / "analysis.json", analysis)
  page = make_report(results, analysis, model.vocabulary)
  (folder / "report.html").write_text(page, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
  """Evaluates as gin says; see `--help`."""
  read_gin(argv, "python -m bpd_jax.evaluate", __doc__.splitlines()[0], evaluate)
  evaluate()


if __name__ == "__main__":
  run(main)
