"""The base model's own greedy outputs as training targets (Stern et al. 2018, §6).

Heads trained on what the base model says agree with it more often than heads
trained on what people wrote.
"""

from collections.abc import Iterator, Sequence
import os
from pathlib import Path

import numpy as np

from bpd_jax.data.batches import cut_inputs, Dataset
from bpd_jax.data.token_cache import TokenCache, write_cache
from bpd_jax.generation import Generator, INPUT_BUCKETS, naming_prompts
from bpd_jax.training.metrics import shown

# Examples in a part; a run that is killed loses one part at most.
PART = 512


class Joined:
  """Datasets as one, the examples of the first before those of the second.

  Attributes:
    name: of the first.
    lengths: [examples, 2] int64.
  """

  def __init__(self, parts: Sequence[Dataset]):
    self.name = parts[0].name
    self.lengths = np.concatenate([part.lengths for part in parts])
    self._parts = list(parts)
    self._ends = np.cumsum([len(part.lengths) for part in parts])

  def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    part = int(np.searchsorted(self._ends, i, side="right"))
    start = self._ends[part] - len(self._parts[part].lengths)
    return self._parts[part][i - start]


def distil(
    folder: str | os.PathLike,
    generator: Generator,
    dataset: Dataset,
    *,
    examples: Sequence[int],
    batch_size: int,
    input_length: int,
    target_length: int,
) -> Joined:
  """Decodes examples greedily; goes on where a run before was stopped.

  Args:
    folder: for token caches of up to `PART` examples each.
    generator: the base model, with its vocabulary.
    dataset: whose inputs to decode.
    examples: which of it, by number.
    batch_size: rows decoded together.
    input_length: tokens of inputs; longer ones are cut before an EOS.
    target_length: most tokens of an output; one that reaches it has no EOS.

  Returns:
    The inputs with the base model's outputs, in the examples' order.

  Raises:
    InputError: where the folder can't be written, or an output would be NaN's.
  """
  eos_id = generator.config.eos_id

  def pairs(part: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    inputs = [cut_inputs(dataset[i][0], input_length, eos_id).tolist() for i in part]
    with naming_prompts([f"{dataset.name} example {i}" for i in part]):
      out = generator.generate(
          inputs, "greedy", max_length=target_length, batch_size=batch_size,
          buckets=(*INPUT_BUCKETS, input_length),
      )
    yield from zip(inputs, (row.tolist() for row in out.tokens))

  parts = []
  starts = range(0, len(examples), PART)
  label = f"greedy outputs of {dataset.name}, parts of {PART} examples"
  for number, start in enumerate(shown(starts, label)):
    path = Path(folder) / f"part_{number:05}"
    if path.is_dir():
      parts.append(TokenCache(path))
    else:
      parts.append(
          write_cache(
              path, pairs(examples[start : start + PART]), task=dataset.name, split="greedy",
              vocabulary=generator.vocabulary, vocab_size=generator.config.vocab_size,
              eos_id=eos_id,
          )
      )
  return Joined(parts)
