"""Back-off n-grams from a corpus (Kim et al. 2024, §5.2)."""

import dataclasses

from flax import struct
import jax.numpy as jnp

from bpd_jax.decoding.scorers.window import begin_windows, extend_windows
from bpd_jax.decoding.types import Array, Prompt, Scorer, Step
from bpd_jax.errors import InputError
from bpd_jax.ngram_lm.arrays import device_arrays, log_probs, NgramArrays
from bpd_jax.ngram_lm.backoff import BackOff
from bpd_jax.ngram_lm.bounds import bound_model


@struct.dataclass
class NgramParams:
  """What an `NgramScorer` reads.

  Attributes:
    arrays: the model.
    bounds: of order 2, see `bpd_jax.ngram_lm.bounds`.
  """

  arrays: NgramArrays
  bounds: NgramArrays


def ngram_params(model: BackOff) -> NgramParams:
  """The parameters of an `NgramScorer` from a model."""
  arrays = device_arrays(model)
  bounds = arrays if model.order <= 2 else device_arrays(bound_model(model))
  return NgramParams(arrays, bounds)


@dataclasses.dataclass(frozen=True)
class NgramScorer(Scorer):
  """Log-probabilities of a model of `bpd_jax.ngram_lm`.

  Attributes:
    order: n, at most that of the arrays.
    start_id: what stands before the first token, as in the text that was counted.
  """

  order: int
  start_id: int = 0

  def __post_init__(self):
    if self.order < 1:
      raise InputError("NgramScorer.order", self.order, "a positive integer")

  @property
  def context(self) -> int:
    return self.order - 1

  def init(self, params: NgramParams, prompt: Prompt, context) -> Array:
    """The newest certain tokens, [batch, order - 1] int32, -1 where there is none."""
    batch = prompt.tokens.shape[0]
    none = jnp.full([batch, max(self.context - 1, 0)], -1, jnp.int32)
    start = jnp.full([batch, min(self.context, 1)], self.start_id, jnp.int32)
    return jnp.concatenate([none, start], axis=1)

  def start(self, params: NgramParams, state: Array, step: Step, lattice) -> Array:
    both = jnp.concatenate([state, step.tokens], axis=1)
    # What counts of `both` ends where the certain tokens do.
    at = step.num_tokens[:, None] + jnp.arange(self.context)
    return jnp.take_along_axis(both, at, axis=1)

  def begin(self, params: NgramParams, state: Array, num_paths: int, depth: int) -> Array:
    return begin_windows(state, num_paths)

  def extend(
      self, params: NgramParams, state: Array, trails: Array, parents: Array, tokens: Array, i
  ) -> Array:
    return extend_windows(trails, parents, tokens)

  def score(
      self, params: NgramParams, state: Array, trails: Array, candidates: Array, i
  ) -> Array:
    return log_probs(params.arrays, trails, candidates)

  def bound(
      self, params: NgramParams, state: Array, before: Array, candidates: Array, i
  ) -> Array:
    # Its own scores, where those read no more than a token: the model may have more orders.
    arrays = params.arrays if self.context <= 1 else params.bounds
    return log_probs(arrays, before[..., None][..., : self.context], candidates)
