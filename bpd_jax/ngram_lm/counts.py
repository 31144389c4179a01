"""Counts n-grams of token ids: one sort for each order.

Every sequence is closed as kenlm and SRILM close sentences: a start before it, which
can only be context, and EOS at its end, which is predicted.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from bpd_jax.errors import InputError
from bpd_jax.ngram_lm.backoff import gram_keys, Grams, unigrams

MAX_ORDER = 5


@dataclasses.dataclass(frozen=True)
class Counts:
  """N-grams and how often each occurs.

  Attributes:
    orders: tables, order 1 first.
    counts: [grams] int64 for each order. The start's is the number of sequences.
    start_id: the token before every sequence.
    eos_id: the token at its end.
  """

  orders: tuple[Grams, ...]
  counts: tuple[np.ndarray, ...]
  start_id: int
  eos_id: int

  @property
  def vocab_size(self) -> int:
    """Ids that a token can have."""
    return self.orders[0].vocab_size


def count_grams(
    tokens: np.ndarray, order: int, vocab_size: int, *, start_id: int = 0, eos_id: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Counts:
  """Counts.

  Args:
    tokens: [length] int32 from `join_sequences`.
    order: tokens of the longest n-grams, 1 … 5.
    vocab_size: ids that may occur.
    start_id: the token before every sequence.
    eos_id: the token at its end.
    say: is told what begins.
  """
  check_order(order)
  orders = [unigrams(vocab_size)]
  counts = [np.bincount(tokens, minlength=vocab_size)]
  # Where the n-grams end, and which they are.
  places, found = np.arange(len(tokens)), tokens
  for n in range(2, order + 1):
    say(f"counting {n}-grams")
    goes_on = places + 1 < len(tokens)
    goes_on[goes_on] = tokens[places[goes_on] + 1] != start_id
    # Of the n-grams one shorter, that which ends where the longer one does.
    ending = np.full(len(tokens), -1, np.int32)
    ending[places] = found
    places = places[goes_on] + 1
    token = tokens[places]
    keys = gram_keys(found[goes_on], token, vocab_size)
    by_key = np.argsort(keys)
    keys = keys[by_key]
    is_first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
    first = np.flatnonzero(is_first)
    found = np.empty(len(keys), np.int32)
    found[by_key] = np.cumsum(is_first) - 1
    chosen, keys = by_key[first], keys[first]
    orders.append(Grams(
        (keys // vocab_size).astype(np.int32), token[chosen], ending[places[chosen]], vocab_size
    ))
    counts.append(np.diff(first, append=len(is_first)))
  return Counts(tuple(orders), tuple(counts), start_id, eos_id)


def check_order(order: int) -> None:
  """InputError for an order that isn't counted."""
  if not isinstance(order, int) or not 1 <= order <= MAX_ORDER:
    raise InputError("order", order, f"1 … {MAX_ORDER}")


def check_cutoffs(cutoffs: tuple[int, ...], order: int) -> None:
  """InputError where cut-offs would leave an n-gram without its context or suffix."""
  is_right = len(cutoffs) == order and cutoffs[0] == 1 and all(
      low <= high for low, high in zip(cutoffs, cutoffs[1:])
  )
  if not is_right:
    allowed = f"{order} counts, one an order: 1 first, as every token stays, and none falling"
    raise InputError("cutoffs", list(cutoffs), allowed)


def cut_off(counts: Counts, cutoffs: tuple[int, ...]) -> list[np.ndarray]:
  """[grams] bool for each order: which n-grams occur often enough.

  Args:
    counts: all.
    cutoffs: the least count of an n-gram, for each order.
  """
  check_cutoffs(cutoffs, len(counts.orders))
  keep = [np.ones(counts.vocab_size, bool)]
  return keep + [count >= least for count, least in zip(counts.counts[1:], cutoffs[1:])]
