"""Back-off n-grams counted on the device in the row's own input and output so far.

What a row says again it says in the same words: names, signatures, quotations. The
model is P_n(w | c) = (count(c w) + s P_{n-1}(w | c')) / (count(c) + s), down to the
uniform distribution, over the row's input followed by its certain tokens. There is no
table: a count is a comparison with every position of the buffer, [positions × n] a
history, which a vector unit does faster than it could follow a hash.
"""

import dataclasses

from flax import struct
import jax.numpy as jnp

from bpd_jax.decoding.cache import write_rows
from bpd_jax.decoding.scorers.window import begin_windows, extend_windows
from bpd_jax.decoding.types import Array, Prompt, Scorer, Step
from bpd_jax.errors import InputError


@struct.dataclass
class CacheState:
  """The text that is counted.

  Attributes:
    tokens: [batch, input length + max_length + slack] int32, the input padded to
      the right with -1, then the certain tokens; -1 where nothing is yet.
    num_tokens: [batch] int32, certain tokens.
    begin: where they begin in `tokens` (static).
  """

  tokens: Array
  num_tokens: Array
  begin: int = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class CacheNgramScorer(Scorer):
  """Log-probabilities of n-grams of the input and the prefix.

  Attributes:
    order: n, tokens of the longest n-gram.
    smoothing: s, how many counts the shorter context's opinion is worth.
    vocab_size: of the uniform distribution.
    sees_input: whether the input is counted, besides the output.
  """

  vocab_size: int
  order: int = 3
  smoothing: float = 0.5
  sees_input: bool = True

  def __post_init__(self):
    if self.order < 1:
      raise InputError("CacheNgramScorer.order", self.order, "a positive integer")
    if not self.smoothing > 0:
      raise InputError("CacheNgramScorer.smoothing", self.smoothing, "above 0")

  @property
  def context(self) -> int:
    return self.order - 1

  def init(self, params, prompt: Prompt, context) -> CacheState:
    batch, length = prompt.tokens.shape
    slot = jnp.arange(length)
    known = (slot < prompt.lengths[:, None]) & self.sees_input
    # A block is written whole, at a row's end too.
    room = jnp.full([batch, 2 * prompt.max_length + 2], -1, jnp.int32)
    return CacheState(
        tokens=jnp.concatenate([jnp.where(known, prompt.tokens, -1), room], axis=1),
        num_tokens=jnp.zeros([batch], jnp.int32),
        begin=length,
    )

  def start(self, params, state: CacheState, step: Step, lattice) -> CacheState:
    slot = jnp.arange(step.tokens.shape[1])
    block = jnp.where(slot < step.num_tokens[:, None], step.tokens, -1)
    tokens = write_rows(state.tokens, block, state.begin + state.num_tokens, axis=1)
    return state.replace(tokens=tokens, num_tokens=state.num_tokens + step.num_tokens)

  def begin(self, params, state: CacheState, num_paths: int, depth: int) -> Array:
    text, begin = state.tokens, state.begin
    at = begin + state.num_tokens[:, None] + jnp.arange(-self.context, 0)
    certain = jnp.take_along_axis(text, jnp.maximum(at, 0), axis=1)
    # -2 where no output is that long yet.
    return begin_windows(jnp.where(at >= begin, certain, -2), num_paths)

  def extend(
      self, params, state: CacheState, trails: Array, parents: Array, tokens: Array, i
  ) -> Array:
    return extend_windows(trails, parents, tokens)

  def score(self, params, state: CacheState, trails: Array, candidates: Array, i) -> Array:
    batch, num_paths, _ = trails.shape
    text = state.tokens
    is_token = (text >= 0).astype(jnp.float32)
    is_candidate = (candidates[:, :, None] == text[:, None]).astype(jnp.float32)
    matches = jnp.broadcast_to(is_token[:, None], (batch, num_paths, text.shape[1]))
    probs = jnp.full([batch, num_paths, candidates.shape[1]], 1 / self.vocab_size)
    for order in range(1, self.order + 1):
      if order > 1:
        # Positions whose token `order - 1` before is that of the history.
        shifted = jnp.pad(text, ((0, 0), (order - 1, 0)), constant_values=-1)
        same = shifted[:, None, : text.shape[1]] == trails[..., 1 - order, None]
        matches = matches * same
      total = matches.sum(-1)[..., None]
      counts = jnp.einsum("bwl,bkl->bwk", matches, is_candidate)
      probs = (counts + self.smoothing * probs) / (total + self.smoothing)
    return jnp.log(probs)

  def bound(self, params, state: CacheState, before: Array, candidates: Array, i) -> Array:
    if self.context > 1:
      return jnp.zeros([1, 1, 1])
    return self.score(params, state, before[..., None][..., : self.context], candidates, i)
