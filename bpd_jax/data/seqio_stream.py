"""Batches straight from SeqIO, for data that is too large for a token cache.

`SeqioStream` has the seam of `bpd_jax.data.batches.Batches` and gives the same
features, but in the order in which SeqIO reads: the next step is cheap, another
one is come to by reading what lies before it. Importing this module imports
TensorFlow.
"""

from collections.abc import Iterator

import numpy as np
import seqio
import tensorflow as tf

from bpd_jax.data.batches import assemble, Batch, pack
from bpd_jax.errors import check_count, InputError

# Examples among which packing looks for what fits together.
WINDOW = 1000

Example = tuple[np.ndarray, np.ndarray]


class SeqioStream:
  """A registered task or mixture, without end, in an order drawn from a seed.

  Attributes:
    batch_size: rows of all processes together.
  """

  def __init__(
      self,
      name: str,
      *,
      batch_size: int,
      input_length: int,
      target_length: int,
      split: str = "train",
      is_packed: bool = False,
      seed: int = 0,
      process_index: int = 0,
      process_count: int = 1,
      pad_id: int = 0,
      start_id: int = 0,
  ):
    """Opens; nothing is read yet.

    Args:
      name: of a task or mixture in SeqIO's registries, see `seqio_tasks.register`.
      batch_size: rows of all processes together.
      input_length: tokens of a row's inputs; longer inputs are cut before an EOS.
      target_length: tokens of a row's targets; longer targets are cut without one.
      split: of all tasks.
      is_packed: whether rows hold as many examples as fit.
      seed: of the order and of noise.
      process_index: which of the processes this is; it reads its shard only.
      process_count: how many share a batch.
      pad_id: fills rows.
      start_id: stands before targets in the decoder's inputs.

    Raises:
      InputError: naming the argument.
    """
    registry = next(
        (x for x in (seqio.TaskRegistry, seqio.MixtureRegistry) if name in x.names()), None
    )
    if registry is None:
      known = sorted([*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
      raise InputError("name", name, f"one of {known}")
    self._provider = registry.get(name)
    if split not in self._provider.splits:
      raise InputError(f"{name} split", split, f"one of {sorted(self._provider.splits)}")
    check_count("batch_size", batch_size)
    check_count("input_length", input_length)
    check_count("target_length", target_length)
    if batch_size % process_count:
      raise InputError("batch_size", batch_size, f"a multiple of the {process_count} processes")
    self.batch_size = batch_size
    self._num_rows = batch_size // process_count
    self._shape = (input_length, target_length)
    self._split = split
    self._is_packed = is_packed
    self._seed = seed
    self._shard = seqio.ShardInfo(process_index, process_count)
    eos_id = self._provider.output_features["inputs"].vocabulary.eos_id
    self._special = {"eos_id": eos_id, "pad_id": pad_id, "start_id": start_id}
    self._rows = self._read()
    self._next_step = 0

  def batch(self, step: int) -> Batch:
    """This process's rows of a step, from 0 on."""
    if step < self._next_step:
      self._rows, self._next_step = self._read(), 0
    for _ in range((step - self._next_step) * self._num_rows):
      next(self._rows)
    rows = [next(self._rows) for _ in range(self._num_rows)]
    self._next_step = step + 1
    return assemble(rows, *self._shape, **self._special)

  def _read(self) -> Iterator[list[Example]]:
    """The examples of each row from the beginning."""
    dataset = self._provider.get_dataset(
        dict(zip(("inputs", "targets"), self._shape)), self._split, shuffle=True,
        seed=self._seed, shard_info=self._shard, num_epochs=None, trim_output_features=False,
    )
    options = tf.data.Options()
    options.deterministic = True
    examples = (
        (example["inputs"], example["targets"])
        for example in dataset.with_options(options).as_numpy_iterator()
    )
    if not self._is_packed:
      return ([example] for example in examples)
    return self._packed(examples)

  def _packed(self, examples: Iterator[Example]) -> Iterator[list[Example]]:
    rng = np.random.default_rng(self._seed)
    while True:
      window = [next(examples) for _ in range(WINDOW)]
      lengths = np.array([[len(side) for side in example] for example in window])
      # Room for all: rows beyond those that are needed stay empty.
      rows = pack(np.minimum(lengths, self._shape), self._shape, WINDOW)
      for place in rng.permutation(WINDOW):
        if rows[place]:
          yield [window[i] for i in rows[place]]
