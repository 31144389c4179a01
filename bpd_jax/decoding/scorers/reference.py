"""Scores from a known text: with the base model's own output, the oracle.

It takes at each step the right token wherever that is a candidate, so the path
found is the one with the longest accepted prefix: in one call nothing that re-scores
the same lattice accepts more (Kim et al. 2024, §5.3). Over a whole row it is no proven
bound, as a shorter step can end where the heads see further.
"""

import dataclasses

import jax.numpy as jnp

from bpd_jax.decoding.drafters.reference import begin_reference, ReferenceState
from bpd_jax.decoding.types import Array, Prompt, Scorer, Step


@dataclasses.dataclass(frozen=True)
class ReferenceScorer(Scorer):
  """0 for the reference's token, `WRONG` for others."""

  context = 0
  reads_references = True
  WRONG = -1e4

  def init(self, params, prompt: Prompt, context) -> ReferenceState:
    return begin_reference(prompt)

  def start(self, params, state: ReferenceState, step: Step, lattice) -> ReferenceState:
    return state.replace(num_tokens=state.num_tokens + step.num_tokens)

  def score(
      self, params, state: ReferenceState, trails: tuple[()], candidates: Array, i
  ) -> Array:
    at = jnp.minimum(state.num_tokens + i, state.tokens.shape[1] - 1)
    right = jnp.take_along_axis(state.tokens, at[:, None], axis=1)
    return jnp.where(candidates == right, 0, self.WRONG)[:, None]

  def bound(
      self, params, state: ReferenceState, before: Array, candidates: Array, i
  ) -> Array:
    return self.score(params, state, (), candidates, i)
