"""Parallel heads: predictors of the tokens after the next one (Stern et al. 2018, §4).

Head 1 is the base model untouched. Head i = 2 … h is x + W2_i act(W1_i x) on
the decoder's normed last state x, then the base model's own output projection.
W2 starts at 0, so that a fresh head repeats head 1.
"""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from bpd_jax.addons.addon import Addon, Made
from bpd_jax.decoding.drafters.empty import EmptyDrafter
from bpd_jax.decoding.drafters.heads import HeadsDrafter
from bpd_jax.decoding.types import Drafting, Params
from bpd_jax.errors import check_count, InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.layers import activation, project, variance_init
from bpd_jax.reader import ModelReader

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Heads(Addon):
  """Heads 2 … h of a base model, all of one width.

  Attributes:
    block_size: h, tokens predicted at once; h - 1 of them by parameters, 1 by none.
    d_ff: width inside each head; the base's by default.
  """

  block_size: int
  d_ff: int | None = None

  def __post_init__(self):
    check_count("Heads.block_size", self.block_size)
    if self.d_ff is not None:
      check_count("Heads.d_ff", self.d_ff)

  def describe(self, config: ModelConfig) -> str:
    """How many there are behind a base, and how wide."""
    if self.block_size == 1:
      return "1"
    return (
        f"{self.block_size}, {self.block_size - 1} of them parallel heads of width "
        f"{self.d_ff or config.d_ff}"
    )

  def init(self, config: ModelConfig, key: Array) -> Any:
    """See `Addon.init`: `w1` [heads, d_model, d_ff] and `w2` [heads, d_ff, d_model]."""
    if self.block_size == 1:
      return {}
    shape = (self.block_size - 1, config.d_model, self.d_ff or config.d_ff)
    w1 = variance_init(config.d_model)(key, shape, jnp.dtype(config.param_dtype))
    return {
        "w1": nn.Partitioned(w1, ("block", "embed", "mlp")),
        "w2": nn.Partitioned(jnp.zeros_like(w1.swapaxes(1, 2)), ("block", "mlp", "embed")),
    }

  def view(self, own: Any) -> Any:
    """Every head by itself, kernels [out, in].

    On a CPU 7 heads are twice as fast so, and 3 heads three times.
    """
    return {
        f"{name}_{i + 2}": jnp.swapaxes(kernel, -1, -2)
        for name, stacked in own.items() for i, kernel in enumerate(stacked)
    }

  def make(
      self, reader: ModelReader, own: Any, *, block_size: int | None = None, top_k: int = 1
  ) -> Made:
    """The drafter of the first heads; nothing drafts where there is head 1 alone."""
    block_size = self.block_size if block_size is None else block_size
    if not 1 <= block_size <= self.block_size:
      raise InputError("block_size", block_size, f"1 … {self.block_size}, the heads")
    vocab_size = reader.model.config.vocab_size
    if not 1 <= top_k <= vocab_size:
      raise InputError("top_k", top_k, f"1 … {vocab_size}, the vocabulary")
    if block_size == 1:
      return Made(Drafting(EmptyDrafter()))
    predictor = HeadsReader(reader.model, reader.sees_input)
    return Made(Drafting(HeadsDrafter(block_size - 1, predictor, top_k), own))

  def states(
      self, config: ModelConfig, own: Any, hidden: Array, which: Array | None = None
  ) -> Array:
    """States of all heads after the first, for training.

    Args:
      config: of the base.
      own: parameters as they are stored.
      hidden: [..., d_model] normed last states.
      which: the number of one head, a traced int32 from 2 on, to read alone.

    Returns:
      [heads, ..., d_model].
    """
    w1, w2 = (own[name].astype(config.dtype) for name in ("w1", "w2"))
    if which is not None:
      w1, w2 = (jax.lax.dynamic_slice_in_dim(w, which - 2, 1) for w in (w1, w2))
    inner = activation(config.activation)(jnp.einsum("...d,idm->...im", hidden, w1))
    states = hidden[..., None, :] + jnp.einsum("...im,imd->...id", inner, w2)
    return jnp.moveaxis(states, -2, 0)


@dataclasses.dataclass(frozen=True)
class HeadsReader(ModelReader):
  """A model with heads, as `HeadsDrafter` calls it."""

  def head_states(self, params: Params, hidden: Array, num_heads: int) -> Array:
    """States of heads 2, 3, …: [..., d_model] -> [..., num_heads, d_model]."""
    config = self.model.config
    act = activation(config.activation)
    states = []
    for i in range(2, num_heads + 2):
      w1, w2 = (params.own[f"{name}_{i}"].astype(config.dtype) for name in ("w1", "w2"))
      states.append(hidden + project(act(project(hidden, w1, True)), w2, True))
    return jnp.stack(states, axis=-2)
