"""The most that a model can say of a token, knowing one token before it.

A search over n-grams of order 3 and up can't see all contexts at once. With a bound
that depends on two tokens it can look ahead: a beam that is ordered by it loses less,
and can prove what it found.
"""

import dataclasses

import numpy as np

from bpd_jax.ngram_lm.backoff import BackOff, gram_keys, sorted_grams


def bound_model(model: BackOff) -> BackOff:
  """A model of order 2 with log P'(w | u) ≥ log P(w | … u) for every history that ends in u.

  For a bigram it is the largest of its own log-probability and those of all longer
  n-grams that end in it, each with the largest back-off weights that longer contexts
  ending in u can add where they don't have the token. It is no distribution.

  Args:
    model: of any order; one of order 2 or less is its own bound.
  """
  if model.order <= 2:
    return model
  vocab_size = model.vocab_size
  # gains[n]: the most that contexts of n or more tokens ending in u add by backing off.
  gains = np.zeros([model.order + 1, vocab_size])
  for n in range(model.order - 1, 1, -1):
    largest = np.zeros(vocab_size)
    np.maximum.at(largest, model.orders[n - 1].token, model.back_offs[n - 1])
    gains[n] = gains[n + 1] + largest
  back_offs = model.back_offs[0] + gains[2]
  keys, values = [], []
  for n in range(2, model.order + 1):
    grams = model.orders[n - 1]
    before = model.orders[n - 2].token[grams.context]
    keys.append(gram_keys(before, grams.token, vocab_size))
    values.append(model.log_probs[n - 1] + gains[n][before])
  found, place = np.unique(np.concatenate(keys), return_inverse=True)
  before, token = found // vocab_size, found % vocab_size
  # A bigram that is only the end of longer n-grams is backed off without them.
  bounds = np.where(
      model.orders[1].find(before, token) < 0,
      model.log_probs[0][token] + back_offs[before], -np.inf,
  )
  np.maximum.at(bounds, place, np.concatenate(values))
  grams, order = sorted_grams(before, token, model.orders[:1])
  return dataclasses.replace(
      model, orders=(model.orders[0], grams),
      log_probs=(model.log_probs[0], bounds[order]),
      back_offs=(back_offs, np.zeros(len(grams))),
  )
