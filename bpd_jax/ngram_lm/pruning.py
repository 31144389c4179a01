"""Relative-entropy pruning: leaves out the n-grams that change a model least (Stolcke 1998).

Leaving an n-gram out changes the model's distribution by some relative entropy, that is,
perplexity by some part; the n-grams for which this is below a threshold go. An n-gram
stays where one that stays has it as its first or its last n - 1 tokens.
"""

from collections.abc import Callable
import dataclasses
import math

import numpy as np

from bpd_jax.errors import check_count, check_number, InputError
from bpd_jax.ngram_lm.backoff import BackOff

Say = Callable[[str], None]


def prune_to_threshold(
    model: BackOff, threshold: float, say: Say = lambda text: None
) -> BackOff:
  """Leaves out n-grams, each of which alone raises perplexity by less than a part.

  Args:
    model: what to prune.
    threshold: 1e-8, say: a part of the perplexity (Stolcke 1998, §3).
    say: is told what begins.
  """
  check_pruning(model.vocab_size, threshold=threshold)
  bound = math.log1p(threshold)
  return _prune(model, [change >= bound for change in _changes(model, say)], say)


def prune_to_count(model: BackOff, num_grams: int, say: Say = lambda text: None) -> BackOff:
  """Keeps as many n-grams, those that change the model most.

  Args:
    model: what to prune.
    num_grams: n-grams of all orders to keep, those of order 1 included, which all stay.
    say: is told what begins.
  """
  check_pruning(model.vocab_size, num_grams)
  changes = _changes(model, say)
  # Of equals, shorter ones first: what an n-gram needs comes before it.
  by_change = np.argsort(-np.concatenate(changes), kind="stable")
  keep = np.zeros(len(by_change), bool)
  keep[by_change[:num_grams]] = True
  return _prune(model, np.split(keep, np.cumsum(model.num_grams)[:-1]), say)


def check_pruning(
    vocab_size: int, num_grams: int | None = None, threshold: float | None = None
) -> None:
  """InputError where a model can't be pruned so far; None is for what isn't asked."""
  if num_grams is not None and threshold is not None:
    raise InputError("threshold", threshold, f"none beside {num_grams} n-grams to prune to")
  if num_grams is not None:
    check_count("n-grams", num_grams)
    if num_grams < vocab_size:
      raise InputError("n-grams", num_grams, f"{vocab_size} or more, as every token stays")
  if threshold is not None:
    check_number("threshold", threshold, "a number from 0 on", lambda value: value >= 0)


def _changes(model: BackOff, say: Say) -> list[np.ndarray]:
  """For each order, [grams] the relative entropy at which an n-gram goes.

  That is the most of what leaving it out changes, and of the same of all n-grams that
  need it; infinite for order 1.
  """
  if any((grams.suffix < 0).any() for grams in model.orders[1:]):
    raise InputError("model", "n-grams without their suffixes", "one with all, to be pruned")
  changes = [np.full(model.vocab_size, np.inf)]
  # Log-probability of contexts: a start is as frequent as an end.
  context_prob = model.log_probs[0].copy()
  context_prob[model.start_id] = model.log_probs[0][model.eos_id]
  for n in range(1, model.order):
    say(f"weighing {n + 1}-grams")
    grams = model.orders[n]
    changes.append(_relative_entropy(model, n, context_prob))
    context_prob = context_prob[grams.context] + model.log_probs[n]
  for n in range(model.order - 1, 0, -1):
    grams = model.orders[n]
    np.maximum.at(changes[n - 1], grams.context, changes[n])
    has_suffix = grams.suffix >= 0
    np.maximum.at(changes[n - 1], grams.suffix[has_suffix], changes[n][has_suffix])
  return changes


def _relative_entropy(model: BackOff, n: int, context_prob: np.ndarray) -> np.ndarray:
  """[grams] D(p || p without the n-gram), for the order at index n (Stolcke 1998, eq. 5).

  With p(h) the context's probability, α and α' its back-off weight before and after:
  D = -p(h) (p(w|h) (log p(w|h') + log α' - log p(w|h)) + (log α' - log α) (1 - Σ p)),
  where the sum goes over the tokens that have an n-gram after h.
  """
  grams, own = model.orders[n], np.exp(model.log_probs[n])
  lower_log = model.log_probs[n - 1][grams.suffix]
  context, lower = grams.context, np.exp(lower_log)
  left, lower_left = _left(model, n)
  old = model.back_offs[n - 1][context]
  new = np.log((left[context] + own) / (lower_left[context] + lower))
  change = own * (lower_log + new - model.log_probs[n]) + (new - old) * left[context]
  # Rounding may bring what changes nothing below 0.
  return np.maximum(-np.exp(context_prob[context]) * change, 0)


def _left(model: BackOff, n: int) -> tuple[np.ndarray, np.ndarray]:
  """[contexts] what the n-grams at index n leave, of their own and of the lower order's mass."""
  grams, num_contexts = model.orders[n], len(model.orders[n - 1])
  is_full = np.bincount(grams.context, minlength=num_contexts) == model.vocab_size - 1
  lower = np.exp(model.log_probs[n - 1][grams.suffix])
  lower_left = np.where(is_full, 0, 1 - np.bincount(grams.context, lower, num_contexts))
  lower_left = np.maximum(lower_left, 0)
  return np.exp(model.back_offs[n - 1]) * lower_left, lower_left


def _prune(model: BackOff, keep: list[np.ndarray], say: Say) -> BackOff:
  """The model with some n-grams, and the back-off weights that it then needs."""
  back_offs = []
  for n in range(1, model.order):
    say(f"pruning {n + 1}-grams")
    grams, is_gone = model.orders[n], ~keep[n]
    left, lower_left = _left(model, n)
    lower = np.exp(model.log_probs[n - 1][grams.suffix])
    freed, lower_freed = (
        np.bincount(grams.context, np.where(is_gone, x, 0), len(left))
        for x in (np.exp(model.log_probs[n]), lower)
    )
    has_gone = lower_freed > 0
    weight = np.divide(
        left + freed, lower_left + lower_freed, out=np.ones_like(left), where=has_gone
    )
    back_offs.append(np.where(has_gone, np.log(weight), model.back_offs[n - 1]))
  return dataclasses.replace(model, back_offs=(*back_offs, model.back_offs[-1])).only(keep)
