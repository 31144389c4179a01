"""Measures decoding methods on the rows of tasks, from one model folder.

  python -m bpd_jax.evaluate --gin_file=gin/runs/evaluate.gin \\
      --gin.CHECKPOINT="'models/docstrings'" --gin.OUTPUT="'runs/docstrings'"

Prints a table, and writes `results.json` and each method's outputs as JSONL;
docs/reading_results.md says what the figures mean.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path
import re
import sys
from typing import Any

import gin
import numpy as np
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TimeRemainingColumn,
)

from bpd_jax.checkpoints import load_config
from bpd_jax.compilation_cache import make_room
from bpd_jax.data.batches import cut_inputs
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.rows import rows_fingerprint, RowsTask
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.environment import describe_device, git_revision, source_fingerprint, versions
from bpd_jax.errors import InputError
from bpd_jax.evaluation.quality import check_metric, describe_quality
from bpd_jax.evaluation.replay import record
from bpd_jax.evaluation.report import analyse_task, make_report
from bpd_jax.evaluation.run import GREEDY, measure_methods, Method, method_identity
from bpd_jax.evaluation.scoring import load_scoring
from bpd_jax.evaluation.table import means_over_learned, print_results
from bpd_jax.evaluation.tuning import tune, Tuned, Tuning
from bpd_jax.folders import (
  contents_fingerprint,
  new_file,
  read_object,
  resumable_folder,
  write_object,
)
from bpd_jax.generation import (
  Generation,
  Generator,
  input_bucket,
  INPUT_BUCKETS,
  load,
  naming_prompts,
)
from bpd_jax.launch import read_gin, run
from bpd_jax.partitioning import Partitioning
from bpd_jax.terminal import description_column, plain_console

Task = RowsTask | JsonlTask
# What may become of a row whose inputs are empty or too long.
UNFIT_ROWS = ("error", "cut", "leave_out")


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
    tuning: Tuning | Tuned | None = None,
    has_report: bool = False,
    unfit_rows: str = "error",
    dtype: str | None = None,
    partitioning: Partitioning | None = None,
) -> dict[str, Any]:
  """Evaluates; greedy is always among the methods.

  Args:
    checkpoint: a model folder.
    tasks: whose rows to decode.
    methods: how.
    output: a folder that doesn't exist yet, for `results.json` and
      `TASK.METHOD.jsonl`. An evaluation that was cut off goes on behind the last task that
      it had finished; where anything else has changed, it says what.
    batch_size: rows decoded together.
    max_decode_length: most tokens of an output.
    repeats: timed passes of each method.
    tuning: how the scorers' weights are chosen for each task, on rows of it that
      aren't reported then, or where they were chosen before; the weights are as the scorers
      say without it.
    has_report: whether to analyse drafts as well and write `analysis.json` and
      `report.html`; needs the extra `report`.
    unfit_rows: what becomes of rows whose inputs are empty or longer than the longest
      bucket. "error" names the first of them and ends; "cut" cuts long ones before an
      EOS, as training does, and leaves out empty ones; "leave_out" leaves out both.
    dtype: to compute in, instead of the checkpoint's. Of bfloat16 and float16 the share of
      rows that are greedy's is reported, and not promised.
    partitioning: where the model lives; one device by default.

  Returns:
    What `results.json` holds.

  Raises:
    InputError: for a bad argument or row, before anything is compiled; for the first row in
      which NaN or infinity would choose a token.
    SystemExit: with status 1 at the end where a method's tokens aren't
      greedy's and can't be near ties.
  """
  _check_names(tasks, methods)
  if unfit_rows not in UNFIT_ROWS:
    raise InputError("unfit_rows", unfit_rows, f"one of {UNFIT_ROWS}")
  load_config(checkpoint)
  if has_report and importlib.util.find_spec("matplotlib") is None:
    raise InputError("has_report", True, "False, as matplotlib isn't installed (extra report)")
  placed = {task.name: task.placed_rows() for task in tasks}
  every = {name: [*own.values()] for name, own in placed.items()}
  # By the texts alone, so that models of any vocabulary report the same rows.
  chosen = {
      name: tuning.split(name, [row["inputs"] for row in own]) if tuning
      else ([], list(range(len(own))))
      for name, own in every.items()
  }
  how = _How(tuple(methods), batch_size, max_decode_length, repeats, tuning, has_report)
  made_with = {
      "device": describe_device(),
      "versions": versions(),
  }
  identity = {
      **made_with, "bpd_jax": source_fingerprint(), "checkpoint": contents_fingerprint(checkpoint),
      "dtype": dtype, "tasks": {task.name: _task_identity(task, every) for task in tasks},
      "methods": {method.name: method_identity(method) for method in methods},
      "batch_size": batch_size, "max_decode_length": max_decode_length, "repeats": repeats,
      "tuning": None if tuning is None else tuning.identity(), "has_report": has_report,
      "unfit_rows": unfit_rows,
  }
  console = plain_console()
  columns = (description_column(), BarColumn(), MofNCompleteColumn(),
             TimeRemainingColumn())
  # The folder is made first: no hours of decoding for what can't be written.
  with resumable_folder(output, identity) as folder:
    model = load(checkpoint, partitioning=partitioning, dtype=dtype)
    read = {
        name: _read_rows(model, name, own, chosen[name], unfit_rows)
        for name, own in placed.items()
    }
    # One for all recordings, so that each method is replayed by one program.
    input_length = max(own.input_length for own in read.values())
    for name, own in read.items():
      if unfit := own.describe_unfit():
        console.print(f"{name}: {unfit}")
    found = {}
    with Progress(*columns, console=console) as progress:
      for task in tasks:
        found[task.name] = _evaluate_task(
            folder, model, task, read[task.name], how, input_length, progress
        )
    results = {
        **made_with,
        "rows_fingerprint": rows_fingerprint(
            [*itertools.chain(*(own.rows for own in read.values()))]
        ),
        "checkpoint": checkpoint,
        "git_revision": git_revision(),
        "dtype": model.config.dtype,
        "batch_size": batch_size,
        "max_decode_length": max_decode_length,
        "repeats": repeats,
        "tasks": {name: own["results"] for name, own in found.items()},
    }
    results["means_over_learned_tasks"] = means_over_learned(results["tasks"])
    if has_report:
      analysis = {name: own["analysis"] for name, own in found.items()}
      write_object(folder / "analysis.json", analysis)
      page = make_report(results, analysis, model.vocabulary)
      (folder / "report.html").write_text(page, encoding="utf-8")
    write_object(folder / "results.json", results)
    for task in tasks:
      (folder / _task_file(task)).unlink()
  print_results(results, console)
  for own in found.values():
    for line in own["differences"]:
      console.print(line)
  console.print(f"written to {output}", soft_wrap=True)
  wrong = [method for own in found.values() for method in own["wrong"]]
  # In fewer bits a block call and a single one differ too often to be judged.
  if wrong and model.config.dtype in ("float32", "float64"):
    raise SystemExit(f"error: tokens that aren't greedy's: {', '.join(wrong)}")
  return results


@dataclasses.dataclass(frozen=True)
class _How:
  """What is the same for all tasks; see `evaluate`."""

  methods: tuple[Method, ...]
  batch_size: int
  max_decode_length: int
  repeats: int
  tuning: Tuning | Tuned | None
  has_report: bool


@dataclasses.dataclass(frozen=True)
class _Rows:
  """A task's rows as they are evaluated.

  Attributes:
    rows: those that are reported.
    places: where each stands.
    prompts: token ids of their inputs.
    tuning_places: of the rows on which weights are chosen.
    tuning_prompts: likewise.
    num_cut: rows of both whose inputs were cut.
    num_left_out: rows of both that didn't fit.
  """

  rows: list[dict[str, str]]
  places: list[str]
  prompts: list[list[int]]
  tuning_places: list[str]
  tuning_prompts: list[list[int]]
  num_cut: int
  num_left_out: int

  @property
  def input_length(self) -> int:
    """The bucket of the longest prompt."""
    return input_bucket(max(map(len, [*self.prompts, *self.tuning_prompts])))

  def describe_unfit(self) -> str:
    """What became of rows that don't fit, in words; nothing where all do."""
    counts = (
        (self.num_cut, f"cut to {max(INPUT_BUCKETS):,} tokens"), (self.num_left_out, "left out")
    )
    return ", ".join(
        f"{count} row{'s' * (count > 1)} {what}" for count, what in counts if count
    )


def _task_identity(task: Task, rows: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
  """All that a task's results depend on, whatever its rows were read from."""
  return {
      "rows": rows_fingerprint(rows[task.name]), "split": task.split,
      "main_metric": task.main_metric, "instruction": task.instruction,
  }


def _task_file(task: Task) -> str:
  """What an evaluation that was cut off knows of a task; gone at its end."""
  return f".task.{task.name}.json"


def _evaluate_task(
    folder: Path, model: Generator, task: Task, own: _Rows, how: _How, input_length: int,
    progress: Progress,
) -> dict[str, Any]:
  """Evaluates one task and writes its outputs, unless the folder has it already.

  Args:
    folder: where the outputs go.
    model: what is evaluated.
    task: the task.
    own: its rows.
    how: see `_How`.
    input_length: that recordings are padded to.
    progress: gets bars.

  Returns:
    `results`, the entry of `results.json`; `analysis`, that of `analysis.json`, or None;
    `differences`, a line each; `wrong`, the methods whose tokens can't be greedy's.
  """
  path = folder / _task_file(task)
  if path.exists():
    progress.console.print(f"{task.name}: evaluated before it was cut off")
    return read_object(path)
  with naming_prompts(own.tuning_places):
    scoring, tuned = _choose_weights(
        model, task.name, own.tuning_prompts, how, input_length, progress
    )
  make_room()
  with naming_prompts(own.places):
    measured = measure_methods(
        model, own.prompts, how.methods, max_decode_length=how.max_decode_length,
        batch_size=how.batch_size, repeats=how.repeats, progress=progress, label=task.name,
        scoring=scoring,
    )
  make_room()
  live = {name: measurement.generation for name, measurement in measured.items()}
  analysis = None
  if how.has_report:
    recording = record(
        model, own.prompts, live[GREEDY.name], how.max_decode_length, input_length=input_length
    )
    # Drafts are made after every prefix, those too that decoding passed over.
    with naming_prompts(own.places):
      analysis = analyse_task(model, recording, how.methods, scoring, live)
    make_room()
  _write_outputs(folder, task.name, own.rows, live)
  found = {
      "results": {
          "split": task.split,
          "examples": len(own.rows),
          "cut_rows": own.num_cut,
          "left_out_rows": own.num_left_out,
          "tuning_examples": (
              how.tuning.num_examples(task.name) if isinstance(how.tuning, Tuned)
              else len(own.tuning_prompts)
          ),
          "rows_fingerprint": rows_fingerprint(own.rows),
          **describe_quality(
              live[GREEDY.name], own.rows, task.main_metric, task.instruction, model.vocabulary,
              model.config.eos_id,
          ),
          "methods": {
              name: measurement.results | (
                  {"tuning_block_efficiency": tuned[name]} if name in tuned else {}
              )
              for name, measurement in measured.items()
          },
      },
      "analysis": analysis,
      "differences": [
          f"{task.name}, {name}: {difference}" for name, measurement in measured.items()
          for difference in measurement.differences
      ],
      "wrong": [
          f"{task.name} {name}" for name, measurement in measured.items()
          if not measurement.is_exact
      ],
  }
  with new_file(path) as partial:
    write_object(partial, found)
  return read_object(path)


def _check_names(tasks: Sequence[Task], methods: Sequence[Method]) -> None:
  """Raises InputError for names that can't be those of files, or come twice."""
  names = [task.name for task in tasks]
  if not names or len(set(names)) < len(names):
    raise InputError("tasks", names, "at least one, with names that differ")
  for named in (*tasks, *methods):
    if not re.fullmatch(r"[\w+-][\w.+-]*", named.name):
      raise InputError("name", named.name, "letters, digits, _ + - and . inside, as files have")
  kinds = dict.fromkeys(method.name for method in methods)
  files = [f"{name}.{kind}" for name in names for kind in kinds]
  if len(set(files)) < len(files):
    raise InputError("names", sorted(files), "TASK.METHOD that differ, as files are called so")
  for task in tasks:
    check_metric(task.name, task.main_metric)


def _choose_weights(
    model: Generator, task: str, prompts: Sequence[Sequence[int]], how: _How,
    input_length: int, progress: Progress,
) -> tuple[dict[str, tuple[Scoring, ...]], dict[str, float]]:
  """Chooses weights for a task, and tells them as they come.

  Returns:
    The scorers of each method, and its block efficiency on the rows to tune on.
  """
  scoring = {
      method.name: load_scoring(method.scorers, model)
      for method in how.methods
  }
  tunable = [method for method in how.methods if method.scorers]
  if how.tuning is None or not tunable:
    return scoring, {}
  if isinstance(how.tuning, Tuned):
    weighed = {
        method.name: how.tuning.weigh(task, method, scoring[method.name]) for method in tunable
    }
    return (
        scoring | {name: own for name, (own, _) in weighed.items()},
        {name: efficiency for name, (_, efficiency) in weighed.items()},
    )
  greedy = model.generate(
      prompts, "greedy", max_length=how.max_decode_length, batch_size=how.batch_size
  )
  recording = record(
      model, prompts, greedy, how.max_decode_length, input_length=input_length
  )
  tuned = {}
  bar = progress.add_task(f"{task}, weights", total=len(tunable))
  for method in tunable:
    own, efficiency = tune(model, recording, method, scoring[method.name], how.tuning)
    scoring[method.name], tuned[method.name] = own, efficiency
    weights = ", ".join(str(part.weight) for part in own)
    progress.console.print(
        f"{task}, {method.name}: weights {weights}, block efficiency {efficiency:.3f} on the "
        "rows to tune on", soft_wrap=True,
    )
    progress.advance(bar)
  return scoring, tuned


def _read_rows(
    model: Generator, task: str, rows: Mapping[str, dict[str, str]],
    chosen: Sequence[Sequence[int]], unfit_rows: str,
) -> _Rows:
  """A task's rows with the token ids of their inputs.

  Args:
    model: whose ids.
    task: its name.
    rows: all rows, by where each stands.
    chosen: numbers of those to tune on, and of those to report.
    unfit_rows: see `evaluate`.

  Raises:
    InputError: naming where the first row stands that doesn't fit, if that is an error;
      where no row is left to tune on, or to report.
  """
  places = [*rows]
  parts = [[places[number] for number in part] for part in chosen]
  used = {*itertools.chain(*parts)}
  inputs = {place: row["inputs"] for place, row in rows.items() if place in used}
  tokens, num_cut = _encode(model, inputs, unfit_rows)
  left = [[place for place in part if place in tokens] for part in parts]
  for what, before, after in zip(("tune on", "report"), parts, left, strict=True):
    if before and not after:
      raise InputError(f"{task} rows to {what}", "none that fits", "at least one")
  tuning_prompts, prompts = ([tokens[place] for place in part] for part in left)
  tuning_places, places = left
  return _Rows(
      [rows[place] for place in places], places, prompts, tuning_places, tuning_prompts, num_cut,
      len(inputs) - len(tokens),
  )


def _encode(
    model: Generator, inputs: Mapping[str, str], unfit_rows: str
) -> tuple[dict[str, list[int]], int]:
  """Token ids of the inputs that fit, by where they stand, and how many were cut."""
  if unfit_rows == "error":
    tokens = model.encode_prompts([*inputs.values()], names=[*inputs])
    return dict(zip(inputs, tokens, strict=True)), 0
  fitting, num_cut, most = {}, 0, max(INPUT_BUCKETS)
  for place, text in inputs.items():
    if not text.strip():
      continue
    [tokens] = model.encode_prompts([text], buckets=(sys.maxsize,), names=[place])
    if len(tokens) > most and unfit_rows == "cut":
      tokens = cut_inputs(np.asarray(tokens), most, model.config.eos_id).tolist()
      num_cut += 1
    if len(tokens) <= most:
      fitting[place] = tokens
  return fitting, num_cut


def _write_outputs(
    folder: Path, task: str, rows: Sequence[dict[str, str]], found: dict[str, Generation]
) -> None:
  """Writes what each method made of a task's rows."""
  for name, out in found.items():
    with open(folder / f"{task}.{name}.jsonl", "w", encoding="utf-8") as file:
      for row, text, tokens, calls in zip(rows, out.texts, out.tokens, out.calls):
        line = {**row, "output": text, "tokens": tokens.tolist(), "decoder_calls": calls}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main(argv: Sequence[str]) -> None:
  """Evaluates as gin says; see `--help`."""
  promise = (
      "Greedy's tokens are promised in float32 and float64; in bfloat16 and float16 (DTYPE) the "
      "share of rows that have them is reported."
  )
  description = f"{__doc__.splitlines()[0]} {promise}"
  read_gin(argv, "python -m bpd_jax.evaluate", description, evaluate)
  evaluate()


if __name__ == "__main__":
  run(main)
