"""The rule that a token doesn't follow itself: the control for every other scorer.

Drafts of independent heads repeat tokens (Kim et al. 2024, §2.1). What a language
model gains over this rule is more than removing those repeats.
"""

import dataclasses

import jax.numpy as jnp

from bpd_jax.decoding.scorers.window import begin_windows, extend_windows
from bpd_jax.decoding.types import Array, Prompt, Scorer, Step


@dataclasses.dataclass(frozen=True)
class NoRepeatScorer(Scorer):
  """-1 for a candidate that equals the token before it, 0 for others."""

  context = 1

  def init(self, params, prompt: Prompt, context) -> Array:
    """The root, [batch] int32; before the first call there is none."""
    return jnp.full_like(prompt.lengths, -1)

  def start(self, params, state: Array, step: Step, lattice) -> Array:
    return step.newest(state)

  def begin(self, params, state: Array, num_paths: int, depth: int) -> Array:
    return begin_windows(state[:, None], num_paths)

  def extend(self, params, state: Array, trails: Array, parents: Array, tokens: Array, i) -> Array:
    return extend_windows(trails, parents, tokens)

  def score(self, params, state: Array, trails: Array, candidates: Array, i) -> Array:
    return self.bound(params, state, trails[..., 0], candidates, i)

  def bound(self, params, state: Array, before: Array, candidates: Array, i) -> Array:
    return -(candidates[:, None] == before[..., None]).astype(jnp.float32)
