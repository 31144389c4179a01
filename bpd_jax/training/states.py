"""Cached states of a frozen decoder: what its parallel heads are trained on.

The base model reads every example once, and each step of training reads its
states from disk: minutes instead of hours. The states are those of teacher
forcing without dropout, so training on them is training behind the model.
"""

from collections.abc import Sequence
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bpd_jax.data.batches import assemble, Batches, Dataset
from bpd_jax.errors import InputError
from bpd_jax.folders import new_folder, read_object, write_object
from bpd_jax.model.model import EncoderDecoder
from bpd_jax.training.metrics import shown
from bpd_jax.training.objective import decoder_states
from bpd_jax.training.step import place_batch

INFO_FILE = "states.json"
STATES_FILE = "states.bin"
TARGETS_FILE = "targets.npy"
LENGTHS_FILE = "lengths.npy"

PathLike = str | os.PathLike

_READ = jax.jit(decoder_states, static_argnums=0)


class HiddenStates:
  """A folder from `write_states`, open for reading; a dataset without inputs.

  Attributes:
    name: of the dataset whose examples these are.
    lengths: [examples, 2] int64; 0, and the targets' tokens, EOS included.
  """

  def __init__(self, folder: PathLike):
    """Opens; InputError where the folder isn't whole."""
    folder = Path(folder)
    info = read_object(folder / INFO_FILE)
    try:
      self.name: str = info["name"]
      lengths = np.load(folder / LENGTHS_FILE)
      self._ends = np.cumsum(lengths)
      self._targets = np.load(folder / TARGETS_FILE, mmap_mode="r")
      self._states = np.memmap(
          folder / STATES_FILE, np.dtype(info["dtype"]), "r",
          shape=(len(self._targets), info["d_model"]),
      )
    except (KeyError, OSError, TypeError, ValueError) as error:
      raise InputError("states", str(folder), f"a whole folder ({error})") from error
    self.lengths = np.stack([np.zeros_like(lengths), lengths], axis=1)

  def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """No inputs, and the targets, int32."""
    return np.zeros([0], np.int32), np.asarray(self._targets[self._span(i)])

  def states(self, i: int) -> np.ndarray:
    """The decoder's normed last states of an example, [tokens, d_model]."""
    return self._states[self._span(i)]

  def _span(self, i: int) -> slice:
    return slice(self._ends[i] - self.lengths[i, 1], self._ends[i])


def write_states(
    folder: PathLike,
    model: EncoderDecoder,
    params: Any,
    dataset: Dataset,
    *,
    examples: Sequence[int],
    batch_size: int,
    input_length: int,
    target_length: int,
) -> HiddenStates:
  """Reads examples with the base model and writes its states.

  Args:
    folder: a path that doesn't exist yet.
    model: the base, for its parameters as they are stored.
    params: these.
    dataset: what to read.
    examples: which of it, by number.
    batch_size: rows read together.
    input_length: tokens of inputs; longer ones are cut.
    target_length: tokens of targets; longer ones are cut.

  Returns:
    The states, open.

  Raises:
    InputError: where the folder exists or can't be written.
  """
  # Rows of like lengths are read together, and padded to one of few lengths.
  order = sorted(range(len(examples)), key=lambda i: dataset.lengths[examples[i], 0])
  groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
  config = model.config
  lengths = np.minimum(dataset.lengths[np.asarray(examples), 1], target_length)
  starts = np.cumsum(lengths) - lengths
  targets = np.zeros([lengths.sum()], np.int32)
  dtype = np.dtype(config.dtype)
  row_bytes = config.d_model * dtype.itemsize
  # Not through a memory map, where a full disk kills the process.
  with new_folder(folder) as partial:
    try:
      with open(partial / STATES_FILE, "wb") as file:
        for group in shown(groups, f"decoder states of {dataset.name}, batches"):
          rows = [[dataset[examples[i]]] for i in group]
          longest = min(max(len(row[0][0]) for row in rows), input_length)
          length = min(-(-longest // 64) * 64, input_length)
          rows += [[]] * (batch_size - len(rows))
          batch = assemble(rows, length, target_length, **config.special_ids)
          hidden = _READ(model, params, place_batch(model.partitioning, batch))
          hidden = np.asarray(hidden).astype(dtype, copy=False)
          for place, i in enumerate(group):
            file.seek(starts[i] * row_bytes)
            file.write(hidden[place, : lengths[i]].tobytes())
            targets[starts[i] : starts[i] + lengths[i]] = (
                batch["decoder_target_tokens"][place, : lengths[i]]
            )
      np.save(partial / TARGETS_FILE, targets)
      np.save(partial / LENGTHS_FILE, lengths)
      write_object(
          partial / INFO_FILE,
          {"name": dataset.name, "d_model": config.d_model, "dtype": config.dtype},
      )
    except OSError as error:
      raise InputError(
          "folder", str(folder), f"a path that can be written ({error.strerror})"
      ) from error
  return HiddenStates(folder)


class StateBatches:
  """Batches of cached states, packed into rows, in a seeded order.

  A batch has `hidden` [batch, length, d_model] instead of the encoder's arrays.
  """

  def __init__(
      self, datasets: Sequence[HiddenStates], *, rates: Sequence[float] | None = None,
      batch_size: int, target_length: int, seed: int = 0, **special_ids: int,
  ):
    """See `Batches`."""
    self._batches = Batches(
        datasets, rates=rates, batch_size=batch_size, input_length=1,
        target_length=target_length, is_packed=True, seed=seed, **special_ids,
    )

  def steps_per_epoch(self) -> float:
    """See `Batches`."""
    return self._batches.steps_per_epoch()

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """The rows of a step, from 0 on."""
    arrays = self._batches.batch(step)
    first = self._batches.datasets[0].states(0)
    shape = arrays["decoder_segment_ids"].shape
    hidden = np.zeros([*shape, first.shape[-1]], first.dtype)
    for place, row in enumerate(self._batches.rows(step)):
      start = 0
      for which, i in row:
        states = self._batches.datasets[which].states(i)
        hidden[place, start : start + len(states)] = states
        start += len(states)
    return {"hidden": hidden} | {
        name: array for name, array in arrays.items() if name.startswith("decoder")
    }

