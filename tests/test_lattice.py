"""Lattices from logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpd_jax.decoding.lattice import BLOCK, top_k, top_k_lattice


@pytest.mark.parametrize("n", [7, BLOCK * 3, BLOCK * 40, BLOCK * 64 + 11])
@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("spread", [3, 50, 10**6])
def test_top_k_is_that_of_a_sort_ties_included(n, k, spread):
  rng = np.random.default_rng([n, k, spread])
  values = rng.integers(-spread, spread, [5, 3, n]).astype(np.float32)
  best, index = jax.jit(top_k, static_argnums=1)(values, k)
  order = np.argsort(-values, axis=-1, kind="stable")[..., :k]
  np.testing.assert_array_equal(index, order)
  np.testing.assert_array_equal(best, np.take_along_axis(values, order, axis=-1))


def test_top_k_of_what_no_candidate_may_be():
  values = np.full([1, BLOCK * 40 + 3], -np.inf, np.float32)
  values[0, [5, 2000, BLOCK * 40 + 2]] = [1, 3, 2]
  best, index = top_k(jnp.array(values), 3)
  assert index.tolist() == [[2000, BLOCK * 40 + 2, 5]] and best.tolist() == [[3, 2, 1]]


@pytest.mark.parametrize("k", [1, 4])
def test_scores_are_log_probabilities_of_the_whole_vocabulary(k):
  rng = np.random.default_rng(k)
  logits = rng.normal(size=(2, 3, BLOCK * 20)).astype(np.float32)
  lattice = top_k_lattice(jnp.array(logits), k, jnp.array([3, 1]))
  logs = logits - np.log(np.exp(logits.astype(float)).sum(-1, keepdims=True))
  order = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
  np.testing.assert_array_equal(lattice.tokens, order)
  np.testing.assert_allclose(
      lattice.scores, np.take_along_axis(logs, order, axis=-1), rtol=1e-5
  )
  assert lattice.num_steps.tolist() == [3, 1]
