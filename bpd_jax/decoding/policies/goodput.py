"""The block size that promises most tokens a second, by recent acceptance and measured cost.

A call of block size w costs c(w) seconds, whatever comes of it, and makes 1 + Σ_{i < w} S_i
tokens of each row certain, S_i being the probability that its first i drafted tokens are all
accepted. c is measured beforehand; S is learned while decoding. Where even the best width is
slower than a call over the root alone, nothing is drafted, and a draft is tried again after a
pause that doubles each time that it didn't pay.
"""

import dataclasses

from flax import struct
import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.types import Array, Context, Policy, Prompt, Step
from bpd_jax.errors import InputError

# What is believed before anything was seen: that so large a part of drafted tokens passes,
# as if it had been so for so many.
FIRST_RATE, FIRST_WEIGHT = 0.8, 2.0
# How much of what was seen still counts a draft later: of all rows, of all where a pause lies
# between, and of a row by itself, whose own acceptance is weighed against all rows' as if that
# were so many tokens of it.
FORGET, FORGET_PAUSED, FORGET_ROW, ROW_WEIGHT = 0.99, 0.5, 0.8, 4.0
# Calls of the first pause, and the part of the time that trying again may cost.
FIRST_PAUSE, TRYING = 4.0, 0.01


@struct.dataclass
class GoodputParams:
  """What the policy reads.

  Attributes:
    seconds: [widths] float32, of a call of each block size, the first being 1; infinite for
      one that is never to be taken.
    tried: [depth] float32, drafted tokens at each place after the root that were reached in
      earlier batches, those long ago counting less.
    passed: [depth] float32, how many of those were accepted.
    pauses: [] float32, drafts in a row that didn't pay.
    rest: [] int32, calls left of a pause.
    depth: [] int32, how many tokens rows draft after it.
  """

  seconds: Array
  tried: Array
  passed: Array
  pauses: Array
  rest: Array
  depth: Array


@struct.dataclass
class GoodputState:
  """What the policy has seen of a batch, and what it decided.

  Attributes:
    tried: [depth] as in the parameters, this batch's among them.
    passed: [depth].
    row_tried: [batch, depth], of each row lately.
    row_passed: [batch, depth].
    pauses: [] float32, as in the parameters.
    rest: [] int32, likewise.
    depth: [] int32, likewise.
  """

  tried: Array
  passed: Array
  row_tried: Array
  row_passed: Array
  pauses: Array
  rest: Array
  depth: Array


@dataclasses.dataclass(frozen=True)
class Goodput(Policy):
  """All rows of a batch draft alike: a call costs what its widest row costs.

  Attributes:
    widths: block sizes to choose from, rising from 1 to the drafter's.
  """

  widths: tuple[int, ...]

  def __post_init__(self):
    if not self.widths or self.widths[0] != 1 or list(self.widths) != sorted(set(self.widths)):
      raise InputError("Goodput.widths", self.widths, "rising from 1")

  @property
  def max_depth(self) -> int:
    """Most tokens that a row drafts."""
    return self.widths[-1] - 1

  def params(self, seconds: tuple[float, ...] | np.ndarray) -> GoodputParams:
    """Parameters with nothing seen yet.

    Args:
      seconds: of a call of each of `widths`.
    """
    none, nought = np.zeros([self.max_depth], np.float32), np.zeros([], np.int32)
    seconds = np.asarray(seconds, np.float32)
    if seconds.shape != (len(self.widths),) or not (seconds > 0).all() or np.isinf(seconds).all():
      raise InputError("seconds", seconds.tolist(), f"{len(self.widths)} positive, one finite")
    # The first draft is of the widest calls that may be.
    depth = np.array(self.widths, np.int32)[np.isfinite(seconds)][-1] - 1
    rest = nought if depth else np.full([], np.iinfo(np.int32).max, np.int32)
    return GoodputParams(seconds, none, none, nought.astype(np.float32), rest, depth)

  def init(
      self, params: GoodputParams, prompt: Prompt, context: Context | None
  ) -> GoodputState:
    none = jnp.zeros([prompt.lengths.shape[0], self.max_depth], jnp.float32)
    # Nothing is certain at first that a draft could follow.
    return GoodputState(
        params.tried, params.passed, none, none, params.pauses, jnp.maximum(params.rest, 1),
        params.depth,
    )

  def start(
      self, params: GoodputParams, state: GoodputState, step: Step, is_live: Array
  ) -> GoodputState:
    place = 1 + jnp.arange(self.max_depth)
    num_passed = (step.num_tokens - 1)[:, None]
    # What a row's end cut off says nothing about the draft.
    is_tried = is_live[:, None] & (place <= jnp.minimum(num_passed + 1, step.num_verified[:, None]))
    is_passed = is_tried & (place <= num_passed)
    # What says nothing makes nothing forgotten.
    keep = jnp.where(is_tried.any(1, keepdims=True), FORGET_ROW, 1.0)
    row_tried = state.row_tried * keep + is_tried
    row_passed = state.row_passed * keep + is_passed
    keep = jnp.where(state.pauses > 0, FORGET_PAUSED, FORGET)
    keep = jnp.where(is_tried.any(), keep, 1.0)
    tried = state.tried * keep + is_tried.sum(0)
    passed = state.passed * keep + is_passed.sum(0)

    # A place that was hardly reached is as good as the others, all places together as was
    # believed before, and a row as all rows.
    shrink = lambda passed, tried, rate, weight: (passed + weight * rate) / (tried + weight)
    rate = shrink(passed.sum(), tried.sum(), FIRST_RATE, FIRST_WEIGHT)
    rates = shrink(passed, tried, rate, FIRST_WEIGHT)
    survival = jnp.cumprod(shrink(row_passed, row_tried, rates, ROW_WEIGHT), axis=1)
    # Where the batch is at its end, its rows stand for those of the next one.
    counts = is_live | ~is_live.any()
    survival = jnp.where(counts[:, None], survival, 0).sum(0) / counts.sum()
    drafted = np.array(self.widths) - 1  # most tokens after the root
    reaches = np.arange(1, self.max_depth + 1)[None, :] <= drafted[:, None]
    tokens = 1 + jnp.where(reaches, survival, 0).sum(1)  # of a row's call
    speed = tokens / params.seconds
    wide = 1 + jnp.argmax(speed[1:])
    pays = speed[wide] > speed[0]

    pauses = jnp.where(pays, 0.0, state.pauses + 1)
    # A draft that is tried costs so many calls over the root alone more than it brings.
    loss = params.seconds[wide] / params.seconds[0] - tokens[wide]
    longest = jnp.maximum(loss / TRYING, FIRST_PAUSE)
    pause = jnp.minimum(FIRST_PAUSE * 2.0 ** jnp.minimum(pauses - 1, 30), longest)
    rest = jnp.where(pays, 0, pause.astype(jnp.int32))
    return GoodputState(
        tried, passed, row_tried, row_passed, pauses, rest,
        jnp.asarray(drafted, jnp.int32)[wide],
    )

  def wants(self, params: GoodputParams, state: GoodputState) -> Array:
    return jnp.broadcast_to(state.depth, state.row_tried.shape[:1])

  def pause(self, params: GoodputParams, state: GoodputState) -> Array:
    return state.rest

  def rested(
      self, params: GoodputParams, state: GoodputState, num_calls: Array
  ) -> GoodputState:
    return state.replace(rest=jnp.maximum(state.rest - num_calls, 0))

  def remember(self, params: GoodputParams, state: GoodputState) -> GoodputParams:
    return params.replace(
        tried=state.tried, passed=state.passed, pauses=state.pauses, rest=state.rest,
        depth=state.depth,
    )


def block_sizes(most: int) -> tuple[int, ...]:
  """1, a quarter, a half and all of the most: each one more is a decoder call to compile."""
  return tuple(sorted({1, -(-most // 4), -(-most // 2), most}))
