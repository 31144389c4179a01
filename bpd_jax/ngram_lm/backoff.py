"""N-grams as sorted tables, and a back-off model on top of them.

An n-gram is (index of its first n - 1 tokens in the table of the order below,
token), so it takes two int32 whatever its order, and the n-grams that follow a
context lie beside each other. The table of order 1 has every id of the vocabulary,
at its own place.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import math

import numpy as np

from bpd_jax.errors import InputError

# What is never predicted, such as the start of a sequence, has this probability in
# ARPA files; it is finite, so that sums of scores stay so.
LOG_ZERO = -99 * math.log(10)


@dataclasses.dataclass(frozen=True)
class Grams:
  """The n-grams of one order, sorted by (context, token).

  Attributes:
    context: [grams] int32, index of the first n - 1 tokens in the order below.
    token: [grams] int32, the last token.
    suffix: [grams] int32, index of the last n - 1 tokens in the order below, -1
      where that n-gram isn't there.
    vocab_size: ids that a token can have.
  """

  context: np.ndarray
  token: np.ndarray
  suffix: np.ndarray
  vocab_size: int

  def __len__(self) -> int:
    return len(self.token)

  @functools.cached_property
  def keys(self) -> np.ndarray:
    """[grams] int64, rising."""
    return gram_keys(self.context, self.token, self.vocab_size)

  def find(self, context: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Index of each (context, token), -1 where there is none; a context of -1 has none."""
    if not len(self):
      return np.full(np.shape(token), -1, np.int32)
    wanted = gram_keys(context, token, self.vocab_size)
    place = np.minimum(np.searchsorted(self.keys, wanted), len(self) - 1)
    return np.where(self.keys[place] == wanted, place, -1).astype(np.int32)


def gram_keys(context: np.ndarray, token: np.ndarray, vocab_size: int) -> np.ndarray:
  """One int64 for each (context, token), in their order."""
  return np.asarray(context, np.int64) * vocab_size + token


def unigrams(vocab_size: int) -> Grams:
  """The table of order 1."""
  nothing = np.zeros(vocab_size, np.int32)
  return Grams(nothing, np.arange(vocab_size, dtype=np.int32), nothing, vocab_size)


def sorted_grams(
    context: np.ndarray, token: np.ndarray, below: Sequence[Grams]
) -> tuple[Grams, np.ndarray]:
  """The table of an order from its n-grams in any order.

  Args:
    context: [grams], indices in the last of `below`.
    token: [grams].
    below: the tables of the lower orders, order 1 first.

  Returns:
    The table, and [grams] which of the given n-grams stands at each place.
  """
  vocab_size = below[0].vocab_size
  place = np.argsort(gram_keys(context, token, vocab_size), kind="stable")
  context = np.asarray(context)[place].astype(np.int32)
  token = np.asarray(token)[place].astype(np.int32)
  if len(below) == 1:
    suffix = token
  else:
    suffix = below[-1].find(below[-1].suffix[context], token)
  return Grams(context, token, suffix, vocab_size), place


def gram_tokens(orders: Sequence[Grams], n: int, part: slice = slice(None)) -> np.ndarray:
  """[n, grams] the tokens of the n-grams of order n, or of a part of them."""
  tokens, places = [], None
  for grams in reversed(orders[:n]):
    places = np.arange(len(grams))[part] if places is None else places
    tokens.append(grams.token[places])
    places = grams.context[places]
  return np.stack(tokens[::-1])


@dataclasses.dataclass(frozen=True)
class BackOff:
  """A model: log P(w | h) of the n-grams it has, else back_off(h) + log P(w | shorter h).

  An order at the top without n-grams is no order: it is dropped, and with it the weights
  of the order below, which lead nowhere.

  Attributes:
    orders: tables, order 1 first.
    log_probs: [grams] float64 natural logs for each order.
    back_offs: [grams] float64 natural logs for each order; 0 in the highest.
    start_id: the token before every sequence, `<s>`; it is never predicted.
    eos_id: the token at the end of every sequence, `</s>`.
  """

  orders: tuple[Grams, ...]
  log_probs: tuple[np.ndarray, ...]
  back_offs: tuple[np.ndarray, ...]
  start_id: int = 0
  eos_id: int = 1

  def __post_init__(self):
    order = max((n for n, grams in enumerate(self.orders, start=1) if len(grams)), default=1)
    if order < len(self.orders):
      *weights, last = self.back_offs[:order]
      for field, kept in (
          ("orders", self.orders[:order]), ("log_probs", self.log_probs[:order]),
          ("back_offs", (*weights, np.zeros_like(last))),
      ):
        object.__setattr__(self, field, tuple(kept))

  @property
  def order(self) -> int:
    """Tokens of the longest n-grams."""
    return len(self.orders)

  @property
  def vocab_size(self) -> int:
    """Ids that a token can have."""
    return self.orders[0].vocab_size

  @property
  def num_grams(self) -> list[int]:
    """N-grams of each order."""
    return [len(grams) for grams in self.orders]

  def only(self, keep: Sequence[np.ndarray]) -> "BackOff":
    """The model with some n-grams only.

    Args:
      keep: [grams] bool for each order. Order 1 stays whole, and a kept n-gram's
        context must be kept.
    """
    kept = lambda arrays: tuple(array[chosen] for array, chosen in zip(arrays, keep))
    return dataclasses.replace(
        self, orders=_keep_grams(self.orders, keep), log_probs=kept(self.log_probs),
        back_offs=kept(self.back_offs),
    )

  def score(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores every token of sequences given those before it.

    Args:
      tokens: [length] from `join_sequences`; a context never reaches over a start.

    Returns:
      [length] natural logs, and [length] the length of the n-gram that was found.
      Both mean nothing where a sequence starts.
    """
    found = np.asarray(tokens, np.int32)  # Of the order below, the one that ends here.
    total, used = self.log_probs[0][found], np.ones(len(found), np.int32)
    is_start = tokens == self.start_id
    for n in range(1, self.order):
      context = np.concatenate([[-1], found[:-1]])
      context[is_start] = -1
      found = self.orders[n].find(context, tokens)
      back_off = np.where(context < 0, 0, self.back_offs[n - 1][context])
      total = np.where(found < 0, total + back_off, self.log_probs[n][found])
      used = np.where(found < 0, used, n + 1)
    return total, used

  def perplexity(self, tokens: np.ndarray) -> float:
    """exp of the mean negative log-probability of tokens; see `score`."""
    scores, _ = self.score(tokens)
    return math.exp(-scores[tokens != self.start_id].mean())


def _keep_grams(orders: Sequence[Grams], keep: Sequence[np.ndarray]) -> tuple[Grams, ...]:
  """The tables with some n-grams only.

  Args:
    orders: order 1 first.
    keep: see `BackOff.only`.
  """
  kept = [orders[0]]
  for n in range(1, len(orders)):
    grams, chosen = orders[n], keep[n]
    if n == 1:
      context, suffix = grams.context[chosen], grams.suffix[chosen]
    else:
      place = np.where(keep[n - 1], np.cumsum(keep[n - 1]) - 1, -1).astype(np.int32)
      context, suffix = place[grams.context[chosen]], grams.suffix[chosen]
      suffix = np.where(suffix < 0, -1, place[suffix])
    kept.append(Grams(context, grams.token[chosen], suffix, grams.vocab_size))
  return tuple(kept)


def join_sequences(
    sequences: Iterable[np.ndarray], vocab_size: int, start_id: int = 0, eos_id: int = 1
) -> np.ndarray:
  """[length] int32: every sequence after a start, with EOS at its end.

  Args:
    sequences: token ids without a start, with or without EOS at the end.
    vocab_size: ids that may occur.
    start_id: put before every sequence.
    eos_id: put at the end of those that have none.

  Raises:
    InputError: naming the sequence, from 0, where it has an id that isn't the
      vocabulary's, or a start or EOS inside; where there are no sequences.
  """
  for field, value in (("start_id", start_id), ("eos_id", eos_id)):
    if not 0 <= value < vocab_size or start_id == eos_id:
      raise InputError(field, value, f"0 … {vocab_size - 1}, start and EOS not the same")
  start, parts = np.asarray([start_id]), []
  for sequence in sequences:
    sequence = np.asarray(sequence)
    ends = len(sequence) and sequence[-1] == eos_id
    parts += [start, sequence if ends else np.append(sequence, eos_id)]
  if not parts:
    raise InputError("sequences", "none", "at least one")
  tokens = np.concatenate(parts)
  lengths = np.asarray([len(part) for part in parts]).reshape(-1, 2).sum(1)
  ends = np.cumsum(lengths)
  is_wrong = (tokens < 0) | (tokens >= vocab_size) | (tokens == start_id) | (tokens == eos_id)
  is_wrong[ends - lengths] = False
  is_wrong[ends - 1] = False
  if is_wrong.any():
    place = int(np.argmax(is_wrong))
    allowed = f"0 … {vocab_size - 1}, {start_id} only before a sequence and {eos_id} at its end"
    sequence = int(np.searchsorted(ends, place, side="right"))
    raise InputError(f"sequence {sequence} token", int(tokens[place]), allowed)
  return tokens.astype(np.int32)
