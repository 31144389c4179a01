"""The layers that both stacks are made of: norm, attention, feed-forward.

Parameters have T5X's names and logical axes. With `is_view` a layer reads the
decode-time view of its parameters (`decode_view` in `model.py`): kernels lie
[out, in], and projections of the same input are one kernel. A call with few
rows is bound by reading the weights, which a CPU does faster that way; the
arithmetic is the same.
"""

from collections.abc import Callable
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.model.config import ModelConfig
from bpd_jax.partitioning import Partitioning

Array = jax.Array

# Added to the scores of masked keys: finite, so a row without any key stays
# finite, and far below any score, so that exp() of it is exactly 0.
MASKED = -1e9


def masked(dtype) -> float:
  """`MASKED`, or what of it a dtype can hold with a score added."""
  return max(MASKED, float(jnp.finfo(dtype).min) / 2)


def activation(name: str) -> Callable[[Array], Array]:
  """T5's activations; gelu is the tanh approximation."""
  return {"gelu": nn.gelu, "relu": nn.relu, "silu": nn.silu}[name]


def variance_init(fan_in: int) -> nn.initializers.Initializer:
  """Normal with variance 1 / fan_in, as T5 starts its projections."""
  return nn.initializers.normal(stddev=1.0 / math.sqrt(fan_in))


class RMSNorm(nn.Module):
  """x / rms(x) * scale, statistics in `accum_dtype`.

  Input and output [..., d_model].
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    config = self.config
    scale = self.param(
        "scale",
        nn.with_partitioning(nn.initializers.ones_init(), ("embed",)),
        (config.d_model,),
        config.param_dtype,
    )
    wide = x.astype(config.accum_dtype)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + config.norm_epsilon)
    return (normed * scale.astype(config.accum_dtype)).astype(config.dtype)


def project(x: Array, kernel: Array, is_view: bool) -> Array:
  """[..., in] -> [..., out], by a kernel [in, out], or [out, in] in the view.

  Rows are joined first: on a CPU the gradient of a kernel takes three times as
  long where two axes are summed over.
  """
  rows = x.reshape(-1, x.shape[-1])
  out = jnp.einsum("ni,oi->no" if is_view else "ni,io->no", rows, kernel)
  return out.reshape(*x.shape[:-1], out.shape[-1])


def relpos_bucket_table(num_buckets: int, max_distance: int) -> np.ndarray:
  """Bucket of each distance 0 … max_distance (all beyond share the last one).

  Half of the buckets hold one distance each, the others grow by a constant
  factor up to `max_distance` (Raffel et al. 2020, §2.1). In float32, as the
  published models were made.
  """
  distance = np.arange(max_distance + 1)
  exact = num_buckets // 2
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  ratio = ratio / np.float32(math.log(max_distance / exact))
  # Distances below `exact` give negative numbers here and are not used.
  large = exact + (ratio * np.float32(num_buckets - exact)).astype(np.int32)
  return np.where(distance < exact, distance, np.minimum(large, num_buckets - 1)).astype(
      np.int32
  )


class RelativePositionBias(nn.Module):
  """Bias on attention scores by bucketed distance, shared by a stack's layers."""

  config: ModelConfig
  is_bidirectional: bool

  @nn.compact
  def __call__(self, query_position: Array, key_position: Array) -> Array:
    """Looks the bias up.

    Args:
      query_position: [batch or 1, queries] int32.
      key_position: [batch or 1, keys] int32.

    Returns:
      [batch or 1, heads, queries, keys] of `accum_dtype`.
    """
    config = self.config
    embedding = self.param(
        "rel_embedding",
        nn.with_partitioning(nn.initializers.normal(1.0), ("heads", "relpos_buckets")),
        (config.num_heads, config.relpos_buckets),
        config.param_dtype,
    ).astype(config.accum_dtype)
    side = config.relpos_buckets // 2 if self.is_bidirectional else config.relpos_buckets
    table = relpos_bucket_table(side, config.relpos_max_distance)
    back = query_position[:, :, None] - key_position[:, None, :]
    distance = jnp.abs(back) if self.is_bidirectional else jnp.maximum(back, 0)
    index = jnp.minimum(distance, config.relpos_max_distance)
    by_distance = embedding[:, table]  # [heads, max_distance + 1]
    if self.is_bidirectional:
      # Keys to the right use the second half of the buckets.
      by_distance = jnp.concatenate([by_distance, embedding[:, table + side]], axis=1)
      index = index + jnp.where(back < 0, config.relpos_max_distance + 1, 0)
    return jnp.moveaxis(by_distance[:, index], 0, 1)


def mask_bias(bias: Array, mask: Array) -> Array:
  """Adds `masked` where the mask is False; shapes broadcast."""
  return bias + jnp.where(
      mask, jnp.zeros([], bias.dtype), jnp.asarray(masked(bias.dtype), bias.dtype)
  )


def attend(queries: Array, segments, accum_dtype, drop: Callable[[Array], Array]) -> Array:
  """Attention over one or more segments of keys under one softmax.

  Args:
    queries: [batch, queries, heads, d_kv].
    segments: (keys, values, bias) each: keys [batch, heads, d_kv, n], values
      [batch, heads, n, d_kv], bias [batch or 1, heads or 1, queries or 1, n]
      with masks in it. Laid out so, neither product transposes anything.
    accum_dtype: of scores and softmax.
    drop: dropout on the weights.

  Returns:
    [batch, queries, heads, d_kv].
  """
  scores = []
  for keys, _, bias in segments:
    score = jnp.einsum("bqhd,bhdk->bhqk", queries, keys, preferred_element_type=accum_dtype)
    scores.append(score + bias)
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
  weights = drop(weights.astype(queries.dtype))
  out, start = 0, 0
  for _, values, _ in segments:
    part = weights[..., start : start + values.shape[2]]
    # Heads stay outside until the end: with "bqhd" as the output a CPU takes
    # three times as long.
    out = out + jnp.einsum("bhqk,bhkd->bhqd", part, values)
    start += values.shape[2]
  return out.swapaxes(1, 2)


class Attention(nn.Module):
  """Multi-head attention without biases and without a scale on the scores.

  Attributes:
    config: sizes and dtypes.
    partitioning: where activations live.
    is_cross: keys and values come from the encoder.
    is_view: read the decode-time view of the parameters.
  """

  config: ModelConfig
  partitioning: Partitioning
  is_cross: bool = False
  is_view: bool = False

  def setup(self):
    config = self.config
    joined = config.num_heads * config.d_kv
    plain = variance_init(config.d_model)
    # T5 has no 1/sqrt(d_kv) in the scores; the start of the queries has it.
    scaled = variance_init(config.d_model * config.d_kv)

    def kernel(name, init, shape, names, is_view=self.is_view):
      if is_view:
        shape, names = shape[::-1], names[::-1]
      return self.param(name, nn.with_partitioning(init, names), shape, config.param_dtype)

    shape, names = (config.d_model, joined), ("embed", "joined_kv")
    if self.is_view and not self.is_cross:
      self.query_key_value = self.param(
          "query_key_value", nn.with_partitioning(plain, names[::-1]),
          (3 * joined, config.d_model), config.param_dtype,
      )
    else:
      self.query = kernel("query", scaled, shape, names)
      # Those of cross-attention run once, over whole inputs.
      self.key = kernel("key", plain, shape, names, is_view=False)
      self.value = kernel("value", plain, shape, names, is_view=False)
    self.out = kernel("out", variance_init(joined), shape[::-1], names[::-1])
    self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))

  def _split_heads(self, joined: Array) -> Array:
    """[batch, n, joined_kv] -> [batch, n, heads, d_kv]."""
    shape = joined.shape[:2] + (self.config.num_heads, self.config.d_kv)
    return self.partitioning.constrain(
        joined.reshape(shape), ("batch", "length", "heads", "kv")
    )

  def keys_values(self, x: Array) -> tuple[Array, Array]:
    """Keys [batch, heads, d_kv, n], values [batch, heads, n, d_kv] of [batch, n, d_model]."""
    keys, values = (
        self._split_heads(project(x, kernel.astype(self.config.dtype), is_view=False))
        for kernel in (self.key, self.value)
    )
    return keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2)

  def queries_keys_values(self, x: Array) -> tuple[Array, Array, Array]:
    """Queries [batch, n, heads, d_kv], and keys and values as in `keys_values`."""
    if not self.is_view:
      return (self.queries(x), *self.keys_values(x))
    kernel = self.query_key_value.astype(self.config.dtype)
    fused = project(x, kernel, is_view=True)
    fused = fused.reshape(x.shape[:2] + (self.config.num_heads, 3, self.config.d_kv))
    queries, keys, values = (
        self.partitioning.constrain(fused[..., i, :], ("batch", "length", "heads", "kv"))
        for i in range(3)
    )
    return queries, keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2)

  def queries(self, x: Array) -> Array:
    """Queries alone, for keys and values made before."""
    return self._split_heads(project(x, self.query.astype(self.config.dtype), self.is_view))

  def combine(self, queries: Array, segments, is_training: bool) -> Array:
    """Attends and projects back to [batch, n, d_model]."""
    config = self.config
    drop = lambda weights: self.dropout(weights, deterministic=not is_training)
    mixed = attend(queries, segments, config.accum_dtype, drop)
    joined = mixed.reshape(mixed.shape[:2] + (config.num_heads * config.d_kv,))
    return project(joined, self.out.astype(config.dtype), self.is_view)


class FeedForward(nn.Module):
  """wo(act(wi_0 x) * wi_1 x), or wo(act(wi x)) where not gated."""

  config: ModelConfig
  partitioning: Partitioning
  is_view: bool = False

  @nn.compact
  def __call__(self, x: Array, is_training: bool = False) -> Array:
    config = self.config
    act = activation(config.activation)

    def kernel(name, shape, names):
      init = variance_init(shape[0])
      if self.is_view:
        shape, names = shape[::-1], names[::-1]
      init = nn.with_partitioning(init, names)
      return self.param(name, init, shape, config.param_dtype).astype(config.dtype)

    shape, names = (config.d_model, config.d_ff), ("embed", "mlp")
    if config.is_gated and self.is_view:
      fused = project(x, kernel("wi", (config.d_model, 2 * config.d_ff), names), is_view=True)
      fused = fused.reshape(x.shape[:2] + (config.d_ff, 2))
      hidden = act(fused[..., 0]) * fused[..., 1]
    elif config.is_gated:
      hidden = act(project(x, kernel("wi_0", shape, names), is_view=False))
      hidden = hidden * project(x, kernel("wi_1", shape, names), is_view=False)
    else:
      hidden = act(project(x, kernel("wi", shape, names), self.is_view))
    hidden = self.partitioning.constrain(hidden, ("batch", "length", "mlp"))
    dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
    hidden = dropout(hidden, deterministic=not is_training)
    return project(hidden, kernel("wo", shape[::-1], names[::-1]), self.is_view)
