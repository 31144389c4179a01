"""A small language model's opinion of a draft (Kim et al. 2024, Algorithm 2).

The model has its own cache of the certain tokens. Each call of the loop begins with
one block call over those that became certain since the last. Each step of a search reads
the newest token of every path; what that computes is kept beside the cache until the
search is over and then thrown away, so nothing is ever rolled back.
"""

import dataclasses
from typing import Any, Protocol

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.cache import append_chain
from bpd_jax.decoding.types import Array, Cache, Drafted, Prompt, Scorer, Step


class LanguageModel(Protocol):
  """What the scorer calls; hashable, as it is fixed when a loop is compiled."""

  def start(self, params: Any, prompt: Prompt) -> tuple[Any, Cache, Array]:
    """What it reads of the inputs, an empty cache, and the start token [batch] int32."""

  def read(
      self, params: Any, context: Any, cache: Cache, tokens: Array, depth: Array, visible: Array,
      drafted: Drafted | None = None,
  ) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """One call over nodes that see the cache, each other where `visible`, and `drafted`.

    Returns:
      hidden [batch, nodes, d], and the nodes' keys and values.
    """

  def logits(self, params: Any, hidden: Array) -> Array:
    """[..., d] -> [..., vocab]."""


@struct.dataclass
class NeuralTrails:
  """What was read of the paths.

  Attributes:
    hidden: [batch, paths, d] after the newest token of each.
    keys: one array a layer, [batch, heads, head_dim, slots], slots = paths × (depth - 1):
      each step's tokens beside each other.
    values: likewise, [batch, heads, slots, head_dim].
    is_own: [batch, paths, slots] bool, which of them are of the path.
  """

  hidden: Array
  keys: tuple[Array, ...]
  values: tuple[Array, ...]
  is_own: Array


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
class NeuralScorer(Scorer):
  """Log-probabilities of a language model, over its whole vocabulary.

  Attributes:
    model: its calls.
  """

  model: LanguageModel

  context = -1

  def init(self, params: Any, prompt: Prompt, context) -> NeuralState:
    own, cache, start = self.model.start(params, prompt)
    return self._advance(params, own, cache, start[:, None], jnp.ones_like(start))

  def start(self, params: Any, state: NeuralState, step: Step, lattice) -> NeuralState:
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

  def begin(self, params: Any, state: NeuralState, num_paths: int, depth: int) -> NeuralTrails:
    batch, dim = state.hidden.shape
    slots = num_paths * (depth - 1)  # the last step's tokens are never read
    empty = lambda buffers, axis: tuple(
        jnp.zeros(x.shape[:axis] + (slots,) + x.shape[axis + 1 :], x.dtype) for x in buffers
    )
    return NeuralTrails(
        hidden=jnp.broadcast_to(state.hidden[:, None], (batch, num_paths, dim)),
        keys=empty(state.cache.keys, 3),
        values=empty(state.cache.values, 2),
        is_own=jnp.zeros([batch, num_paths, slots], bool),
    )

  def extend(
      self, params: Any, state: NeuralState, trails: NeuralTrails, parents: Array,
      tokens: Array, i,
  ) -> NeuralTrails:
    num_paths, slots = trails.is_own.shape[1:]
    step, path = np.divmod(np.arange(slots), num_paths)
    is_own = jnp.take_along_axis(trails.is_own, parents[..., None], axis=1)
    drafted = Drafted(trails.keys, trails.values, step[None].astype(np.int32), is_own)
    hidden, keys, values = self.model.read(
        params, state.context, state.cache, tokens, jnp.full([1, num_paths], i, jnp.int32),
        np.eye(num_paths, dtype=bool)[None], drafted,
    )
    write = lambda buffer, new, axis: jax.lax.dynamic_update_slice_in_dim(
        buffer, new.astype(buffer.dtype), i * num_paths, axis
    )
    return NeuralTrails(
        hidden=hidden,
        keys=tuple(write(*pair, 3) for pair in zip(trails.keys, keys)),
        values=tuple(write(*pair, 2) for pair in zip(trails.values, values)),
        is_own=is_own | ((step == i) & (path == np.arange(num_paths)[:, None])),
    )

  def score(
      self, params: Any, state: NeuralState, trails: NeuralTrails, candidates: Array, i
  ) -> Array:
    logs = jax.nn.log_softmax(self.model.logits(params, trails.hidden), axis=-1)
    return jnp.take_along_axis(logs, candidates[:, None], axis=-1)

  def bound(self, params, state, before: Array, candidates: Array, i) -> Array:
    return jnp.zeros([1, 1, 1])
