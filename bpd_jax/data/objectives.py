"""Pretraining objectives: a chunk of plain text becomes inputs and targets.

Span corruption as T5 does it (Raffel et al. 2020, §3.1.4): spans of the inputs are
replaced by sentinels, and the targets say what stood there.

  tokens   a b c d e f g h
  inputs   a b <0> e f <1>
  targets  <0> c d <1> g h

Prefix-LM (§3.2.3): the inputs are the beginning, the targets how it goes on.
Everything is drawn from the generator that is passed in.
"""

from collections.abc import Sequence

import numpy as np

from bpd_jax.errors import InputError
from bpd_jax.vocabulary import NUM_SENTINELS

NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0


def span_corruption_length(
    input_length: int, target_length: int, num_sentinels: int = NUM_SENTINELS
) -> int:
  """The most tokens of a chunk whose corrupted sides fit, EOS included.

  Raises:
    InputError: where none fits, or the vocabulary has no sentinels.
  """
  if not num_sentinels:
    raise InputError("vocabulary sentinels", 0, "at least 1 for span corruption")
  # Inputs lose fewer tokens than one in six, so no longer chunk fits.
  for length in range(2 * input_length, 1, -1):
    num_noise, num_spans = _noise_counts(length)
    fits = (
        length - num_noise + num_spans < input_length
        and num_noise + num_spans < target_length and num_spans <= num_sentinels
    )
    if fits:
      return length
  raise InputError("lengths", (input_length, target_length), "at least (3, 3)")


def span_corruption(
    tokens: np.ndarray, sentinels: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Hides 15 % of the tokens in spans of 3 on average.

  Args:
    tokens: [n] int, at least 2; the first is never hidden, the last one always.
    sentinels: the id of each `<extra_id_i>`, by i; at least as many as spans.
    rng: of the spans.

  Returns:
    Inputs and targets, int32, without EOS.
  """
  num_noise, num_spans = _noise_counts(len(tokens))
  kept = _random_lengths(len(tokens) - num_noise, num_spans, rng)
  hidden = _random_lengths(num_noise, num_spans, rng)
  # Each span of kept tokens is followed by one of hidden tokens.
  ends = np.cumsum(np.stack([kept, hidden], axis=1).ravel())
  inputs, targets = [], []
  for i, part in enumerate(np.split(np.asarray(tokens, np.int32), ends[:-1])):
    sentinel = np.int32([sentinels[i // 2]])
    if i % 2:
      inputs.append(sentinel)
      targets += [sentinel, part]
    else:
      inputs.append(part)
  return np.concatenate(inputs), np.concatenate(targets)


def prefix_lm_length(input_length: int, target_length: int) -> int:
  """Tokens of a chunk: the longer side's, so that there is a choice of where to split.

  Raises:
    InputError: where no chunk could be split.
  """
  if input_length < 2 or target_length < 1:
    raise InputError("lengths", (input_length, target_length), "at least (2, 1)")
  return max(input_length, target_length)


def prefix_lm(
    tokens: np.ndarray, input_length: int, target_length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Splits where both sides fit, any such place being as likely as another.

  Args:
    tokens: [n] int, at least 2 and at most `prefix_lm_length`.
    input_length: most tokens of the first part, with an EOS that isn't there yet.
    target_length: most tokens of the second part as it is.
    rng: of the place.

  Returns:
    Inputs and targets, int32.
  """
  low = max(1, len(tokens) - target_length)
  high = min(len(tokens) - 1, input_length - 1)
  place = rng.integers(low, high, endpoint=True)
  tokens = np.asarray(tokens, np.int32)
  return tokens[:place], tokens[place:]


def _noise_counts(length: int) -> tuple[int, int]:
  """Tokens to hide in a chunk, and spans to hide them in."""
  num_noise = min(max(round(length * NOISE_DENSITY), 1), length - 1)
  return num_noise, max(round(num_noise / MEAN_SPAN), 1)


def _random_lengths(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
  """[count] positive lengths that sum to a total, all such ones being equally likely."""
  cuts = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False))
  return np.diff(np.concatenate([[0], cuts, [total]]))
