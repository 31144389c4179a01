"""Batches for training and evaluation: a function of the step and nothing else.

`Batches.batch(step)` is arithmetic on a seed, so a resumed run sees what an
undisturbed one would have seen, and so does another number of processes. A
mixture gives each dataset its share of the examples of every `CYCLE`; within a
dataset an epoch is a permutation. Packed rows hold several examples, of any of
the datasets, told apart by segment numbers.
"""

from collections.abc import Iterator, Sequence
import functools
from typing import Protocol

import numpy as np

from bpd_jax.errors import check_count, InputError

# Examples over which the shares of a mixture are met exactly.
CYCLE = 1000
# Rows that are packed together, from the same number of examples each time.
WINDOW = 256
# Most examples, as a share, that may find no room in their window.
MOST_SKIPPED = 0.01

# encoder_input_tokens [batch, input length] int32, padding where nothing is
# encoder_segment_ids [batch, input length] int32, 1, 2, … and 0 where nothing is
# decoder_input_tokens [batch, target length] int32, targets after the start token
# decoder_target_tokens [batch, target length] int32
# decoder_segment_ids [batch, target length] int32
# decoder_output_mask [batch, target length] bool, where targets are a model's own
#   outputs; only in a mixture that has some
Batch = dict[str, np.ndarray]


class Dataset(Protocol):
  """Examples by number, as `TokenCache` has them.

  Attributes:
    name: in messages and metrics.
    lengths: [examples, 2] int, tokens of inputs and targets.
  """

  name: str
  lengths: np.ndarray

  def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int32, EOS included."""


class Batches:
  """A mixture of datasets in rows of fixed lengths, in an order drawn from a seed.

  Attributes:
    datasets: as given.
    batch_size: rows of all processes together.
    examples_per_row: 1, or what packing makes of it.
  """

  def __init__(
      self,
      datasets: Sequence[Dataset],
      *,
      rates: Sequence[float] | None = None,
      batch_size: int,
      input_length: int,
      target_length: int,
      is_packed: bool = False,
      eos_id: int = 1,
      pad_id: int = 0,
      start_id: int = 0,
      seed: int = 0,
      process_index: int = 0,
      process_count: int = 1,
      num_outputs: int = 0,
  ):
    """Plans the rows.

    Args:
      datasets: at least one.
      rates: relative share of the examples for each; by default their numbers of
        examples, so that all are gone through at the same pace.
      batch_size: rows of all processes together.
      input_length: tokens of a row's inputs; longer inputs are cut before an EOS.
      target_length: tokens of a row's targets; longer targets are cut without
        an EOS, as a model shouldn't learn to stop there.
      is_packed: whether rows hold as many examples as fit. At most 1 % then find
        no room when their turn comes, and wait for the next epoch.
      eos_id: closes cut inputs.
      pad_id: fills rows.
      start_id: stands before targets in the decoder's inputs.
      seed: of all orders.
      process_index: which of the processes this is; it gets its rows only.
      process_count: how many share a batch.
      num_outputs: how many of the datasets, the last ones, have a model's own outputs
        for targets.

    Raises:
      InputError: naming the argument.
    """
    if not datasets:
      raise InputError("datasets", [], "at least one")
    check_count("batch_size", batch_size)
    check_count("input_length", input_length)
    check_count("target_length", target_length)
    if batch_size % process_count:
      raise InputError("batch_size", batch_size, f"a multiple of the {process_count} processes")
    self.batch_size = batch_size
    self.datasets = list(datasets)
    self._shape = (input_length, target_length)
    self._special = {"eos_id": eos_id, "pad_id": pad_id, "start_id": start_id}
    self._first_output = len(datasets) - num_outputs
    self._seed = seed
    local = batch_size // process_count
    self._places = range(process_index * local, (process_index + 1) * local)
    self._num_examples = [len(dataset.lengths) for dataset in datasets]
    self._lengths = [np.minimum(dataset.lengths, self._shape) for dataset in datasets]
    self._shares = shares(self._num_examples if rates is None else rates, datasets)
    self._pack_window = functools.lru_cache(maxsize=4)(self._pack_window)
    self._per_window = self._fill_window() if is_packed else None
    self.examples_per_row = self._per_window / WINDOW if is_packed else 1.0

  def batch(self, step: int) -> Batch:
    """This process's rows of a step, from 0 on."""
    rows = self.rows(step)
    examples = [[self.datasets[which][i] for which, i in row] for row in rows]
    batch = assemble(examples, *self._shape, **self._special)
    if self._first_output < len(self.datasets):
      by_segment = [[False, *(which >= self._first_output for which, _ in row)] for row in rows]
      batch["decoder_output_mask"] = np.stack([
          np.array(flags)[segments]
          for flags, segments in zip(by_segment, batch["decoder_segment_ids"])
      ])
    return batch

  def rows(self, step: int) -> list[list[tuple[int, int]]]:
    """What stands in this process's rows of a step: (dataset, example), in order."""
    first = step * self.batch_size
    return [self._row(first + place) for place in self._places]

  def steps_per_epoch(self) -> float:
    """Batches until the dataset that takes longest has been gone through once."""
    slowest = max(n * CYCLE / share for n, share in zip(self._num_examples, self._shares))
    return slowest / self.batch_size / self.examples_per_row

  def _row(self, position: int) -> list[tuple[int, int]]:
    """A row by its place in the endless order."""
    if self._per_window is None:
      return [self._example(position)]
    window, place = divmod(position, WINDOW)
    return self._pack_window(window, self._per_window)[place]

  def _example(self, position: int) -> tuple[int, int]:
    """(dataset, example) by its place in the endless order."""
    cycle, place = divmod(position, CYCLE)
    order, ranks = cycle_order(tuple(self._shares), self._seed, cycle)
    which = int(order[place])
    use = cycle * self._shares[which] + int(ranks[place])
    count = self._num_examples[which]
    epoch, place = divmod(use, count)
    return which, int(epoch_order(count, self._seed, which, epoch)[place])

  def _pack_window(self, window: int, count: int) -> list[list[tuple[int, int]]]:
    """The rows of a window, in random order, from as many examples."""
    examples = [self._example(i) for i in range(window * count, (window + 1) * count)]
    lengths = np.array([self._lengths[which][i] for which, i in examples])
    rows = pack(lengths, self._shape, WINDOW)
    order = np.random.default_rng([self._seed, 1 << 21, window]).permutation(WINDOW)
    return [[examples[i] for i in rows[place]] for place in order]

  def _fill_window(self) -> int:
    """The number of examples that a window can be asked to hold."""
    means = np.array([lengths.mean(axis=0) for lengths in self._lengths])
    mean = np.asarray(self._shares) @ means / CYCLE
    most = WINDOW / (mean / self._shape).max()
    for fill in np.arange(1.0, 0.4, -0.02):
      count = int(most * fill)
      packed = sum(len(row) for w in range(3) for row in self._pack_window(w, count))
      if packed >= (1 - MOST_SKIPPED) * 3 * count:
        break
    return count


def shares(rates: Sequence[float], datasets: Sequence[Dataset]) -> list[int]:
  """Rows of each dataset in a cycle, by largest remainders; they sum to `CYCLE`.

  Raises:
    InputError: where there aren't as many rates as datasets, or one of them
      is so small that the dataset would never come.
  """
  if len(rates) != len(datasets) or min(rates) <= 0:
    raise InputError("rates", list(rates), f"{len(datasets)} positive numbers")
  exact = np.asarray(rates, float) / sum(rates) * CYCLE
  counts = np.floor(exact).astype(int)
  for which in np.argsort(counts - exact, kind="stable")[: CYCLE - counts.sum()]:
    counts[which] += 1
  if not counts.all():
    name = datasets[int(np.argmin(counts))].name
    raise InputError("rates", list(rates), f"at least 1 in {CYCLE} for {name}")
  return counts.tolist()


@functools.lru_cache(maxsize=4)
def cycle_order(
    counts: tuple[int, ...], seed: int, cycle: int
) -> tuple[np.ndarray, np.ndarray]:
  """The dataset of each row of a cycle, and how many of its rows came before there."""
  rng = np.random.default_rng([seed, 1 << 20, cycle])
  order = rng.permutation(np.repeat(np.arange(len(counts)), counts))
  ranks = np.zeros_like(order)
  for which, count in enumerate(counts):
    ranks[order == which] = np.arange(count)
  return order, ranks


@functools.lru_cache(maxsize=64)
def epoch_order(num_rows: int, seed: int, which: int, epoch: int) -> np.ndarray:
  """The rows of a dataset in the order of an epoch."""
  return np.random.default_rng([seed, which, epoch]).permutation(num_rows)


def pack(lengths: np.ndarray, room: tuple[int, int], num_rows: int) -> list[list[int]]:
  """Puts examples into rows, the largest first, each where it fits best.

  Args:
    lengths: [examples, 2], each at most `room`.
    room: input and target tokens of a row.
    num_rows: how many rows there are.

  Returns:
    Numbers of the examples in each row, in order; those that find no room are in
    none.
  """
  free = np.tile(np.asarray(room), [num_rows, 1])
  rows: list[list[int]] = [[] for _ in range(num_rows)]
  largest = (lengths / np.asarray(room)).max(axis=1)
  for i in np.argsort(-largest, kind="stable"):
    fits = np.flatnonzero((free >= lengths[i]).all(axis=1))
    if len(fits):
      left = (free[fits] - lengths[i]) / room
      # Where least is left, and of both sides alike.
      row = fits[np.argmin(left.sum(axis=1) + np.abs(left[:, 0] - left[:, 1]))]
      rows[row].append(int(i))
      free[row] -= lengths[i]
  return [sorted(row) for row in rows]


def assemble(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    input_length: int,
    target_length: int,
    *,
    eos_id: int = 1,
    pad_id: int = 0,
    start_id: int = 0,
) -> Batch:
  """Rows of examples as arrays.

  Args:
    rows: the examples of each row, in order; an empty row is all padding.
    input_length: tokens of a row's inputs.
    target_length: tokens of a row's targets.
    eos_id: closes inputs that are cut.
    pad_id: fills rows.
    start_id: stands before targets in the decoder's inputs.
  """
  batch = {
      name: np.full([len(rows), length], fill, np.int32)
      for name, length, fill in (
          ("encoder_input_tokens", input_length, pad_id),
          ("encoder_segment_ids", input_length, 0),
          ("decoder_input_tokens", target_length, pad_id),
          ("decoder_target_tokens", target_length, pad_id),
          ("decoder_segment_ids", target_length, 0),
      )
  }
  for i, examples in enumerate(rows):
    starts = np.zeros(2, int)
    for segment, (inputs, targets) in enumerate(examples, start=1):
      inputs = cut_inputs(inputs, input_length, eos_id)
      targets = targets[:target_length]
      encoder, decoder = (
          slice(start, start + len(tokens)) for start, tokens in zip(starts, (inputs, targets))
      )
      batch["encoder_input_tokens"][i, encoder] = inputs
      batch["encoder_segment_ids"][i, encoder] = segment
      batch["decoder_input_tokens"][i, decoder] = [start_id, *targets[:-1]]
      batch["decoder_target_tokens"][i, decoder] = targets
      batch["decoder_segment_ids"][i, decoder] = segment
      starts += len(inputs), len(targets)
  return batch


def cut_inputs(inputs: np.ndarray, input_length: int, eos_id: int) -> np.ndarray:
  """Inputs that fit, closed by an EOS where they were cut."""
  if len(inputs) <= input_length:
    return inputs
  return np.append(inputs[: input_length - 1], eos_id)


def in_order(
    dataset: Dataset, batch_size: int, input_length: int, target_length: int,
    max_examples: int | None = None, eos_id: int = 1, pad_id: int = 0, start_id: int = 0,
) -> Iterator[Batch]:
  """The first examples of a dataset once, unpacked; the last batch ends in empty rows."""
  count = len(dataset.lengths) if max_examples is None else max_examples
  count = min(count, len(dataset.lengths))
  for first in range(0, count, batch_size):
    rows = [[dataset[i]] if i < count else [] for i in range(first, first + batch_size)]
    yield assemble(
        rows, input_length, target_length, eos_id=eos_id, pad_id=pad_id, start_id=start_id
    )
