"""A model as drafters and scorers of `decoding/` call it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bpd_jax.decoding.cache import cache_length, empty_cache
from bpd_jax.decoding.types import Cache, Context, Drafted, Prompt
from bpd_jax.model.model import EncoderDecoder


@dataclasses.dataclass(frozen=True)
class ModelReader:
  """A model's calls; what it reads is a decode view.

  Attributes:
    model: with `is_view`.
    sees_input: whether its encoder reads the row's input; else it reads an EOS alone.
  """

  model: EncoderDecoder
  sees_input: bool = True

  def start(self, view: Any, prompt: Prompt) -> tuple[Context, Cache, jax.Array]:
    """What it reads of the inputs, an empty cache, and the start token [batch] int32."""
    batch = prompt.tokens.shape[0]
    tokens, lengths = prompt.tokens, prompt.lengths
    if not self.sees_input:
      tokens = jnp.full([batch, 1], self.model.config.eos_id, jnp.int32)
      lengths = jnp.ones([batch], jnp.int32)
    # The start token takes a slot, and a block is written whole.
    cache = make_cache(self.model, batch, cache_length(prompt.max_length, prompt.max_length))
    start = jnp.full([batch], self.model.config.start_id, jnp.int32)
    return prefill(self.model, view, tokens, lengths), cache, start

  def read(
      self, view: Any, context: Context, cache: Cache, tokens, depth, visible,
      drafted: Drafted | None = None,
  ):
    """One call over nodes; see `bpd_jax.decoding.scorers.neural.LanguageModel`."""
    if drafted is not None:
      pairs = tuple(zip(drafted.keys, drafted.values))
      drafted = (pairs, drafted.depth, drafted.visible)
    hidden, keys, values, _ = self.model.apply(
        {"params": view}, tokens, depth, visible, tuple(zip(cache.keys, cache.values)),
        cache.lengths, context.cross, context.mask, drafted=drafted, method="decode_block",
    )
    return hidden, keys, values

  def logits(self, view: Any, hidden: jax.Array) -> jax.Array:
    """Output projection, [..., d] -> [..., vocab]."""
    return self.model.apply({"params": view}, hidden, method="logits")

  def empty_hidden(self, batch: int) -> jax.Array:
    """[batch, d] zeros, as the decoder's states are."""
    return jnp.zeros([batch, self.model.config.d_model], self.model.config.dtype)


def prefill(model: EncoderDecoder, view: Any, tokens: jax.Array, lengths: jax.Array) -> Context:
  """Runs the encoder.

  Args:
    model: with `is_view`.
    view: its parameters.
    tokens: [batch, input length] int32.
    lengths: [batch] int32.
  """
  mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
  encoded = model.apply({"params": view}, tokens, mask, method="encode")
  cross = model.apply({"params": view}, encoded, method="cross_keys_values")
  return Context(encoded, mask, cross)


def make_cache(model: EncoderDecoder, batch: int, length: int) -> Cache:
  """An empty cache for a model, where its mesh wants it."""
  config = model.config
  cache = empty_cache(
      config.num_decoder_layers, batch, config.num_heads, length, config.d_kv, config.dtype
  )
  place = lambda leaves, *names: tuple(
      model.partitioning.constrain(leaf, ("batch", "heads", *names)) for leaf in leaves
  )
  return cache.replace(
      keys=place(cache.keys, "kv", "length"), values=place(cache.values, "length", "kv")
  )
