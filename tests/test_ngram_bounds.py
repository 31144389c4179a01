"""What a token before a candidate says at most, against every history that ends in it."""

import ngram_reference as reference
import numpy as np
import pytest
from test_ngram_arrays import VOCAB, without_some

from bpd_jax.ngram_lm.arrays import device_arrays, log_probs
from bpd_jax.ngram_lm.backoff import join_sequences
from bpd_jax.ngram_lm.bounds import bound_model
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.smoothing import katz, kneser_ney


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("smooth", [kneser_ney, katz])
@pytest.mark.parametrize("is_pruned", [False, True])
def test_bounds_hold_for_every_history_and_are_reached(order, smooth, is_pruned):
  tokens = join_sequences(reference.random_sequences(order, VOCAB, 60), VOCAB)
  model = smooth(count_grams(tokens, order, VOCAB), (1,) * order)
  if is_pruned:
    model = without_some(model, order)
  arrays, bounds = device_arrays(model), device_arrays(bound_model(model))
  assert bounds.order == min(model.order, 2)
  tokens = np.arange(VOCAB, dtype=np.int32)
  history = np.stack(np.meshgrid(*[np.arange(-1, VOCAB)] * (order - 1), indexing="ij"), -1)
  history = history.reshape(-1, order - 1).astype(np.int32)
  history = history[history[:, -1] >= 0]
  exact = np.asarray(log_probs(arrays, history, tokens))
  most = np.asarray(log_probs(bounds, history[:, -1:], tokens))
  assert (exact - most).max() < 1e-5 * np.abs(exact).max()
  # Not by being far too large: for a third of all pairs some history is within 0.1 nats.
  gap = np.full([VOCAB, VOCAB], np.inf)
  np.minimum.at(gap, history[:, -1], most - exact)
  assert (gap < 0.1).mean() > 1 / 3, (gap < 0.1).mean()
