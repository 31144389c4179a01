"""Optimisers and learning-rate schedules, by optax, in one frozen description."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bpd_jax.errors import check_count, check_number, InputError

NAMES = ("adafactor", "adamw", "muon")
SCHEDULES = ("rsqrt", "cosine", "linear", "constant")
# Those whose end has to be known from the beginning.
DECAYING = ("cosine", "linear")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optimiser with its schedule.

  Attributes:
    name: "adafactor", as T5 was trained: factored second moments, updates
      relative to the size of a parameter, no momentum; "adamw"; or "muon",
      orthogonalised momentum for kernels and Adam's for the rest, updates
      relative to the size of a parameter as adafactor's.
    learning_rate: the highest of the schedule.
    schedule: "rsqrt", learning_rate · sqrt(warmup_steps / step) after the
      warm-up, T5's; "cosine" or "linear", down to `final_fraction` at
      `decay_steps`; or "constant".
    warmup_steps: in which the rate rises linearly from 0.
    decay_steps: the step at which cosine and linear end; both need it.
    final_fraction: of `learning_rate`, what cosine and linear end with.
    weight_decay: a step takes this times the learning rate off each parameter.
    max_gradient_norm: gradients are scaled down to it; None for never.
    b1: decay of adamw's first moment, and of both of muon's.
    b2: decay of adamw's second moment, and of that of what muon leaves to Adam.
    epsilon: adamw's.
  """

  name: str = "adafactor"
  learning_rate: float = 1e-2
  schedule: str = "rsqrt"
  warmup_steps: int = 1000
  decay_steps: int | None = None
  final_fraction: float = 0.0
  weight_decay: float = 0.0
  max_gradient_norm: float | None = 1.0
  b1: float = 0.9
  b2: float = 0.98
  epsilon: float = 1e-8

  def __post_init__(self):
    if self.name not in NAMES:
      raise InputError("Optimizer.name", self.name, f"one of {NAMES}")
    if self.schedule not in SCHEDULES:
      raise InputError("Optimizer.schedule", self.schedule, f"one of {SCHEDULES}")
    check_number(
        "Optimizer.learning_rate", self.learning_rate, "a positive number", lambda x: 0 < x
    )
    for name in ("final_fraction", "weight_decay"):
      check_number(
          f"Optimizer.{name}", getattr(self, name), "a number from 0 on", lambda x: 0 <= x
      )
    for name in ("b1", "b2"):
      check_number(
          f"Optimizer.{name}", getattr(self, name), "from 0 to below 1", lambda x: 0 <= x < 1
      )
    if self.max_gradient_norm is not None:
      check_number(
          "Optimizer.max_gradient_norm", self.max_gradient_norm, "a positive number, or None",
          lambda x: 0 < x,
      )
    check_count("Optimizer.warmup_steps", self.warmup_steps, 0)
    if self.warmup_steps < (self.schedule == "rsqrt"):
      raise InputError("Optimizer.warmup_steps", self.warmup_steps, "0 or more; rsqrt needs 1")
    if self.schedule in DECAYING and (
        self.decay_steps is None or self.decay_steps <= self.warmup_steps
    ):
      raise InputError(
          "Optimizer.decay_steps", self.decay_steps,
          f"more than the {self.warmup_steps} warmup_steps, for {self.schedule}",
      )

  def to_dict(self) -> dict[str, Any]:
    """The fields that count, ready for JSON."""
    fields = dataclasses.asdict(self)
    if self.schedule not in DECAYING:
      fields |= {"decay_steps": None, "final_fraction": None}
    return fields

  def rate(self) -> optax.Schedule:
    """The learning rate, a function of the step from 0 on."""
    peak, end = self.learning_rate, self.learning_rate * self.final_fraction
    if self.schedule == "rsqrt":
      start = self.warmup_steps
      after = lambda step: peak * (start / (jnp.maximum(step, 0) + start)) ** 0.5
    elif self.schedule == "constant":
      after = optax.constant_schedule(peak)
    else:
      steps = self.decay_steps - self.warmup_steps
      after = (
          optax.cosine_decay_schedule(peak, steps, self.final_fraction)
          if self.schedule == "cosine"
          else optax.linear_schedule(peak, end, steps)
      )
    if not self.warmup_steps:
      return after
    # From the first step on, which would do nothing at a rate of 0.
    step = peak / self.warmup_steps
    warmup = optax.linear_schedule(step, peak + step, self.warmup_steps)
    return optax.join_schedules([warmup, after], [self.warmup_steps])

  def make(self) -> optax.GradientTransformation:
    """The transformation of gradients into updates."""
    rate = self.rate()
    steps = []
    if self.max_gradient_norm is not None:
      steps.append(optax.clip_by_global_norm(self.max_gradient_norm))
    if self.name == "adamw":
      steps.append(
          optax.adamw(rate, self.b1, self.b2, self.epsilon, weight_decay=self.weight_decay)
      )
      return optax.chain(*steps)
    if self.name == "adafactor":
      steps.append(optax.adafactor(rate, multiply_by_parameter_scale=True))
    else:
      # T5 starts its queries sqrt(d_kv) smaller than its keys; updates of one size for
      # all kernels would blow its unscaled scores up.
      steps += [
          optax.contrib.muon(
              1.0, beta=self.b1, adam_b1=self.b1, adam_b2=self.b2, consistent_rms=1.0,
              muon_weight_dimension_numbers=_kernels,
          ),
          optax.scale_by_param_block_rms(),
          optax.scale_by_schedule(rate),
      ]
    if self.weight_decay:
      # adafactor's own option decays without the learning rate, and muon's would be
      # scaled by the parameters.
      decay = optax.inject_hyperparams(optax.add_decayed_weights)
      steps.append(decay(weight_decay=lambda step: -self.weight_decay * rate(step)))
    return optax.chain(*steps)


def _kernels(params: Any) -> Any:
  """Which parameters muon takes, by their axes: stacked [layers or heads, in, out]."""
  numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
  return jax.tree.map(lambda leaf: numbers if leaf.ndim == 3 else None, params)

