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
  """States of heads 2 … h.

  Attributes:
    config: sizes and dtypes.
    is_view: read the decode-time view of the parameters, kernels [out, in].
  """

  config: ModelConfig
  is_view: bool = False

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

    def kernel(name, init, shape, names):
      if self.is_view:
        shape, names = shape[::-1], names[::-1]
      shape, names = (config.block_size - 1, *shape), ("block", *names)
      stacked = self.param(name, nn.with_partitioning(init, names), shape, config.param_dtype)
      return stacked[:num_heads].astype(config.dtype)

    shape, names = (config.d_model, config.head_d_ff), ("embed", "mlp")
    w1 = kernel("w1", variance_init(config.d_model), shape, names)
    w2 = kernel("w2", nn.initializers.zeros_init(), shape[::-1], names[::-1])
    into, out = ("imd", "idm") if self.is_view else ("idm", "imd")
    inner = activation(config.activation)(jnp.einsum(f"...d,{into}->...im", hidden, w1))
    return hidden[..., None, :] + jnp.einsum(f"...im,{out}->...id", inner, w2)
