"""A small language model's opinion of a draft (Kim et al. 2024, Algorithm 2).

The model has its own cache of the certain tokens. Each call of the loop begins with
one block call over those that became certain since the last; what it computes of the
draft is thrown away, so nothing is ever rolled back.
"""

import dataclasses
from typing import Any, Protocol

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.cache import append_chain
from bpd_jax.decoding.types import Array, Cache, Prompt, Step


class LanguageModel(Protocol):
  """What the scorer calls; hashable, as it is fixed when a loop is compiled."""

  def start(self, params: Any, prompt: Prompt, max_length: int) -> tuple[Any, Cache, Array]:
    """What it reads of the inputs, an empty cache, and the start token [batch] int32."""

  def read(
      self, params: Any, context: Any, cache: Cache, tokens: Array, depth: Array, visible: Array
  ) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """One call over nodes: hidden [batch, nodes, d], and the nodes' keys and values."""

  def logits(self, params: Any, hidden: Array) -> Array:
    """[..., d] -> [..., vocab]."""


@struct.dataclass
class NeuralState:
  """Where the model stands.

  Attributes:
    context: what it reads of the inputs.
    cache: of the certain tokens, the root among them.
    hidden: [batch, d] after the newest of them.
  """

  context: Any
  cache: Cache
  hidden: Array


@dataclasses.dataclass(frozen=True)
class NeuralScorer:
  """Log-probabilities of a language model, over its whole vocabulary.

  Attributes:
    model: its calls.
    max_length: most tokens of an output (static).
  """

  model: LanguageModel
  max_length: int

  context = -1

  def init(self, params: Any, prompt: Prompt) -> NeuralState:
    context, cache, start = self.model.start(params, prompt, self.max_length)
    return self._advance(params, context, cache, start[:, None], jnp.ones_like(start))

  def start(self, params: Any, state: NeuralState, step: Step) -> NeuralState:
    after = self._advance(params, state.context, state.cache, step.tokens, step.num_tokens)
    is_new = (step.num_tokens > 0)[:, None]
    return after.replace(hidden=jnp.where(is_new, after.hidden, state.hidden))

  def _advance(self, params, context, cache, tokens, num_tokens) -> NeuralState:
    """Reads tokens [batch, n], of which `num_tokens` count, into the cache."""
    length = tokens.shape[1]
    hidden, keys, values = self.model.read(
        params, context, cache, tokens, np.arange(length, dtype=np.int32)[None],
        np.tri(length, dtype=bool)[None],
    )
    last = jnp.maximum(num_tokens - 1, 0)[:, None, None]
    return NeuralState(
        context=context,
        cache=append_chain(cache, keys, values, num_tokens),
        hidden=jnp.take_along_axis(hidden, last, axis=1)[:, 0],
    )

  def score(
      self, params: Any, state: NeuralState, history: Array, candidates: Array, i: int
  ) -> Array:
    batch, num_paths, n = history.shape
    hidden = state.hidden[:, None]
    if n:
      # Each path is a chain of its own: it sees the cache and itself.
      depth = np.tile(np.arange(n, dtype=np.int32), num_paths)[None]
      visible = np.kron(np.eye(num_paths, dtype=bool), np.tri(n, dtype=bool))[None]
      hidden, _, _ = self.model.read(
          params, state.context, state.cache, history.reshape(batch, -1), depth, visible
      )
      hidden = hidden.reshape(batch, num_paths, n, -1)[:, :, -1]
    logs = jax.nn.log_softmax(self.model.logits(params, hidden), axis=-1)
    return jnp.take_along_axis(logs, candidates[:, None], axis=-1)

  def bound(self, params, state, history: Array, candidates: Array, i: int) -> Array:
    return jnp.zeros([1, 1, 1])
