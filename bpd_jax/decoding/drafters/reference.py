"""Drafts copied from a known text: the ceiling that any drafter can reach.

With greedy's own output as the text this is a perfect drafter. It needs
1 + ceil((N - 1) / h) calls for N tokens, because the first call, like that of
the heads, has no draft.
"""

import dataclasses

from flax import struct
import jax.numpy as jnp

from bpd_jax.decoding.types import Array, Lattice, Prompt, Step


@struct.dataclass
class ReferenceState:
  """The text and how much of it is certain.

  Attributes:
    tokens: [batch, length] int32.
    num_tokens: [batch] int32.
  """

  tokens: Array
  num_tokens: Array


@dataclasses.dataclass(frozen=True)
class ReferenceDrafter:
  """Drafts the tokens of the reference after those that are certain.

  Attributes:
    depth: tokens drafted a call.
  """

  depth: int

  def init(self, params, prompt: Prompt) -> ReferenceState:
    """Takes `prompt.references`, [batch, length] int32."""
    return ReferenceState(
        tokens=prompt.references, num_tokens=jnp.zeros([prompt.references.shape[0]], jnp.int32)
    )

  def propose(
      self, params, state: ReferenceState, step: Step, key: Array
  ) -> tuple[Lattice, ReferenceState]:
    num_tokens = state.num_tokens + step.num_tokens
    length = state.tokens.shape[1]
    position = num_tokens[:, None] + jnp.arange(self.depth)
    tokens = jnp.take_along_axis(
        state.tokens, jnp.minimum(position, length - 1), axis=1
    )
    num_steps = jnp.where(
        step.num_tokens > 0, jnp.clip(length - num_tokens, 0, self.depth), 0
    )
    lattice = Lattice(
        tokens=tokens[..., None],
        scores=jnp.zeros(tokens.shape + (1,)),
        num_steps=num_steps,
    )
    return lattice, state.replace(num_tokens=num_tokens)
