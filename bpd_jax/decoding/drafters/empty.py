"""The drafter that drafts nothing: with it the loop is greedy decoding."""

import dataclasses

import jax.numpy as jnp

from bpd_jax.decoding.types import Cache, Drafter, Lattice, Params


@dataclasses.dataclass(frozen=True)
class EmptyDrafter(Drafter):
  """Never drafts a token."""

  depth = 0

  def propose(self, params: Params, state, noise, past: Cache) -> Lattice:
    batch = past.lengths.shape[0]
    return Lattice(
        tokens=jnp.zeros([batch, 0, 1], jnp.int32),
        scores=jnp.zeros([batch, 0, 1]),
        num_steps=jnp.zeros([batch], jnp.int32),
    )
