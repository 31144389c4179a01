"""The T5-style encoder-decoder, for training and decoding.

`EncoderDecoder` with stacked parameters is what trains and is stored.
`decode_view` turns those parameters into the ones that decoding reads, for the
same module with `is_view=True`.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from bpd_jax.model.config import ModelConfig
from bpd_jax.model.decoder import Decoder, KeysValues
from bpd_jax.model.encoder import Encoder
from bpd_jax.model.layers import variance_init
from bpd_jax.model.probes import ProbeSpec
from bpd_jax.partitioning import Partitioning

Array = jax.Array


class EncoderDecoder(nn.Module):
  """T5 1.0 or 1.1.

  Attributes:
    config: sizes and dtypes.
    partitioning: where activations live.
    is_view: parameters are those of `decode_view`.
  """

  config: ModelConfig
  partitioning: Partitioning
  is_view: bool = False

  def setup(self):
    config, place = self.config, self.partitioning
    self.embedding = self.param(
        "embedding",
        nn.with_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
        (config.vocab_size, config.d_model),
        config.param_dtype,
    )
    self.encoder = Encoder(config, place)
    self.decoder = Decoder(config, place, self.is_view)
    if not config.is_tied:
      shape, names = (config.d_model, config.vocab_size), ("embed", "vocab")
      if self.is_view:
        shape, names = shape[::-1], names[::-1]
      self.logits_kernel = self.param(
          "logits_kernel", nn.with_partitioning(variance_init(config.d_model), names),
          shape, config.param_dtype,
      )

  def embed(self, tokens: Array) -> Array:
    """[batch, length] int32 -> [batch, length, d_model]."""
    # Each device looks up its own rows whole: a look-up of parts of the features would be
    # sent around, rows by rows, to the devices that have the rows.
    table = self.partitioning.constrain(self.embedding, ("vocab", None))
    tokens = self.partitioning.constrain(tokens, ("batch", "length"))
    x = jnp.take(table, tokens, axis=0, mode="clip").astype(self.config.dtype)
    return self.partitioning.constrain(x, ("batch", "length", "embed"))

  def encode(self, tokens: Array, mask: Array, is_training: bool = False) -> Array:
    """[batch, length] tokens and mask -> [batch, length, d_model]."""
    return self.encoder(self.embed(tokens), mask, is_training)

  def decode(
      self, encoded: Array, encoder_mask: Array, decoder_input_tokens: Array,
      visible: Array | None = None, is_training: bool = False,
  ) -> Array:
    """Normed last states, [batch, length, d_model], of whole targets."""
    x = self.embed(decoder_input_tokens)
    return self.decoder(x, encoded, encoder_mask, visible, is_training)

  def logits(self, hidden: Array) -> Array:
    """Output projection: [..., d_model] -> [..., vocab] of `accum_dtype`."""
    kernel = self.embedding if self.config.is_tied else self.logits_kernel
    return project_logits(self.config, kernel, hidden, self.is_view)

  def __call__(
      self, encoder_input_tokens: Array, encoder_mask: Array, decoder_input_tokens: Array,
      is_training: bool = False,
  ) -> Array:
    """Logits of the base model, [batch, length, vocab], teacher-forced."""
    encoded = self.encode(encoder_input_tokens, encoder_mask, is_training)
    hidden = self.decode(
        encoded, encoder_mask, decoder_input_tokens, is_training=is_training
    )
    return self.logits(hidden)

  def cross_keys_values(self, encoded: Array) -> tuple[KeysValues, ...]:
    """What decoding reads of the encoder, one pair a layer; needs the view."""
    return self.decoder.cross_keys_values(encoded)

  def decode_block(
      self, tokens: Array, depth, visible, past: tuple[KeysValues, ...], lengths: Array,
      cross: tuple[KeysValues, ...], encoder_mask: Array, probes: ProbeSpec | None = None,
      drafted: tuple[tuple[KeysValues, ...], Array, Array] | None = None,
  ):
    """One call over the nodes of a tree; see `Decoder.block`. Needs the view."""
    if probes is not None:
      probes.check(self.config.num_decoder_layers)
    return self.decoder.block(
        self.embed(tokens), depth, visible, past, lengths, cross, encoder_mask, probes, drafted
    )


def project_logits(config: ModelConfig, kernel: Array, hidden: Array, is_view: bool) -> Array:
  """Logits of states.

  Args:
    config: of the model.
    kernel: the embedding table [vocab, d_model] where tied, else the output
      projection [d_model, vocab], turned in the view.
    hidden: [..., d_model].
    is_view: whether the kernel is the view's.

  Returns:
    [..., vocab] of `accum_dtype`.
  """
  form = "...d,vd->...v" if config.is_tied or is_view else "...d,dv->...v"
  if config.is_tied:
    hidden = hidden * jnp.asarray(config.d_model**-0.5, hidden.dtype)
  return jnp.einsum(
      form, hidden, kernel.astype(config.dtype),
      preferred_element_type=jnp.dtype(config.accum_dtype),
  )


def init_boxed(config: ModelConfig, partitioning: Partitioning, key: Array) -> Any:
  """Random parameters as `nn.Partitioned` leaves that carry their logical axes."""
  tokens = jnp.zeros([partitioning.mesh.size, 1], jnp.int32)
  model = EncoderDecoder(config, partitioning)
  return model.init(key, tokens, tokens == 0, tokens)["params"]


def abstract_params(config: ModelConfig, partitioning: Partitioning) -> Any:
  """Shapes and dtypes with shardings, a tree of `jax.ShapeDtypeStruct`."""
  shapes = _abstract_params(config, partitioning, jax.config.jax_enable_x64)
  # Dicts of the caller's own.
  return jax.tree.map(lambda leaf: leaf, shapes)


@functools.lru_cache
def _abstract_params(config: ModelConfig, partitioning: Partitioning, has_x64: bool) -> Any:
  """Traced once for all who ask; without `has_x64` 64 bits become 32."""
  boxed = jax.eval_shape(lambda: init_boxed(config, partitioning, jax.random.key(0)))
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
          leaf.value.shape, leaf.value.dtype, sharding=partitioning.sharding(leaf.names)
      ),
      boxed,
      is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
  )


def init_params(config: ModelConfig, partitioning: Partitioning, key: Array) -> Any:
  """Random parameters, placed by the partitioning; plain dicts."""
  return _init_program(config, partitioning)(key)


@functools.lru_cache
def _init_program(config: ModelConfig, partitioning: Partitioning) -> Callable[[Array], Any]:
  """Compiled once for all parameters of a config on a mesh."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, partitioning))
  init = lambda key: nn.unbox(init_boxed(config, partitioning, key))
  return jax.jit(init, out_shardings=shardings)


def decode_view(config: ModelConfig, params: Any) -> Any:
  """Parameters as decoding reads them.

  The decoder's layers are unstacked, so that a call reads each weight where it
  lies instead of slicing it out of the stack. What every call reads lies [out, in],
  and kernels of the same input are one: queries, keys and values of
  self-attention, and the two inputs of a gated feed-forward layer. The encoder
  and cross-attention's keys and values run once a prompt and stay as they are.

  Args:
    config: of the model.
    params: from `init_params` or a checkpoint.

  Returns:
    Parameters for `EncoderDecoder(config, partitioning, is_view=True)`.
  """
  turn = lambda kernel: jnp.swapaxes(kernel, -1, -2)
  decoder = dict(params["decoder"])
  stacked = decoder.pop("layers")
  for i in range(config.num_decoder_layers):
    layer = jax.tree.map(lambda leaf: leaf[i], stacked)
    own, cross, mlp = (
        layer[name] for name in ("self_attention", "encoder_decoder_attention", "mlp")
    )
    by_head = (config.num_heads, config.d_kv, config.d_model)
    fused = [turn(own[name]).reshape(by_head) for name in ("query", "key", "value")]
    fused = jnp.stack(fused, axis=1).reshape(-1, config.d_model)
    own = {"query_key_value": fused, "out": turn(own["out"])}
    cross = {**cross, "query": turn(cross["query"]), "out": turn(cross["out"])}
    if config.is_gated:
      fused = jnp.stack([turn(mlp["wi_0"]), turn(mlp["wi_1"])], axis=1)
      mlp = {"wi": fused.reshape(-1, config.d_model), "wo": turn(mlp["wo"])}
    else:
      mlp = jax.tree.map(turn, mlp)
    decoder[f"layers_{i}"] = {
        **layer, "self_attention": own, "encoder_decoder_attention": cross, "mlp": mlp
    }
  view = {**params, "decoder": decoder}
  if not config.is_tied:
    view["logits_kernel"] = turn(view["logits_kernel"])
  return view
