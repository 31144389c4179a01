"""From counts to a back-off model: Katz, and interpolated modified Kneser-Ney.

`katz` discounts small counts by Good-Turing and gives what that frees to the tokens
that weren't seen after a context, in proportion to the shorter context's
probabilities (Katz 1987). `kneser_ney` discounts every count by one of three amounts
and interpolates with shorter contexts, whose counts are numbers of different tokens
before an n-gram (Chen & Goodman 1998, §4.1.6), as kenlm's lmplz does.

Both give every token but the start a finite probability after every context, and sum
to 1. A cut-off removes n-grams after the amounts have been estimated from all; their
mass goes to the shorter context.
"""

from collections.abc import Callable, Sequence

import numpy as np

from bpd_jax.ngram_lm.backoff import BackOff, Grams, LOG_ZERO
from bpd_jax.ngram_lm.counts import Counts, cut_off

# The cut-offs of Kim et al. 2024: trigrams that occur twice, 4-grams that occur 4 times.
CUTOFFS = (1, 1, 2, 4, 4)
# Good-Turing changes counts up to this one (Katz 1987, §III).
MAX_DISCOUNTED = 5
# What is subtracted where counts of counts don't give an estimate: of counts 1, 2, 3
# and more, as lmplz's --discount_fallback; and of all, in place of Good-Turing.
FALLBACK_AMOUNTS = (0.5, 1.0, 1.5)
FALLBACK_KATZ = 0.5

Say = Callable[[str], None]


def kneser_ney(
    counts: Counts, cutoffs: Sequence[int] | None = None, say: Say = lambda text: None
) -> BackOff:
  """Interpolated modified Kneser-Ney.

  The unigrams are interpolated with the uniform distribution over all tokens but the
  start.

  Args:
    counts: of all n-grams.
    cutoffs: the least count of an n-gram, for each order; `CUTOFFS` by default.
    say: is told what begins.

  Raises:
    InputError: for cut-offs that fall or would cut tokens.
  """
  keep = cut_off(counts, _cutoffs(counts, cutoffs))
  log_probs, back_offs = [], []
  probs = None
  is_first = np.arange(counts.vocab_size) == counts.start_id
  for n, grams in enumerate(counts.orders):
    say(f"smoothing {n + 1}-grams")
    adjusted = counts.counts[n]
    if n > 0:
      is_first = is_first[grams.context]
    if n + 1 < len(counts.orders):
      # Nothing comes before a start, so what begins with it keeps its count.
      kinds = np.bincount(counts.orders[n + 1].suffix, minlength=len(grams))
      adjusted = np.where(is_first, adjusted, kinds)
    if n == 0:
      adjusted = np.where(is_first, 0, adjusted)
    amounts = np.asarray((0.0, *kneser_ney_amounts(adjusted)))[np.minimum(adjusted, 3)]
    num_contexts = 1 if n == 0 else len(counts.orders[n - 1])
    # What the kept ones don't take: all of those that are cut off, the amounts of the rest.
    total = np.bincount(grams.context, adjusted, num_contexts)
    freed = np.where(keep[n], amounts, adjusted)
    left = np.bincount(grams.context, freed, num_contexts)
    weight = np.divide(left, total, out=np.ones(num_contexts), where=total > 0)
    seen = (adjusted - amounts) / total[grams.context]
    if n == 0:
      probs = seen + weight / (counts.vocab_size - 1)
    else:
      back_offs.append(np.log(weight))
      probs = seen + weight[grams.context] * probs[grams.suffix]
    log_probs.append(np.log(probs))
  return _finish(counts, keep, log_probs, back_offs)


def kneser_ney_amounts(adjusted: np.ndarray) -> tuple[float, float, float]:
  """What is subtracted from counts of 1, 2, and 3 or more (Chen & Goodman 1998, eq. 26).

  `FALLBACK_AMOUNTS` where no count is 1, 2 or 3, or an amount isn't above 0 and at most
  what it is subtracted from.

  Args:
    adjusted: the counts of an order; zeros are passed over.
  """
  n1, n2, n3, n4 = np.bincount(np.minimum(adjusted, 5), minlength=6)[1:5].tolist()
  if not min(n1, n2, n3):
    return FALLBACK_AMOUNTS
  y = n1 / (n1 + 2 * n2)
  amounts = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
  is_right = all(0 < amount <= i + 1 for i, amount in enumerate(amounts))
  return amounts if is_right else FALLBACK_AMOUNTS


def katz(
    counts: Counts, cutoffs: Sequence[int] | None = None, say: Say = lambda text: None
) -> BackOff:
  """Katz back-off with Good-Turing discounts.

  Where a context's counts are all too large to be discounted and none is cut off, its
  total is taken one larger, so that something is left for other tokens. What the
  unigrams leave is shared evenly by the tokens that don't occur. Where every token
  occurs after a context, nothing is left over, and the probabilities are scaled to 1.

  Args:
    counts: of all n-grams.
    cutoffs: the least count of an n-gram, for each order; `CUTOFFS` by default.
    say: is told what begins.

  Raises:
    InputError: for cut-offs that fall or would cut tokens.
  """
  keep = cut_off(counts, _cutoffs(counts, cutoffs))
  log_probs, back_offs = [], []
  lower = None
  for n, grams in enumerate(counts.orders):
    say(f"smoothing {n + 1}-grams")
    count = counts.counts[n]
    if n == 0:
      count = np.where(np.arange(counts.vocab_size) == counts.start_id, 0, count)
    num_contexts = 1 if n == 0 else len(counts.orders[n - 1])
    is_seen = keep[n] & (count > 0)
    discounted = katz_counts(count)
    total = np.bincount(grams.context, count, num_contexts)
    has_left = np.bincount(grams.context, ~is_seen | (discounted < count), num_contexts) > 0
    if n == 0:
      # Ids that don't occur aren't n-grams that were cut off.
      has_left[:] = (discounted < count).any()
    total = np.maximum(total + ~has_left, 1)
    probs = np.where(is_seen, discounted, 0) / total[grams.context]
    probs, left = _scale_full(grams, is_seen, probs, num_contexts, counts.vocab_size)
    if n == 0:
      unseen = ~is_seen & (np.arange(counts.vocab_size) != counts.start_id)
      probs = probs + unseen * (left / max(unseen.sum(), 1))
    else:
      back_offs.append(_back_off(grams, is_seen, left, lower))
    lower = probs
    with np.errstate(divide="ignore"):
      log_probs.append(np.log(probs))
  return _finish(counts, keep, log_probs, back_offs)


def katz_counts(counts: np.ndarray) -> np.ndarray:
  """Discounted counts (Katz 1987, eq. 12): counts up to k by Good-Turing, others as they are.

  k is the largest, `MAX_DISCOUNTED` at most, for which every count from 1 to k is made
  smaller and stays above 0. Where there is no such k, as counts of counts are few or
  uneven, `FALLBACK_KATZ` is subtracted from every count.

  Args:
    counts: of an order, all n-grams; zeros stay.
  """
  kinds = np.bincount(np.minimum(counts, MAX_DISCOUNTED + 2), minlength=MAX_DISCOUNTED + 3)
  for k in range(MAX_DISCOUNTED, 1, -1):
    if not kinds[1 : k + 2].all():
      continue
    r = np.arange(1, k + 1)
    common = (k + 1) * kinds[k + 1] / kinds[1]
    if common >= 1:
      continue
    factors = ((r + 1) * kinds[2 : k + 2] / (r * kinds[1 : k + 1]) - common) / (1 - common)
    if (factors > 0).all() and (factors < 1).all():
      table = np.concatenate([[1.0], factors, [1.0]])
      return counts * table[np.minimum(counts, k + 1)]
  return np.maximum(counts - FALLBACK_KATZ, 0)


def _scale_full(
    grams: Grams, is_seen: np.ndarray, probs: np.ndarray, num_contexts: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Scales contexts after which every token was seen to 1.

  Returns:
    Probabilities, and [contexts] what each context leaves to other tokens.
  """
  is_full = np.bincount(grams.context, is_seen, num_contexts) == vocab_size - 1
  mass = np.bincount(grams.context, probs, num_contexts)
  probs = probs / np.where(is_full, mass, 1)[grams.context]
  return probs, np.where(is_full, 0, 1 - mass)


def _back_off(
    grams: Grams, is_kept: np.ndarray, left: np.ndarray, lower: np.ndarray
) -> np.ndarray:
  """[contexts] log of what is left over what the shorter context gives to the same tokens."""
  known = np.bincount(grams.context, np.where(is_kept, lower[grams.suffix], 0), len(left))
  return np.log(np.where(left > 0, left / np.where(left > 0, 1 - known, 1), 1))


def _cutoffs(counts: Counts, cutoffs: Sequence[int] | None) -> tuple[int, ...]:
  return CUTOFFS[: len(counts.orders)] if cutoffs is None else tuple(cutoffs)


def _finish(
    counts: Counts, keep: list[np.ndarray], log_probs: list[np.ndarray],
    back_offs: list[np.ndarray],
) -> BackOff:
  """The model of what is kept."""
  log_probs[0][counts.start_id] = LOG_ZERO
  back_offs.append(np.zeros(len(log_probs[-1])))
  model = BackOff(
      counts.orders, tuple(log_probs), tuple(back_offs), counts.start_id, counts.eos_id
  )
  return model.only(keep)
