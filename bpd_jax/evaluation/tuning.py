"""Weights of scorers, chosen by replay on rows that no table reports.

The paper tunes one weight a task over ten values on a hundred examples (Kim et al.
2024, App. F). Here each scorer of a method is gone over in turn, and, where asked for,
each step of the lattice by itself; rows are chosen by a hash of their inputs. What an
evaluation chose can be taken over by another.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.errors import InputError
from bpd_jax.evaluation.drafting import describe_draft
from bpd_jax.evaluation.replay import count_calls, Recording
from bpd_jax.evaluation.run import describe_method, Method
from bpd_jax.evaluation.scoring import NoRepeatSource, OracleSource
from bpd_jax.folders import contents_fingerprint, local_path, read_object
from bpd_jax.generation import Generator

PAPER_GRID = (0.1, 0.5, 0.75, 0.9, 1.0, 1.1, 1.5, 2.0, 5.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How weights are chosen.

  Attributes:
    num_rows: of each task, kept apart from those that are reported.
    grid: weights that are tried.
    entropy_powers: powers of the candidates' entropy that are tried with each weight.
    by_step: whether each step of the lattice is then gone over by itself.
    rounds: how often all scorers of a method are gone over.
  """

  num_rows: int = 100
  grid: tuple[float, ...] = PAPER_GRID
  entropy_powers: tuple[float, ...] = (0.0,)
  by_step: bool = False
  rounds: int = 2

  def __post_init__(self):
    object.__setattr__(self, "grid", tuple(self.grid))
    object.__setattr__(self, "entropy_powers", tuple(self.entropy_powers))
    if self.num_rows < 1:
      raise InputError("Tuning.num_rows", self.num_rows, "a positive integer")
    if self.rounds < 1:
      raise InputError("Tuning.rounds", self.rounds, "a positive integer")
    if not self.grid or min(self.grid) < 0 or not max(self.grid) < float("inf"):
      raise InputError("Tuning.grid", self.grid, "finite weights from 0 on")
    if not self.entropy_powers:
      raise InputError("Tuning.entropy_powers", self.entropy_powers, "at least one number")

  def split(self, task: str, inputs: Sequence[str]) -> tuple[list[int], list[int]]:
    """See `split_rows`; every task is split alike."""
    return split_rows(inputs, self.num_rows)

  def identity(self) -> dict[str, Any]:
    """All that the choice depends on beside rows and scorers."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Tuned:
  """Weights that an earlier evaluation chose, for other conditions.

  Only rows that it reported are reported again: the others may be those on which it chose.

  Attributes:
    folder: what it left, with `results.json` and `TASK.greedy.jsonl`.
  """

  folder: str

  def identity(self) -> dict[str, Any]:
    """What was chosen, wherever it lies."""
    return {"results": contents_fingerprint(self._folder / "results.json")}

  @property
  def _folder(self) -> Path:
    return local_path(self.folder, "Tuned.folder")

  @functools.cached_property
  def _tasks(self) -> dict[str, Any]:
    return read_object(self._folder / "results.json")["tasks"]

  def task(self, name: str) -> dict[str, Any]:
    """What it found of a task; InputError where it wasn't evaluated, or not tuned."""
    tuned = [task for task, own in self._tasks.items() if own["tuning_examples"]]
    if name not in tuned:
      raise InputError("tasks", name, f"those that {self.folder} tuned weights for: {tuned}")
    return self._tasks[name]

  def split(self, task: str, inputs: Sequence[str]) -> tuple[list[int], list[int]]:
    """Numbers of the rows to tune on, which are none, and of those that it reported.

    Raises:
      InputError: for a task without tuned weights, or where no row would be reported.
    """
    self.task(task)
    outputs = JsonlTask(task, str(self._folder / f"{task}.greedy.jsonl"))
    known = {row["inputs"] for row in outputs.rows()}
    reported = [i for i, text in enumerate(inputs) if text in known]
    if not reported:
      raise InputError("Tuned.folder", self.folder, f"one that reports rows of {task} given here")
    return [], reported

  def num_examples(self, task: str) -> int:
    """Rows of the task on which its weights were chosen."""
    return self.task(task)["tuning_examples"]

  def weigh(
      self, task: str, method: Method, scoring: Sequence[Scoring]
  ) -> tuple[tuple[Scoring, ...], float]:
    """The weights that were chosen for a method on a task.

    Args:
      task: its name.
      method: with scorers.
      scoring: of its scorers, in order.

    Returns:
      The scorers with those weights, and the block efficiency that came of them on the
      rows on which they were chosen.

    Raises:
      InputError: where the method wasn't evaluated, or was another of that name.
    """
    methods = self.task(task)["methods"]
    tuned = [name for name, own in methods.items() if "tuning_block_efficiency" in own]
    if method.name not in tuned:
      raise InputError("methods", method.name, f"those that {self.folder} tuned: {tuned}")
    entry = methods[method.name]
    # As JSON has it: without tuples.
    own = json.loads(json.dumps(describe_method(method, scoring)))
    if "draft" in entry:  # Results of before say nothing of it.
      own["draft"] = json.loads(json.dumps(describe_draft(method.draft)))
    chosen = entry["scorers"]
    free = {"weight": None, "entropy_power": None}
    now, then = (
        {**described, "scorers": [{**part, **free} for part in described["scorers"]]}
        for described in (own, {key: entry[key] for key in own})
    )
    if now != then:
      raise InputError(method.name, now, f"as in {self.folder}: {then}")
    weight = lambda value: tuple(value) if isinstance(value, list) else value
    weighed = tuple(
        dataclasses.replace(
            part, weight=weight(was["weight"]), entropy_power=was["entropy_power"]
        )
        for part, was in zip(scoring, chosen, strict=True)
    )
    return weighed, entry["tuning_block_efficiency"]


def split_rows(inputs: Sequence[str], num_tuning: int) -> tuple[list[int], list[int]]:
  """Numbers of the rows to tune on, and of those to report.

  The tuning rows are those whose inputs have the smallest hashes: they depend on
  nothing else, and stay the same where rows are added in another order.

  Raises:
    InputError: where no row would be left to report.
  """
  if not 0 <= num_tuning < len(inputs):
    raise InputError(
        "Tuning.num_rows", num_tuning, f"fewer than the task's {len(inputs)} rows"
    )
  key = lambda i: (hashlib.sha256(inputs[i].encode()).digest(), i)
  chosen = set(sorted(range(len(inputs)), key=key)[:num_tuning])
  return sorted(chosen), [i for i in range(len(inputs)) if i not in chosen]


def tune(
    generator: Generator, recording: Recording, method: Method,
    scoring: Sequence[Scoring], tuning: Tuning,
) -> tuple[tuple[Scoring, ...], float]:
  """The weights with which a method needs the fewest calls on a recording.

  Args:
    generator: the model.
    recording: of the tuning rows.
    method: whose weights to choose. The no-repeat rule and the oracle have none.
    scoring: of its scorers, in order.
    tuning: what to try. Of equals the first wins.

  Returns:
    The scorers with their weights, and the block efficiency on the recording.
  """
  scoring = list(scoring)
  options = method.options(generator)
  depth = generator.settings(scoring=scoring, **options).drafter.depth
  tried: dict[tuple, float] = {}

  def efficiency(scoring: Sequence[Scoring]) -> float:
    key = tuple((part.weight, part.entropy_power) for part in scoring)
    if key not in tried:
      tokens, calls = count_calls(generator, recording, scoring=scoring, **options)
      tried[key] = float(tokens.sum() / calls.sum())
    return tried[key]

  def choose(number: int, options: Sequence[Scoring]) -> None:
    """Puts the best option in the place of a scorer."""
    place = lambda part: [*scoring[:number], part, *scoring[number + 1 :]]
    scoring[number] = max(options, key=lambda part: efficiency(place(part)))

  free = [
      number for number, source in enumerate(method.scorers)
      if not isinstance(source, NoRepeatSource | OracleSource)
  ]
  for _ in range(tuning.rounds if len(free) > 1 else 1):
    for number in free:
      choose(number, [
          dataclasses.replace(scoring[number], weight=weight, entropy_power=power)
          for power in tuning.entropy_powers for weight in tuning.grid
      ])
  if tuning.by_step:
    for number in free:
      for step in range(depth):
        part = scoring[number]
        weights = part.weight if isinstance(part.weight, tuple) else (part.weight,) * depth
        choose(number, [part] + [
            dataclasses.replace(part, weight=(*weights[:step], weight, *weights[step + 1 :]))
            for weight in tuning.grid
        ])
  return tuple(scoring), efficiency(scoring)
