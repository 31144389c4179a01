"""Measures decoding methods on the rows of tasks, from one model folder.

  python -m bpd_jax.evaluate --gin_file=gin/runs/evaluate.gin \\
      --gin.CHECKPOINT="'models/docstrings'" --gin.OUTPUT="'runs/docstrings'"

Prints a table, and writes `results.json` and each method's outputs as JSONL;
docs/reading_results.md says what the figures mean.
"""

from collections.abc import Sequence
import importlib.util
import itertools
import re
from typing import Any

import gin
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from bpd_jax.checkpoints import load_config
from bpd_jax.data.rows import rows_fingerprint
from bpd_jax.environment import describe_device, git_revision, source_fingerprint, versions
from bpd_jax.errors import InputError
from bpd_jax.evaluation.quality import check_metric
from bpd_jax.evaluation.report import make_report
from bpd_jax.evaluation.run import Method, method_identity
from bpd_jax.evaluation.table import means_over_learned, print_results
from bpd_jax.evaluation.task import Conditions, evaluate_task, Task, task_file
from bpd_jax.evaluation.task_rows import read_rows, UNFIT_ROWS
from bpd_jax.evaluation.tuning import Tuned, Tuning
from bpd_jax.folders import contents_fingerprint, resumable_folder, write_object
from bpd_jax.generation import load
from bpd_jax.launch import read_gin, run
from bpd_jax.partitioning import Partitioning, single_device
from bpd_jax.terminal import description_column, plain_console


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
  how = Conditions(tuple(methods), batch_size, max_decode_length, repeats, tuning, has_report)
  partitioning = partitioning or single_device()
  made_with = {
      "device": describe_device(), "mesh": dict(partitioning.mesh.shape), "versions": versions(),
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
        name: read_rows(model, name, own, chosen[name], unfit_rows)
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
        found[task.name] = evaluate_task(
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
      (folder / task_file(task)).unlink()
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


def _task_identity(task: Task, rows: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
  """All that a task's results depend on, whatever its rows were read from."""
  return {
      "rows": rows_fingerprint(rows[task.name]), "split": task.split,
      "main_metric": task.main_metric, "instruction": task.instruction,
  }


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
