"""Drafts copied from a known text: the ceiling that any drafter can reach.

With greedy's own output as the text this is a perfect drafter. It needs
1 + ceil((N - 1) / h) calls for N tokens, because the first call, like that of
the heads, has no draft.
"""

import dataclasses

from flax import struct
import jax.numpy as jnp

from bpd_jax.decoding.types import (
    Array,
    Cache,
    Context,
    Drafter,
    Lattice,
    Params,
    Prompt,
    Step,
)


@struct.dataclass
class ReferenceState:
  """The text and how much of it is certain.

  Attributes:
    tokens: [batch, length] int32.
    num_tokens: [batch] int32.
  """

  tokens: Array
  num_tokens: Array


def begin_reference(prompt: Prompt) -> ReferenceState:
  """None of `prompt.references` is certain yet."""
  return ReferenceState(prompt.references, jnp.zeros_like(prompt.lengths))


@dataclasses.dataclass(frozen=True)
class ReferenceDrafter(Drafter):
  """Drafts the tokens of the reference after those that are certain.

  Attributes:
    depth: tokens drafted a call.
  """

  depth: int

  reads_references = True

  def init(self, params: Params, prompt: Prompt, context: Context | None) -> ReferenceState:
    return begin_reference(prompt)

  def start(self, params: Params, state: ReferenceState, step: Step, proposed) -> ReferenceState:
    return state.replace(num_tokens=state.num_tokens + step.num_tokens)

  def shallower(self, depth: int) -> Drafter:
    return dataclasses.replace(self, depth=depth)

  def propose(self, params: Params, state: ReferenceState, noise, past: Cache) -> Lattice:
    length = state.tokens.shape[1]
    position = state.num_tokens[:, None] + jnp.arange(self.depth)
    tokens = jnp.take_along_axis(
        state.tokens, jnp.minimum(position, length - 1), axis=1
    )
    num_steps = jnp.where(
        state.num_tokens > 0, jnp.clip(length - state.num_tokens, 0, self.depth), 0
    )
    return Lattice(
        tokens=tokens[..., None], scores=jnp.zeros(tokens.shape + (1,)), num_steps=num_steps,
    )
