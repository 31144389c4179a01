"""From a drafter's scores to what a path is worth: a weighted sum of scorers.

A path d_1 … d_D through a lattice is worth Σ_i z_i(d_i) + Σ_s w_s,i r_s(d_i | before),
with z the drafter's log-probabilities and r those of the scorers (Kim et al. 2024, §5).
Head 1 isn't in the lattice, so it is never re-scored. Weights are traced: trying
others compiles nothing.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.lattice import at_step
from bpd_jax.decoding.types import (
    Array,
    Context,
    Lattice,
    PathScore,
    Prompt,
    Scorer,
    Step,
)
from bpd_jax.errors import InputError

# A candidate that is none; finite, so that sums of it stay comparable.
NEVER = -1e9


@struct.dataclass
class Weights:
  """How much each scorer counts.

  Attributes:
    by_step: [scorers, depth], at least 0: w of each scorer at each step of the
      lattice; the paper has one number for all steps.
    entropy_power: [scorers]: w is multiplied by the entropy of the step's
      candidates, in nats, to this power; 0 leaves it alone.
  """

  by_step: Array | None = None
  entropy_power: Array | None = None


def constant_weights(values: tuple[float, ...], depth: int, entropy_powers=None) -> Weights:
  """One weight a scorer, the same at every step."""
  values = jnp.asarray(values, jnp.float32)
  powers = jnp.zeros_like(values) if entropy_powers is None else entropy_powers
  return Weights(
      by_step=jnp.broadcast_to(values[:, None], (values.shape[0], depth)),
      entropy_power=jnp.asarray(powers, jnp.float32),
  )


def candidate_entropy(lattice: Lattice) -> Array:
  """Entropy in nats of each step, [batch, depth]; all that aren't candidates are one outcome."""
  probs = jnp.exp(lattice.scores)
  known = -jnp.where(probs > 0, probs * lattice.scores, 0).sum(-1)
  rest = jnp.maximum(1 - probs.sum(-1), 0)
  return known - jnp.where(rest > 0, rest * jnp.log(jnp.where(rest > 0, rest, 1)), 0)


@struct.dataclass
class RescorerParams:
  """All that a rescorer reads, traced.

  Attributes:
    weights: how much each scorer counts.
    scorers: each one's own parameters.
  """

  weights: Weights = Weights()
  scorers: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rescorer:
  """Any number of scorers, added to the drafter's scores.

  Attributes:
    scorers: none leaves the lattice as the drafter made it.
  """

  scorers: tuple[Scorer, ...] = ()

  @property
  def context(self) -> int:
    """Newest drafted tokens that a path's addends depend on; -1 for all."""
    contexts = [scorer.context for scorer in self.scorers]
    return -1 if -1 in contexts else max(contexts, default=0)

  def init(
      self, params: RescorerParams, prompt: Prompt, context: Context | None
  ) -> tuple[Any, ...]:
    """The scorers' states before the first call."""
    pairs = zip(self.scorers, params.scorers, strict=True)
    return tuple(scorer.init(own, prompt, context) for scorer, own in pairs)

  def start(
      self, params: RescorerParams, state: tuple[Any, ...], step: Step, lattice: Lattice
  ) -> tuple[Any, ...]:
    """Tells the scorers what became certain, and what they are to judge."""
    each = zip(self.scorers, params.scorers, state, strict=True)
    return tuple(scorer.start(own, before, step, lattice) for scorer, own, before in each)

  def path_score(
      self, params: RescorerParams, state: tuple[Any, ...], lattice: Lattice
  ) -> PathScore:
    """What a search maximises.

    Steps beyond a row's `num_steps` add nothing for the first candidate and
    `NEVER` for the others, so that a shorter row has no two paths that are one.
    """
    batch, depth, k = lattice.tokens.shape
    is_drafted = jnp.arange(depth) < lattice.num_steps[:, None]  # [batch, depth]
    is_first = jnp.arange(k) == 0
    scores = jnp.where(
        is_drafted[..., None], lattice.scores, jnp.where(is_first, 0, NEVER)
    )
    if self.scorers:
      entropy = candidate_entropy(lattice)
      power = params.weights.entropy_power[:, None, None]
      factor = jnp.where(
          power == 0, 1, jnp.maximum(entropy, 1e-6)[None] ** power
      )  # [scorers, batch, depth]
      by_row = jnp.where(is_drafted, params.weights.by_step[:, None, :depth] * factor, 0)

    own = params.scorers
    each = list(enumerate(self.scorers))

    def total(judged: Sequence[Array], i: Array | int) -> Array:
      sums = at_step(scores, i)[:, None]
      for number, more in enumerate(judged):
        weight = at_step(by_row[number], i)[:, None, None]
        # What doesn't count may be -inf, and 0 × -inf is NaN.
        sums = sums + jnp.where(weight > 0, weight * more.astype(sums.dtype), 0)
      return sums

    def begin(num_paths: int) -> tuple[Any, ...]:
      return tuple(
          scorer.begin(own[n], state[n], num_paths, depth) for n, scorer in each
      )

    def extend(trails: tuple[Any, ...], parents: Array, chosen: Array, i) -> tuple[Any, ...]:
      return tuple(
          scorer.extend(own[n], state[n], trails[n], parents, chosen, i) for n, scorer in each
      )

    def addends(trails: tuple[Any, ...], i: Array | int) -> Array:
      candidates = at_step(lattice.tokens, i)
      return total(
          [scorer.score(own[n], state[n], trails[n], candidates, i) for n, scorer in each], i
      )

    def bounds() -> Array:
      def after(before: Array, candidates: Array, i: Array) -> Array:
        return total(
            [scorer.bound(own[n], state[n], before, candidates, i) for n, scorer in each], i
        )

      # All steps at once: they are small, and nothing of one depends on another.
      tokens, steps = lattice.tokens, jnp.arange(1, depth)
      return jax.vmap(after, (1, 1, 0), 1)(tokens[:, :-1], tokens[:, 1:], steps)

    return PathScore(self.context, begin, extend, addends, bounds)


@dataclasses.dataclass(frozen=True)
class Scoring:
  """A scorer ready to be added to the heads' scores.

  Attributes:
    scorer: what judges.
    params: what it reads.
    weight: how much its log-probabilities count beside the heads', at least 0; one
      number, or one for each step of the lattice.
    entropy_power: the weight is multiplied by the entropy of the step's candidates
      to this power.
  """

  scorer: Scorer
  params: Any = ()
  weight: float | tuple[float, ...] = 1.0
  entropy_power: float = 0.0


def rescorer_params(scoring: Sequence[Scoring], depth: int) -> RescorerParams:
  """Weights and parameters of scorers, for a lattice of `depth` steps.

  Raises:
    InputError: for a weight that is negative, isn't finite, or isn't one a step.
  """
  by_step = []
  for number, part in enumerate(scoring):
    field = f"scoring[{number}].weight"
    weight = np.asarray(part.weight, np.float32)
    if weight.ndim and weight.shape[0] < depth:
      raise InputError(field, f"{weight.shape[0]} numbers", f"one, or {depth}, one a step")
    if not np.isfinite(weight).all() or (weight < 0).any():
      raise InputError(field, part.weight, "finite and at least 0")
    if not np.isfinite(part.entropy_power):
      raise InputError(f"scoring[{number}].entropy_power", part.entropy_power, "finite")
    by_step.append(np.broadcast_to(weight[:depth] if weight.ndim else weight, (depth,)))
  if not by_step:
    return RescorerParams()
  powers = np.array([part.entropy_power for part in scoring], np.float32)
  return RescorerParams(
      Weights(jnp.asarray(np.stack(by_step)), jnp.asarray(powers)),
      tuple(part.params for part in scoring),
  )
