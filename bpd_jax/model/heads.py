"""Parallel heads: predictors of the tokens after the next one (Stern et al. 2018, §4).

Head 1 is the base model untouched. Head i = 2 … h is x + W2_i act(W1_i x) on
the decoder's normed last state x, then the base model's own output projection.
W2 starts at 0, so that a fresh head repeats head 1.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from bpd_jax.model.config import ModelConfig
from bpd_jax.model.layers import activation, project, variance_init

Array = jax.Array


class ParallelHeads(nn.Module):
  """States of heads 2 … h.

  Attributes:
    config: sizes and dtypes.
    is_view: read the decode-time view of the parameters: every head by itself, kernels
      [out, in]. On a CPU 7 heads are twice as fast so, and 3 heads three times.
  """

  config: ModelConfig
  is_view: bool = False

  @nn.compact
  def __call__(self, hidden: Array, num_heads: int | None = None, which=None) -> Array:
    """Reads the heads.

    Args:
      hidden: [..., d_model] normed last states.
      num_heads: how many, from head 2 on; all by default.
      which: the number of one head, a traced int32 from 2 on, to read alone;
        not in the view.

    Returns:
      [..., num_heads, d_model].
    """
    config = self.config
    act = activation(config.activation)
    num_heads = config.block_size - 1 if num_heads is None else num_heads
    shape, names = (config.d_model, config.head_d_ff), ("embed", "mlp")
    starts = variance_init(config.d_model), nn.initializers.zeros_init()

    def kernel(name, init, shape, names):
      init = nn.with_partitioning(init, names)
      return self.param(name, init, shape, config.param_dtype).astype(config.dtype)

    if self.is_view:
      states = []
      for i in range(2, num_heads + 2):
        w1 = kernel(f"w1_{i}", starts[0], shape[::-1], names[::-1])
        w2 = kernel(f"w2_{i}", starts[1], shape, names)
        states.append(hidden + project(act(project(hidden, w1, True)), w2, True))
      return jnp.stack(states, axis=-2)
    stacked = (config.block_size - 1,)
    w1 = kernel("w1", starts[0], stacked + shape, ("block", *names))
    w2 = kernel("w2", starts[1], stacked + shape[::-1], ("block", *names[::-1]))
    if which is None:
      w1, w2 = w1[:num_heads], w2[:num_heads]
    else:
      w1, w2 = (jax.lax.dynamic_slice_in_dim(w, which - 2, 1) for w in (w1, w2))
    inner = act(jnp.einsum("...d,idm->...im", hidden, w1))
    return hidden[..., None, :] + jnp.einsum("...im,imd->...id", inner, w2)
