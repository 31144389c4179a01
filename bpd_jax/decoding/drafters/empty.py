"""The drafter that drafts nothing: with it the loop is greedy decoding."""

import dataclasses

import jax.numpy as jnp

from bpd_jax.decoding.types import Array, Lattice, Prompt, Step


@dataclasses.dataclass(frozen=True)
class EmptyDrafter:
  """Never drafts a token."""

  depth = 0

  def init(self, params, prompt: Prompt) -> tuple[()]:
    return ()

  def propose(self, params, state, step: Step, key: Array) -> tuple[Lattice, tuple[()]]:
    batch = step.num_tokens.shape[0]
    lattice = Lattice(
        tokens=jnp.zeros([batch, 0, 1], jnp.int32),
        scores=jnp.zeros([batch, 0, 1]),
        num_steps=jnp.zeros([batch], jnp.int32),
    )
    return lattice, ()
