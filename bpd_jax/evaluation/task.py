"""One task of an evaluation: weights chosen, methods measured, drafts analysed, outputs written."""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.progress import Progress

from bpd_jax.compilation_cache import make_room
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.rows import rows_fingerprint, RowsTask
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.evaluation.quality import describe_quality
from bpd_jax.evaluation.replay import record
from bpd_jax.evaluation.report import analyse_task
from bpd_jax.evaluation.run import GREEDY, measure_methods, Method
from bpd_jax.evaluation.scoring import load_scoring
from bpd_jax.evaluation.task_rows import TaskRows
from bpd_jax.evaluation.tuning import tune, Tuned, Tuning
from bpd_jax.folders import new_file, read_object, write_object
from bpd_jax.generation import Generation, Generator, naming_prompts

Task = RowsTask | JsonlTask


@dataclasses.dataclass(frozen=True)
class Conditions:
  """What is the same for all tasks; see `evaluate`."""

  methods: tuple[Method, ...]
  batch_size: int
  max_decode_length: int
  repeats: int
  tuning: Tuning | Tuned | None
  has_report: bool


def task_file(task: Task) -> str:
  """What an evaluation that was cut off knows of a task; gone at its end."""
  return f".task.{task.name}.json"


def evaluate_task(
    folder: Path, model: Generator, task: Task, own: TaskRows, how: Conditions, input_length: int,
    progress: Progress,
) -> dict[str, Any]:
  """Evaluates one task and writes its outputs, unless the folder has it already.

  Args:
    folder: where the outputs go.
    model: what is evaluated.
    task: the task.
    own: its rows.
    how: see `Conditions`.
    input_length: that recordings are padded to.
    progress: gets bars.

  Returns:
    `results`, the entry of `results.json`; `analysis`, that of `analysis.json`, or None;
    `differences`, a line each; `wrong`, the methods whose tokens can't be greedy's.
  """
  path = folder / task_file(task)
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


def _choose_weights(
    model: Generator, task: str, prompts: Sequence[Sequence[int]], how: Conditions,
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


def _write_outputs(
    folder: Path, task: str, rows: Sequence[dict[str, str]], found: dict[str, Generation]
) -> None:
  """Writes what each method made of a task's rows."""
  for name, out in found.items():
    with open(folder / f"{task}.{name}.jsonl", "w", encoding="utf-8") as file:
      for row, text, tokens, calls in zip(rows, out.texts, out.tokens, out.calls):
        line = {**row, "output": text, "tokens": tokens.tolist(), "decoder_calls": calls}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
