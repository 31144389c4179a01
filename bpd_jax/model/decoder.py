"""The decoder stack: teacher-forced over whole targets, or one block at a time."""


from flax import linen as nn
import jax
import jax.numpy as jnp

from bpd_jax.model.config import ModelConfig
from bpd_jax.model.encoder import is_random, stack_layers
from bpd_jax.model.layers import (
  Attention,
  FeedForward,
  mask_bias,
  RelativePositionBias,
  RMSNorm,
)
from bpd_jax.model.probes import column_mask, probe_positions, ProbeSpec
from bpd_jax.partitioning import Partitioning

Array = jax.Array
KeysValues = tuple[Array, Array]


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention and feed-forward, norm first."""

  config: ModelConfig
  partitioning: Partitioning
  is_view: bool = False

  def setup(self):
    config, place = self.config, self.partitioning
    self.pre_self_attention_layer_norm = RMSNorm(config)
    self.self_attention = Attention(config, place, is_view=self.is_view)
    self.pre_cross_attention_layer_norm = RMSNorm(config)
    self.encoder_decoder_attention = Attention(config, place, is_cross=True, is_view=self.is_view)
    self.pre_mlp_layer_norm = RMSNorm(config)
    self.mlp = FeedForward(config, place, is_view=self.is_view)
    self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))

  def cross_keys_values(self, encoded: Array) -> KeysValues:
    """[batch, length, d_model] -> keys and values; see `Attention.keys_values`."""
    return self.encoder_decoder_attention.keys_values(encoded)

  def block(
      self, x: Array, past, own_bias: Array, cross, is_training: bool = False
  ) -> tuple[Array, KeysValues]:
    """Runs the layer over new columns.

    Args:
      x: [batch, columns, d_model].
      past: segments (keys, values, bias) of committed columns, a list.
      own_bias: bias and mask among the columns.
      cross: the segment (keys, values, bias) of the encoder.
      is_training: whether to drop.

    Returns:
      x after the layer, and the columns' own keys [batch, heads, d_kv, columns]
      and values [batch, heads, columns, d_kv].
    """
    drop = lambda y: self.dropout(y, deterministic=not is_training)
    attention = self.self_attention
    normed = self.pre_self_attention_layer_norm(x)
    queries, keys, values = attention.queries_keys_values(normed)
    segments = [*past, (keys, values, own_bias)]
    x = x + drop(attention.combine(queries, segments, is_training))
    attention = self.encoder_decoder_attention
    queries = attention.queries(self.pre_cross_attention_layer_norm(x))
    x = x + drop(attention.combine(queries, [cross], is_training))
    x = x + drop(self.mlp(self.pre_mlp_layer_norm(x), is_training))
    x = self.partitioning.constrain(x, ("batch", "length", "embed"))
    return x, (keys, values)

  def __call__(
      self, x: Array, encoded: Array, own_bias: Array, visible: Array, encoder_mask: Array,
      is_training: bool,
  ) -> tuple[Array, None]:
    """The layer over a whole target; None is for the scan. Bias and masks: `EncoderLayer`."""
    none = jnp.zeros([], own_bias.dtype)
    cross = (*self.cross_keys_values(encoded), mask_bias(none, encoder_mask))
    x, _ = self.block(x, [], mask_bias(own_bias, visible), cross, is_training)
    return x, None


class Decoder(nn.Module):
  """Embedded tokens -> normed states.

  Attributes:
    config: sizes and dtypes.
    partitioning: where activations live.
    is_view: parameters are the decode-time view, one entry a layer, instead of
      the stack.
  """

  config: ModelConfig
  partitioning: Partitioning
  is_view: bool = False

  def setup(self):
    config, place = self.config, self.partitioning
    self.relpos_bias = RelativePositionBias(config, False)
    if self.is_view:
      self.layers = [
          DecoderLayer(config, place, is_view=True, name=f"layers_{i}")
          for i in range(config.num_decoder_layers)
      ]
    else:
      stack = stack_layers(
          DecoderLayer, config.num_decoder_layers, 4, config.scan_unroll, is_random(self)
      )
      self.layers = stack(config, place)
    self.norm = RMSNorm(config)
    self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))

  def __call__(
      self, x: Array, encoded: Array, encoder_mask: Array, visible: Array | None = None,
      is_training: bool = False,
  ) -> Array:
    """Teacher-forced decoding of whole targets.

    Args:
      x: [batch, length, d_model] embedded decoder inputs.
      encoded: [batch, encoder length, d_model].
      encoder_mask: [batch, encoder length] bool, or [batch, length, encoder
        length] where targets are packed.
      visible: [batch or 1, length, length] bool; causal by default.
      is_training: whether to drop.

    Returns:
      [batch, length, d_model].
    """
    position = jnp.arange(x.shape[1])[None, :]
    if visible is None:
      visible = position[:, :, None] >= position[:, None, :]
    bias = self.relpos_bias(position, position)
    if encoder_mask.ndim == 2:
      encoder_mask = encoder_mask[:, None, :]
    drop = lambda y: self.dropout(y, deterministic=not is_training)
    x, _ = self.layers(
        drop(x), encoded, bias, visible[:, None], encoder_mask[:, None], is_training
    )
    return drop(self.norm(x))

  def cross_keys_values(self, encoded: Array) -> tuple[KeysValues, ...]:
    """Keys and values of the encoder for every layer; needs the view."""
    return tuple(layer.cross_keys_values(encoded) for layer in self.layers)

  def block(
      self, x: Array, depth, visible, past: tuple[KeysValues, ...], lengths: Array,
      cross: tuple[KeysValues, ...], encoder_mask: Array, probes: ProbeSpec | None = None,
      drafted: tuple[tuple[KeysValues, ...], Array, Array] | None = None,
  ) -> tuple[Array, tuple[Array, ...], tuple[Array, ...], Array | None]:
    """One call over the nodes of a tree; needs the view. Reads the cache only.

    Args:
      x: [batch, nodes, d_model] embedded tokens.
      depth: [batch or 1, nodes] int32, positions after the committed prefix.
      visible: [batch or 1, nodes, nodes] bool, row sees column.
      past: committed keys [batch, heads, d_kv, slots] and values [batch, heads,
        slots, d_kv], a pair a layer.
      lengths: [batch] int32, committed slots.
      cross: from `cross_keys_values`.
      encoder_mask: [batch, encoder length] bool.
      probes: columns that enter below the last layer.
      drafted: nodes of earlier calls that aren't committed: their keys and values, laid
        out as `past`, their depth [batch or 1, slots], and which of them each node sees,
        [batch, nodes, slots] bool; not where there are probes.

    Returns:
      hidden [batch, nodes, d_model]; keys and values of the nodes, one array a
      layer, laid out as `past`; probe states [batch, nodes, k,
      d_model] or None.
    """
    batch, nodes, _ = x.shape
    position = lengths[:, None] + depth  # [batch, nodes]
    slot = jnp.arange(past[0][0].shape[3])[None, :]

    def biases(position, visible):
      past_bias = mask_bias(
          self.relpos_bias(position, slot), (slot < lengths[:, None])[:, None, None, :]
      )
      own_bias = mask_bias(self.relpos_bias(position, position), visible[:, None])
      return past_bias, own_bias

    past_bias, own_bias = biases(position, visible)
    drafts = [[] for _ in self.layers]
    if drafted is not None:
      pairs, slot_depth, is_seen = drafted
      bias = self.relpos_bias(position, lengths[:, None] + slot_depth)
      drafts = [[(*pair, mask_bias(bias, is_seen[:, None]))] for pair in pairs]
    cross_bias = mask_bias(jnp.zeros([], past_bias.dtype), encoder_mask[:, None, None, :])
    keys, values = [], []
    for i, layer in enumerate(self.layers):
      if probes is not None and i == probes.enter_layer:
        states = probes.make_states(x)
        x = jnp.concatenate([x, states.reshape(batch, -1, x.shape[-1])], axis=1)
        past_bias, own_bias = biases(
            probe_positions(position, probes.per_node),
            column_mask(visible, probes.per_node, probes.visibility),
        )
      segments = [(*past[i], past_bias), *drafts[i]]
      x, (key, value) = layer.block(x, segments, own_bias, (*cross[i], cross_bias))
      # Keys and values of probes are never kept.
      keys.append(key[..., :nodes])
      values.append(value[:, :, :nodes])
    hidden = self.norm(x)
    states = None
    if probes is not None:
      states = hidden[:, nodes:].reshape(batch, nodes, probes.per_node, -1)
    return hidden[:, :nodes], tuple(keys), tuple(values), states
