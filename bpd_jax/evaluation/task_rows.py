"""A task's rows as a model is evaluated on them: which fit, and their token ids."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import sys

import numpy as np

from bpd_jax.data.batches import cut_inputs
from bpd_jax.errors import InputError
from bpd_jax.generation import Generator, input_bucket, INPUT_BUCKETS

# What may become of a row whose inputs are empty or too long.
UNFIT_ROWS = ("error", "cut", "leave_out")


@dataclasses.dataclass(frozen=True)
class TaskRows:
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


def read_rows(
    model: Generator, task: str, rows: Mapping[str, dict[str, str]],
    chosen: Sequence[Sequence[int]], unfit_rows: str,
) -> TaskRows:
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
  return TaskRows(
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
