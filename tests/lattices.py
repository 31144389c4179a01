"""Lattices and scorers whose scores are integers, and all of their paths in plain Python."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.types import Lattice, Scorer


@dataclasses.dataclass(frozen=True)
class HashScorer(Scorer):
  """Integers from 0 down to -`spread`, by the root and the newest drafted tokens."""

  context: int
  spread: int = 5

  def init(self, params, prompt, context):
    return jnp.full_like(prompt.lengths, -1)

  def start(self, params, state, step, lattice):
    return step.newest(state)

  def value(self, root, history, token):
    """The same of plain integers; arrays broadcast."""
    x = root * 7 + 3
    for before in history:
      x = (x * 31 + before + 1) % 10007
    return self.last(x, token)

  def last(self, x, token):
    return -(((x * 131 + token * 17) % 10007) % (self.spread + 1))

  def begin(self, params, state, num_paths, depth):
    return jnp.full([len(state), num_paths, depth], -1, jnp.int32)

  def extend(self, params, state, trails, parents, tokens, i):
    old = jnp.take_along_axis(trails, parents[..., None], axis=1)
    return old.at[..., i].set(tokens)

  def score(self, params, state, trails, candidates, i):
    x = state[:, None] * 7 + 3
    for j in range(trails.shape[-1]):
      is_read = (j < i) & ((self.context < 0) | (j >= i - self.context))
      x = jnp.where(is_read, (x * 31 + trails[..., j] + 1) % 10007, x)
    return self.last(x[..., None], candidates[:, None]).astype(jnp.float32)

  def bound(self, params, state, before, candidates, i):
    if not 0 <= self.context <= 1:
      return jnp.zeros([1, 1, 1])
    history = [before[..., None]] * self.context
    return self.value(state[:, None, None], history, candidates[:, None]).astype(jnp.float32)


def random_lattice(rng, batch, depth, k, vocab_size=50, spread=4, num_steps=None):
  """Distinct candidates a step; scores integers with many ties, best first."""
  tokens = np.argsort(rng.random([batch, depth, vocab_size]), -1)[..., :k].astype(np.int32)
  scores = -np.sort(rng.integers(0, spread + 1, [batch, depth, k]), -1).astype(np.float32)
  if num_steps is None:
    num_steps = np.full([batch], depth, np.int32)
  return Lattice(tokens, scores, num_steps)


def all_paths(tokens, scores, num_steps, worth):
  """Every path of one row with its score, best first.

  Args:
    tokens, scores: [depth, k] arrays.
    num_steps: steps that hold a draft.
    worth: (history, token, i) -> what the scorers add.

  Returns:
    A list of (score, tuple of tokens).
  """
  paths = []
  k = tokens.shape[1]
  for choice in itertools.product(range(k), repeat=num_steps):
    path = [int(tokens[i, c]) for i, c in enumerate(choice)]
    total = sum(
        float(scores[i, c]) + worth(path[:i], path[i], i) for i, c in enumerate(choice)
    )
    paths.append((total, tuple(path)))
  return sorted(paths, key=lambda x: -x[0])
