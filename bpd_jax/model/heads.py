"""Parallel heads: predictors of the tokens after the next one (Stern et al. 2018, §4).

Head 1 is the base model untouched. Head i = 2 … h is x + W2_i act(W1_i x) on
the decoder's normed last state x, then the base model's own output projection.
W2 starts at 0, so that a fresh head repeats head 1.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from bpd_jax.model.config import ModelConfig
from bpd_jax.model.layers import activation, variance_init

Array = jax.Array


class ParallelHeads(nn.Module):
  """States of heads 2 … h."""

  config: ModelConfig

  @nn.compact
  def __call__(self, hidden: Array, num_heads: int | None = None) -> Array:
    """Reads the heads.

    Args:
      hidden: [..., d_model] normed last states.
      num_heads: how many, from head 2 on; all by default.

    Returns:
      [..., num_heads, d_model].
    """
    config = self.config
    count = config.block_size - 1
    num_heads = count if num_heads is None else num_heads
    w1 = self.param(
        "w1",
        nn.with_partitioning(variance_init(config.d_model), ("block", "embed", "mlp")),
        (count, config.d_model, config.head_d_ff),
        config.param_dtype,
    )[:num_heads].astype(config.dtype)
    w2 = self.param(
        "w2",
        nn.with_partitioning(nn.initializers.zeros_init(), ("block", "mlp", "embed")),
        (count, config.head_d_ff, config.d_model),
        config.param_dtype,
    )[:num_heads].astype(config.dtype)
    inner = activation(config.activation)(jnp.einsum("...d,idm->...im", hidden, w1))
    return hidden[..., None, :] + jnp.einsum("...im,imd->...id", inner, w2)
