"""A small encoder-decoder as the language model that judges drafts (Kim et al. 2024, §5.1)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bpd_jax.decoding.cache import cache_length
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.scorers.neural import NeuralScorer
from bpd_jax.decoding.types import Cache, Drafted, Prompt
from bpd_jax.generation import Generator
from bpd_jax.model.model import EncoderDecoder
from bpd_jax.programs import Context, make_cache, prefill


@dataclasses.dataclass(frozen=True)
class ModelReader:
  """A model as the language model of a `NeuralScorer`; its parameters are a decode view.

  Attributes:
    model: with `is_view`.
    sees_input: whether its encoder reads the row's input; else it reads an EOS alone.
  """

  model: EncoderDecoder
  sees_input: bool = True

  def start(
      self, view: Any, prompt: Prompt, max_length: int
  ) -> tuple[Context, Cache, jax.Array]:
    batch = prompt.tokens.shape[0]
    tokens, lengths = prompt.tokens, prompt.lengths
    if not self.sees_input:
      tokens = jnp.full([batch, 1], self.model.config.eos_id, jnp.int32)
      lengths = jnp.ones([batch], jnp.int32)
    # The start token takes a slot, and a block is written whole.
    cache = make_cache(self.model, batch, cache_length(max_length, max_length))
    start = jnp.full([batch], self.model.config.start_id, jnp.int32)
    return prefill(self.model, view, tokens, lengths), cache, start

  def read(
      self, view: Any, context: Context, cache: Cache, tokens, depth, visible,
      drafted: Drafted | None = None,
  ):
    if drafted is not None:
      pairs = tuple(zip(drafted.keys, drafted.values))
      drafted = (pairs, drafted.depth, drafted.visible)
    hidden, keys, values, _ = self.model.apply(
        {"params": view}, tokens, depth, visible, tuple(zip(cache.keys, cache.values)),
        cache.lengths, context.cross, context.mask, drafted=drafted, method="decode_block",
    )
    return hidden, keys, values

  def logits(self, view: Any, hidden: jax.Array) -> jax.Array:
    return self.model.apply({"params": view}, hidden, method="logits")


def neural_scoring(
    generator: Generator, weight: float | tuple[float, ...] = 1.0, *,
    max_length: int = 128, sees_input: bool = True, entropy_power: float = 0.0,
) -> Scoring:
  """A small model of the same vocabulary as a scorer.

  Args:
    generator: the small model.
    weight: see `Scoring`.
    max_length: most tokens of an output, at least that of the decoding it is for.
    sees_input: whether its encoder reads the inputs.
    entropy_power: see `Scoring`.
  """
  scorer = NeuralScorer(ModelReader(generator.model, sees_input), max_length)
  return Scoring(scorer, generator.view, weight, entropy_power)
