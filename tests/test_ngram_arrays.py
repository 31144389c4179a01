"""The device form gives what a dictionary gives, of every n-gram, there or not."""

import functools

import jax
import jax.numpy as jnp
import ngram_reference as reference
import numpy as np
import pytest

from bpd_jax.ngram_lm import arrays
from bpd_jax.ngram_lm.backoff import BackOff, Grams, join_sequences, unigrams
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.smoothing import kneser_ney

VOCAB = 23
score = jax.jit(arrays.log_probs)


@functools.cache
def small_model(order):
  tokens = join_sequences(reference.random_sequences(order, VOCAB, 60), VOCAB)
  return kneser_ney(count_grams(tokens, order, VOCAB), (1,) * order)


def without_some(model, seed):
  """The model without a third of its n-grams, and of those that had them as context.

  Suffixes of n-grams are missing then, as in files that SRILM has pruned.
  """
  random = np.random.default_rng(seed)
  keep = [np.ones(model.vocab_size, bool)]
  for n in range(1, model.order):
    context = model.orders[n].context
    keep.append(keep[-1][context] & (random.random(len(context)) < 2 / 3))
  return model.only(keep)


def expected(model, history, candidates):
  """[rows, histories, k] by the dictionary, for arrays with one batch axis."""
  slow = reference.Dictionary(model)
  out = np.empty((*history.shape[:2], candidates.shape[-1]))
  for row, width in np.ndindex(*history.shape[:2]):
    # What comes before a token that isn't there isn't context.
    tokens = []
    for token in history[row, width, ::-1].tolist():
      if token < 0:
        break
      tokens.insert(0, token)
    out[row, width] = [slow.log_prob(tuple(tokens), w) for w in candidates[row].tolist()]
  return out


@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_scores_are_the_dictionarys(order, is_pruned):
  model = small_model(order)
  if is_pruned:
    model = without_some(model, order)
  random = np.random.default_rng(order)
  # Half of the histories are text, half are random, some of both begin early.
  text = join_sequences(reference.random_sequences(order, VOCAB, 60), VOCAB)
  history = random.integers(0, VOCAB, [40, 12, order - 1], dtype=np.int32)
  ends = random.integers(order, len(text), [40, 6, 1])
  history[:, :6] = text[ends - np.arange(order - 1, 0, -1)]
  is_absent = np.arange(order - 1) < random.integers(0, 3 * order, [40, 12, 1]) - 2 * order
  history[is_absent] = -1
  candidates = np.broadcast_to(np.arange(VOCAB, dtype=np.int32), [40, VOCAB])
  found = np.asarray(score(arrays.device_arrays(model), history, candidates))
  wanted = expected(model, history, candidates)
  np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
  if order > 1:
    slow = reference.Dictionary(model)
    grams = {
        (*history[row, width].tolist(), w) for row, width in np.ndindex(40, 12)
        for w in range(VOCAB)
    }
    assert {gram in slow.grams for gram in grams} == {True, False}


def test_a_context_may_be_shorter_or_longer_than_the_models():
  model = small_model(3)
  device = arrays.device_arrays(model)
  candidates = np.arange(VOCAB, dtype=np.int32)[None]
  for length in range(5):
    history = np.random.default_rng(length).integers(0, VOCAB, [1, 9, length], dtype=np.int32)
    np.testing.assert_allclose(
        score(device, history, candidates), expected(model, history, candidates), atol=2e-6
    )


def test_leading_axes_are_kept():
  device = arrays.device_arrays(small_model(3))
  random = np.random.default_rng(0)
  history = random.integers(0, VOCAB, [3, 4, 5, 2], dtype=np.int32)
  candidates = random.integers(0, VOCAB, [3, 4, 6], dtype=np.int32)
  found = score(device, history, candidates)
  assert found.shape == (3, 4, 5, 6) and found.dtype == jnp.float32
  flat = score(device, history.reshape(12, 5, 2), candidates.reshape(12, 6))
  np.testing.assert_array_equal(found.reshape(12, 5, 6), flat)


@pytest.mark.parametrize("tokens", ["random", "alike"])
def test_no_bucket_answers_for_another_in_a_large_vocabulary(tokens):
  vocab_size = 250_000
  random = np.random.default_rng(5)
  if tokens == "random":
    ids = np.unique(random.integers(0, vocab_size, 600))
  else:
    ids = np.arange(0, vocab_size, 4096)  # Their low bits are the same.
  context = np.repeat(random.choice(ids, 40, replace=False), len(ids))
  token = np.tile(ids, 40)
  keep = random.random(len(token)) < 0.5
  context, token = context[keep], token[keep]
  by_key = np.lexsort((token, context))
  bigrams = Grams(context[by_key], token[by_key], token[by_key], vocab_size)
  values = -np.arange(len(token)) - 1.0
  zeros = np.zeros(vocab_size)
  model = BackOff((unigrams(vocab_size), bigrams), (zeros, values), (zeros, 0 * values))
  device = arrays.device_arrays(model)
  # All that is there, and as much that isn't, near it.
  history = np.unique(context).astype(np.int32)
  wanted = np.zeros([len(history), 3 * len(ids)])
  candidates = np.concatenate([ids, ids + 1, (ids + 2048) % vocab_size]).astype(np.int32)
  candidates = np.clip(candidates, 0, vocab_size - 1)
  for i, h in enumerate(history):
    found = bigrams.find(np.full(len(candidates), h), candidates)
    wanted[i] = np.where(found < 0, 0, values[found])
  np.testing.assert_array_equal(score(device, history[None, :, None], candidates[None])[0], wanted)
  assert (wanted < 0).any() and (wanted == 0).any()


def test_all_of_a_scan_is_on_the_device():
  device = arrays.device_arrays(small_model(4))

  @jax.jit
  def run(device, history, candidates):
    step = lambda total, x: (total + arrays.log_probs(device, *x).sum(), None)
    return jax.lax.scan(step, 0.0, (history, candidates))[0]

  random = np.random.default_rng(1)
  history = random.integers(0, VOCAB, [5, 2, 4, 3], dtype=np.int32)
  candidates = random.integers(0, VOCAB, [5, 2, 6], dtype=np.int32)
  wanted = sum(np.asarray(score(device, *x)).sum() for x in zip(history, candidates))
  np.testing.assert_allclose(run(device, history, candidates), wanted, rtol=1e-5)
