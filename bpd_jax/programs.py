"""What is compiled to decode a batch: the encoder, the loop's start, and the loop.

Here the model meets `decoding/`, which neither imports the other's parts.
"""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from bpd_jax.decoding import accept, loop
from bpd_jax.decoding.cache import cache_length, empty_cache
from bpd_jax.decoding.drafters.empty import EmptyDrafter
from bpd_jax.decoding.drafters.heads import HeadsDrafter
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.decoding.rescoring import Rescorer, RescorerParams
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import AcceptanceRule, Cache, Drafter, Prompt
from bpd_jax.decoding.verify import model_verify
from bpd_jax.errors import InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import decode_view, EncoderDecoder

METHODS = ("greedy", "blockwise", "reference")


@struct.dataclass
class Context:
  """What every decoder call reads of the prompts.

  Attributes:
    cross: a pair a decoder layer, keys [batch, heads, d_kv, input length] and
      values [batch, heads, input length, d_kv].
    mask: [batch, input length] bool, which input tokens count.
  """

  cross: tuple[tuple[jax.Array, jax.Array], ...]
  mask: jax.Array


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
  """What is fixed when a decode loop is compiled.

  Attributes:
    method: one of `METHODS`, or a drafter, which is hashable.
    block_size: h, tokens a call can emit at most.
    verify_width: tokens a call verifies along a path, root included, at most h.
    max_length: tokens the output buffers hold.
    rule: which drafted tokens pass.
    top_k: candidates that each head offers.
    search: which paths through them are verified.
    rescorer: what else than the heads' scores a path is worth.
  """

  method: str | Drafter
  block_size: int
  verify_width: int
  max_length: int
  rule: AcceptanceRule = accept.ExactMatch()
  top_k: int = 1
  search: SearchSettings = SearchSettings()
  rescorer: Rescorer = Rescorer()

  @property
  def own_drafter(self) -> Drafter | None:
    """The method, where it isn't a name."""
    return None if isinstance(self.method, str) else self.method

  @property
  def depth(self) -> int:
    """Steps of the lattice."""
    return self.verify_width - 1

  @property
  def num_nodes(self) -> int:
    """Nodes a call verifies."""
    return self.search.nodes(self.depth)

  def __post_init__(self):
    own = self.own_drafter
    if self.method not in METHODS if own is None else not hasattr(own, "propose"):
      raise InputError("method", self.method, f"one of {METHODS}, or a drafter")
    if self.block_size < 1:
      raise InputError("block_size", self.block_size, "a positive integer")
    if self.method == "greedy" and self.block_size > 1:
      raise InputError("block_size", self.block_size, "1 for method 'greedy', which drafts nothing")
    if not 1 <= self.verify_width <= self.block_size:
      raise InputError(
          "verify_width", self.verify_width, f"1 … {self.block_size}, the block size"
      )
    if self.max_length < 1:
      raise InputError("max_length", self.max_length, "a positive integer")
    if self.top_k < 1:
      raise InputError("top_k", self.top_k, "a positive integer")
    if self.method in METHODS and self.method != "blockwise" and self.top_k > 1:
      raise InputError("top_k", self.top_k, f"1 for method {self.method!r}, which has one draft")
    if own is not None and self.verify_width != own.depth + 1:
      raise InputError(
          "verify_width", self.verify_width,
          f"{own.depth + 1}, one more than the drafter's depth",
      )
    self.search.check(self.depth, self.top_k)


def check_settings(config: ModelConfig, settings: DecodeSettings) -> None:
  """Raises InputError where a model can't decode with these settings."""
  if settings.method == "blockwise" and settings.block_size > config.block_size:
    raise InputError(
        "block_size", settings.block_size, f"1 … {config.block_size}, the model's heads"
    )
  if settings.top_k > config.vocab_size:
    raise InputError("top_k", settings.top_k, f"at most {config.vocab_size}, the vocabulary")


def make_drafter(model: EncoderDecoder, settings: DecodeSettings) -> Drafter:
  """The drafter of a method; its parameters are the model's decode view."""
  depth = settings.depth
  if settings.own_drafter is not None:
    return settings.own_drafter
  if settings.method == "greedy" or depth == 0:
    return EmptyDrafter()
  if settings.method == "reference":
    return ReferenceDrafter(depth)

  def read_logits(view, step, depth):
    return model.apply({"params": view}, step.hidden, depth, method="head_logits")

  return HeadsDrafter(depth, read_logits, settings.top_k)


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
  return Context(cross=cross, mask=mask)


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


def start_state(
    model: EncoderDecoder,
    settings: DecodeSettings,
    limits: jax.Array,
    prompt: Prompt | None,
    key: jax.Array,
    params: RescorerParams = RescorerParams(),
) -> loop.DecodeState:
  """The loop's state before the first call; [batch] limits, 0 for dead rows.

  `prompt` may be None where neither drafter nor scorers read it.
  """
  config, depth = model.config, settings.depth
  drafter = make_drafter(model, settings)
  cache = make_cache(model, limits.shape[0], cache_length(settings.max_length, depth))
  hidden = jnp.zeros([limits.shape[0], config.d_model], config.dtype)
  return loop.initial_state(
      cache,
      loop.empty_step(hidden, depth),
      drafter.init(None, prompt),
      settings.rescorer.init(params, prompt),
      limits=limits,
      start_id=config.start_id,
      max_length=settings.max_length,
      num_nodes=settings.num_nodes,
      key=key,
  )


def decode_batch(
    model: EncoderDecoder,
    settings: DecodeSettings,
    view: Any,
    context: Context,
    state: loop.DecodeState,
    params: RescorerParams = RescorerParams(),
) -> loop.DecodeState:
  """Decodes a batch to its end; jit it with `state` donated."""

  def block_call(tokens, depth, visible, past, lengths):
    return model.apply(
        {"params": view}, tokens, depth, visible, past, lengths, context.cross, context.mask,
        method="decode_block",
    )

  verify = model_verify(
      block_call,
      lambda hidden: model.apply({"params": view}, hidden, method="logits"),
      keeps_logits=settings.rule.reads_logits,
  )
  return loop.decode(
      verify,
      make_drafter(model, settings),
      view,
      state,
      search=settings.search.make(settings.depth),
      rescorer=settings.rescorer,
      rescorer_params=params,
      rule=settings.rule,
      eos_id=model.config.eos_id,
  )


# One cache of compiled programs for all models of the process: models of one
# config and mesh share them.
VIEW = jax.jit(decode_view, static_argnums=0)
PREFILL = jax.jit(prefill, static_argnums=0)
START = jax.jit(start_state, static_argnums=(0, 1))
DECODE = jax.jit(decode_batch, static_argnums=(0, 1), donate_argnums=4)


def num_compilations() -> int:
  """Programs compiled for decoding by this process: encoders, starts and loops."""
  return sum(program._cache_size() for program in (PREFILL, START, DECODE))
