"""Lattices and scorers whose scores are integers, and all of their paths in plain Python."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.types import Lattice


@dataclasses.dataclass(frozen=True)
class HashScorer:
  """Integers from 0 down to -`spread`, by the root and the newest drafted tokens."""

  context: int
  spread: int = 5

  def init(self, params, prompt):
    return jnp.full([prompt.tokens.shape[0]], -1, jnp.int32)

  def start(self, params, state, step):
    return step.newest(state)

  def value(self, root, history, token):
    """The same of plain integers; arrays broadcast."""
    x = root * 7 + 3
    for before in history:
      x = (x * 31 + before + 1) % 10007
    return -(((x * 131 + token * 17) % 10007) % (self.spread + 1))

  def score(self, params, state, history, candidates, i):
    wanted = i if self.context < 0 else min(i, self.context)
    assert history.shape[-1] == wanted
    before = [history[..., j, None] for j in range(wanted)]
    return self.value(state[:, None, None], before, candidates[:, None]).astype(jnp.float32)

  def bound(self, params, state, history, candidates, i):
    return jnp.zeros([1, 1, 1])


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
