"""Drafts from predictors of later tokens on the decoder's states.

Blockwise parallel decoding (Stern et al. 2018, §3; Kim et al. 2024, §2) reads
head i = 2 … h on the hidden state of the last accepted node. Head 1 is the base
model: its choice there is the root, certain already.
"""

import dataclasses
from typing import Any, Protocol

from flax import struct
import jax.numpy as jnp

from bpd_jax.decoding.lattice import top_k_lattice
from bpd_jax.decoding.types import Array, Cache, Context, Drafter, Lattice, Params, Prompt, Step


class Predictor(Protocol):
  """What the drafter calls; hashable, as it is fixed when a loop is compiled."""

  def empty_hidden(self, batch: int) -> Array:
    """[batch, d] zeros of the model's dtype."""

  def head_states(self, params: Params, hidden: Array, num_heads: int) -> Array:
    """States of so many heads after the first, [batch, d] -> [batch, num_heads, d]."""

  def logits(self, base: Any, hidden: Array) -> Array:
    """The base model's output projection, [..., d] -> [..., vocab]."""


@struct.dataclass
class HeadsState:
  """What the heads read.

  Attributes:
    hidden: [batch, d] state of the last accepted node.
    is_there: [batch] bool; before the first call there is no state to draft from.
  """

  hidden: Array
  is_there: Array


@dataclasses.dataclass(frozen=True)
class HeadsDrafter(Drafter):
  """One step of the lattice for each head after the first.

  Attributes:
    depth: heads that draft, h - 1 or fewer.
    model: its calls.
    num_candidates: of a head.
  """

  depth: int
  model: Predictor
  num_candidates: int = 1

  def init(self, params: Params, prompt: Prompt, context: Context | None) -> HeadsState:
    batch = prompt.lengths.shape[0]
    return HeadsState(self.model.empty_hidden(batch), jnp.zeros([batch], bool))

  def start(self, params: Params, state: HeadsState, step: Step, proposed) -> HeadsState:
    return HeadsState(step.hidden, step.num_tokens > 0)

  def shallower(self, depth: int) -> Drafter:
    return dataclasses.replace(self, depth=depth)

  def propose(self, params: Params, state: HeadsState, noise, past: Cache) -> Lattice:
    states = self.model.head_states(params, state.hidden, self.depth)
    num_steps = jnp.where(state.is_there, self.depth, 0)
    lattice = top_k_lattice(
        self.model.logits(params.base, states), self.num_candidates, num_steps
    )
    return lattice.replace(states=states)
