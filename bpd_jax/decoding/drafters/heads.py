"""Drafts from predictors of later tokens on the decoder's states.

Blockwise parallel decoding (Stern et al. 2018, §3; Kim et al. 2024, §2) reads
head i = 2 … h on the hidden state of the last accepted node. Head 1 is the base
model: its choice there is the root, certain already.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax.numpy as jnp

from bpd_jax.decoding.lattice import top_k_lattice
from bpd_jax.decoding.types import Array, Lattice, Prompt, Step


@dataclasses.dataclass(frozen=True)
class HeadsDrafter:
  """One step of the lattice for each head after the first.

  Attributes:
    depth: heads that draft, h - 1 or fewer.
    read_logits: (params, step, depth) -> [batch, depth, vocab], the logits of
      the heads from `step.hidden` or `step.probes`.
    top_k: candidates a step.
  """

  depth: int
  read_logits: Callable[[Any, Step, int], Array]
  top_k: int = 1

  def init(self, params, prompt: Prompt) -> tuple[()]:
    return ()

  def propose(self, params, state, step: Step, key: Array) -> tuple[Lattice, tuple[()]]:
    logits = self.read_logits(params, step, self.depth)
    # Before the first call there is no state to draft from.
    num_steps = jnp.where(step.num_tokens > 0, self.depth, 0)
    return top_k_lattice(logits, self.top_k, num_steps), ()
