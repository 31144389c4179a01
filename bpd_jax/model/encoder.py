"""The encoder stack."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from bpd_jax.model.config import ModelConfig
from bpd_jax.model.layers import (
  Attention,
  FeedForward,
  mask_bias,
  RelativePositionBias,
  RMSNorm,
)
from bpd_jax.partitioning import Partitioning

Array = jax.Array


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward, norm first, residual around each."""

  config: ModelConfig
  partitioning: Partitioning

  @nn.compact
  def __call__(
      self, x: Array, bias: Array, mask: Array, is_training: bool
  ) -> tuple[Array, None]:
    """[batch, length, d_model] -> the same, and None for the scan.

    Bias [1, heads, length, length] and mask [batch, 1, length or 1, length] come
    apart: their sum is as large as the scores, and so would its gradient be.
    """
    config, place = self.config, self.partitioning
    drop = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,), deterministic=not is_training)
    attention = Attention(config, place, name="attention")
    normed = RMSNorm(config, name="pre_attention_layer_norm")(x)
    queries, keys, values = attention.queries_keys_values(normed)
    segment = (keys, values, mask_bias(bias, mask))
    x = x + drop(attention.combine(queries, [segment], is_training))
    normed = RMSNorm(config, name="pre_mlp_layer_norm")(x)
    x = x + drop(FeedForward(config, place, name="mlp")(normed, is_training))
    return place.constrain(x, ("batch", "length", "embed")), None


def stack_layers(
    layer: type[nn.Module], num_layers: int, num_inputs: int, unroll: int, is_random: bool
) -> type[nn.Module]:
  """A scan over layers whose parameters are stacked on a first axis `layers`.

  Args:
    layer: a module with `__call__(x, *inputs, is_training) -> (x, None)`.
    num_layers: how many.
    num_inputs: how many inputs each layer gets as they are.
    unroll: how many layers an iteration goes through.
    is_random: whether layers draw: parameters that they start with, or dropout.
  """
  return nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast,) * (num_inputs + 1),
      length=num_layers,
      unroll=unroll,
      metadata_params={nn.PARTITION_NAME: "layers"},
      # Layers broadcast nothing that could vary, and the check of that traces a layer once
      # more and, from jax 0.11 on, refuses effects in it, such as debug.print. But what
      # flax draws depends on how often a layer is traced, and a seed gives what it gave.
      check_constancy_invariants=is_random,
  )


def is_random(module: nn.Module) -> bool:
  """Whether a module was given keys to draw from."""
  return module.has_rng("params") or module.has_rng("dropout")


class Encoder(nn.Module):
  """Embedded tokens -> normed states."""

  config: ModelConfig
  partitioning: Partitioning

  @nn.compact
  def __call__(self, x: Array, mask: Array, is_training: bool = False) -> Array:
    """Encodes.

    Args:
      x: [batch, length, d_model] embedded tokens.
      mask: [batch, length] bool, which tokens count, or [batch, length, length]
        where inputs are packed: row sees column.
      is_training: whether to drop.

    Returns:
      [batch, length, d_model].
    """
    config = self.config
    position = jnp.arange(x.shape[1])[None, :]
    bias = RelativePositionBias(config, True, name="relpos_bias")(position, position)
    mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
    drop = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,), deterministic=not is_training)
    stack = stack_layers(
        EncoderLayer, config.num_encoder_layers, 2, config.scan_unroll, is_random(self)
    )
    x, _ = stack(config, self.partitioning, name="layers")(drop(x), bias, mask, is_training)
    return drop(RMSNorm(config, name="norm")(x))
