"""The loss of all heads: Σ_i λ_i · (mean cross-entropy of head i over the token i ahead).

Head i at a position predicts the token i places after it (Stern et al. 2018, §6;
Kim et al. 2024, App. D.1 with λ_i = 1). `weighted_cross_entropy` goes through the
heads one after the other and takes the gradient of each while its logits are
there, so that the logits of one head is all that memory holds and nothing is
computed twice.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bpd_jax.errors import InputError
from bpd_jax.model.model import EncoderDecoder, project_logits
from bpd_jax.training.objective import decoder_states, Objective, TEXTS

Array = jax.Array

# Tokens of an n-gram that must not come twice in a model's own outputs; looping rows are
# counted by the same.
REPEATED = 3


@dataclasses.dataclass(frozen=True)
class Loss(Objective):
  """The loss of parallel heads, and of the base where that is trained with them.

  Attributes:
    trains_base: whether base and heads are trained together; else the heads alone,
      behind the base as it is.
    texts: see `Objective`.
    head_weights: λ of heads 1, 2, …; all 1 by default.
    label_smoothing: share of the target's probability that goes to all others.
    z_loss: weight of log(Σ exp logits)², which keeps logits near 0.
    one_random_head: whether a step draws one head and trains it alone, in place
      of all, as Stern et al. did: the expected gradient is the same, the heads'
      activations are those of one.
    draft_stride: parallel heads learn on one position of every so many, drawn each
      step, and head 1 on all: the expected gradient is the same and the parallel heads
      take that many times less. Not with `one_random_head`.
    unlikelihood: weight of -Σ_c log(1 - p_c) of head 1: over the tokens c that came
      before in the text and don't come now, and in a model's own outputs over those
      that end a repeated 3-gram (Welleck et al. 2020, §5). Greedy decoding then
      loops less. Not with `one_random_head`.
  """

  trains_base: bool = False
  texts: str = "references"
  head_weights: tuple[float, ...] | None = None
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  one_random_head: bool = False
  draft_stride: int = 1
  unlikelihood: float = 0.0

  def __post_init__(self):
    if self.texts not in TEXTS:
      raise InputError("Loss.texts", self.texts, f"one of {TEXTS}")
    if self.trains_base and self.texts != "references":
      raise InputError("Loss.texts", self.texts, "references where the base is trained")
    if self.head_weights is not None:
      object.__setattr__(self, "head_weights", tuple(self.head_weights))
    if not 0 <= self.label_smoothing < 1:
      raise InputError("Loss.label_smoothing", self.label_smoothing, "from 0 to below 1")
    if self.z_loss < 0:
      raise InputError("Loss.z_loss", self.z_loss, "0 or more")
    if self.draft_stride < 1:
      raise InputError("Loss.draft_stride", self.draft_stride, "a positive integer")
    if self.draft_stride > 1 and self.one_random_head:
      raise InputError("Loss.draft_stride", self.draft_stride, "1 with one_random_head")
    if self.unlikelihood < 0:
      raise InputError("Loss.unlikelihood", self.unlikelihood, "0 or more")
    if self.unlikelihood and self.one_random_head:
      raise InputError("Loss.unlikelihood", self.unlikelihood, "0 with one_random_head")

  @property
  def reads_states(self) -> bool:
    """See `Objective`."""
    return not self.trains_base

  @property
  def unlearns_loops(self) -> bool:
    """See `Objective`."""
    return self.trains_base and self.unlikelihood > 0

  def check(self, addon: Any) -> None:
    """Raises InputError for what aren't heads, or where nothing would be learned."""
    if not (hasattr(addon, "states") and hasattr(addon, "block_size")):
      raise InputError("objective", "Loss", f"one that trains {type(addon).__name__}")
    if addon.block_size == 1 and not self.trains_base:
      raise InputError("Heads.block_size", 1, "2 or more behind a frozen base")
    self.weights(addon.block_size)

  def shared(self, addon: Any, batch: dict[str, Array], key: Array | None) -> dict[str, Any]:
    """`counts` [heads], targets of each head; `positions` drafts are read at and `chosen`,
    the one head, None for all."""
    block_size = addon.block_size
    positions = chosen = None
    if key is not None and self.draft_stride > 1 and block_size > 1:
      length, stride = batch["decoder_segment_ids"].shape[1], self.draft_stride
      positions = jax.random.randint(key, [], 0, stride) + jnp.arange(0, length, stride)
    if key is not None and self.one_random_head and block_size > 1:
      # In proportion to nothing: what each head weighs is in its λ.
      chosen = jax.random.randint(key, [], 0, block_size)
    _, masks = _targets(batch, block_size, positions)
    return {"counts": masks.sum(axis=(1, 2)), "positions": positions, "chosen": chosen}

  def loss(
      self, addon: Any, model: EncoderDecoder, base: Any, own: Any,
      batch: dict[str, Array], shared: dict[str, Any], key: Array | None,
  ) -> tuple[Array, dict[str, Array]]:
    """See `Objective.loss`."""
    config, block_size = model.config, addon.block_size
    positions, chosen = shared["positions"], shared["chosen"]
    hidden = decoder_states(model, base, batch, key if self.trains_base else None)
    targets, masks = _targets(batch, block_size, positions)
    # Heads that weigh nothing are measured too.
    head_weights = (1.0,) * block_size if key is None else self.weights(block_size)
    head_weights = jnp.asarray(head_weights, config.accum_dtype)
    counts = shared["counts"].astype(config.accum_dtype)
    weights = normalised_weights(masks, head_weights, counts)
    entropy = functools.partial(
        weighted_cross_entropy, functools.partial(_project, model), self,
        kernel=base["embedding" if config.is_tied else "logits_kernel"],
    )
    if chosen is not None:
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, chosen, 1)
      # Head 1 reads the state as it is.
      other = addon.states(config, own, hidden, jnp.maximum(chosen + 1, 2))
      states = jnp.where(chosen > 0, other, hidden[None])
      loss, sums = entropy(states, targets=take(targets), weights=take(weights) * block_size)
      place = lambda x: jnp.zeros([block_size], x.dtype).at[chosen].set(x[0])
      return loss, jax.tree.map(place, sums)
    repetition_weights = None
    if self.unlikelihood and key is not None:
      found = repetitions(
          targets[0], batch["decoder_segment_ids"], batch.get("decoder_output_mask")
      )
      each = self.unlikelihood * head_weights[0] / jnp.maximum(counts[0], 1)
      repetition_weights = jnp.where(found, each, 0)
    loss, sums = entropy(
        hidden[None], targets=targets[:1], weights=weights[:1],
        repetition_weights=repetition_weights,
    )
    if block_size == 1:
      return loss, sums
    at = lambda x, axis: x
    if positions is not None:
      # The last position may be past the end; the one read in its place has no weight.
      at = lambda x, axis: jnp.take(x, positions, axis, mode="clip")
    draft_loss, draft_sums = entropy(
        addon.states(config, own, at(hidden, 1)), targets=at(targets[1:], 2),
        weights=at(weights[1:], 2),
    )
    return loss + draft_loss, jax.tree.map(
        lambda x, y: jnp.concatenate([x, y]), sums, draft_sums
    )

  def weights(self, block_size: int) -> tuple[float, ...]:
    """λ of each head; InputError where they aren't one for each of `block_size`."""
    weights = self.head_weights or (1.0,) * block_size
    if len(weights) != block_size or min(weights) < 0:
      raise InputError(
          "Loss.head_weights", self.head_weights, f"{block_size} numbers from 0, one a head"
      )
    return weights


def _targets(
    batch: dict[str, Array], block_size: int, positions: Array | None
) -> tuple[Array, Array]:
  """`head_targets` of a batch but for own outputs; drafts' at some positions alone."""
  targets, masks = head_targets(
      batch["decoder_target_tokens"], batch["decoder_segment_ids"], block_size
  )
  if "decoder_output_mask" in batch:
    masks &= ~batch["decoder_output_mask"]
  if positions is not None:
    is_drawn = jnp.zeros([masks.shape[2]], bool).at[positions].set(True)
    masks = masks.at[1:].set(masks[1:] & is_drawn)
  return targets, masks


def _project(model: EncoderDecoder, state: Array, kernel: Array) -> Array:
  logits = project_logits(model.config, kernel, state, is_view=False)
  return model.partitioning.constrain(logits, ("batch", "length", "vocab"))


def head_targets(targets: Array, segments: Array, block_size: int) -> tuple[Array, Array]:
  """The targets of each head, and where it has one.

  Head i has a target where the token i - 1 further on belongs to the same
  segment:

    targets  a b c d _    segments 1 1 2 2 0
    head 2   b c d _ _    has one  y n y n n

  Args:
    targets: [batch, length] int32, of head 1.
    segments: [batch, length] int32, 0 where nothing is.
    block_size: h.

  Returns:
    Targets [h, batch, length] int32 and masks [h, batch, length] bool.
  """
  length = targets.shape[1]
  shifted, masks = [], []
  for ahead in range(block_size):
    pad = ((0, 0), (0, min(ahead, length)))
    shifted.append(jnp.pad(targets[:, ahead:], pad))
    masks.append((jnp.pad(segments[:, ahead:], pad) == segments) & (segments > 0))
  return jnp.stack(shifted), jnp.stack(masks)


def cross_entropy(
    logits: Array, targets: Array, label_smoothing: float, z_loss: float
) -> tuple[Array, Array]:
  """Of each position: what is minimised, and the plain -log p(target).

  With smoothing the target keeps 1 - s and each other token gets s / (vocab - 1);
  the entropy of that distribution is subtracted, so that the least value is 0.

  Args:
    logits: [..., vocab].
    targets: [...] int32.
    label_smoothing: s.
    z_loss: weight of log Z squared.

  Returns:
    Two arrays [...] of the logits' dtype.
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)
  target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nll = log_z - target
  loss = nll
  if label_smoothing:
    others = logits.shape[-1] - 1
    low = label_smoothing / others
    # Σ_v q_v (log_z - logit_v), with q = 1 - s at the target and low elsewhere.
    rest = others * log_z - (logits.sum(axis=-1) - target)
    entropy = -(
        (1 - label_smoothing) * jnp.log1p(-label_smoothing) + label_smoothing * jnp.log(low)
    )
    loss = (1 - label_smoothing) * nll + low * rest - entropy
  return loss + z_loss * jnp.square(log_z), nll


def repetitions(targets: Array, segments: Array, is_output: Array | None = None) -> Array:
  """Which earlier tokens of a text must not come at each position.

    targets    a b a c     at c: a, b (a once, though it came twice)
                           at the second a: b
    an output  a b c a b c at the second c: c, which ends a repeated 3-gram

  Args:
    targets: [batch, length] int32, of head 1.
    segments: [batch, length] int32, 0 where nothing is.
    is_output: [batch, length] bool, where the text is a model's own; None is nowhere.

  Returns:
    [batch, length, length] bool: whether the token of the column is one of them at the
    row. Of a text to be learned these are all earlier ones but the target, each at its
    first place; of an own output the token itself, where it repeats `REPEATED` tokens.
  """
  same_segment = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
  earlier = same_segment & jnp.tri(targets.shape[1], k=-1, dtype=bool)
  is_same = same_segment & (targets[:, :, None] == targets[:, None, :])
  is_first = ~jnp.any(earlier & is_same, axis=2)
  found = earlier & ~is_same & is_first[:, None, :]
  if is_output is None:
    return found
  matches = shifted = is_same
  for _ in range(REPEATED - 1):
    shifted = jnp.pad(shifted[:, :-1, :-1], ((0, 0), (1, 0), (1, 0)))
    matches &= shifted
  ends = jnp.any(earlier & matches, axis=2)
  own = ends[:, :, None] & jnp.eye(targets.shape[1], dtype=bool)
  return jnp.where(is_output[:, :, None], own, found)


def unlikelihood(logits: Array, targets: Array, weights: Array) -> Array:
  """Σ of weight × -log(1 - p) over the tokens that must not come, at each position.

  Args:
    logits: [batch, length, vocab].
    targets: [batch, length] int32, of head 1.
    weights: [batch, length, length], of the column's token at the row; 0 where it may come.

  Returns:
    A number of the logits' dtype.
  """
  columns = jnp.broadcast_to(targets[:, None, :], weights.shape)
  log_p = jnp.take_along_axis(logits, columns, axis=-1) - jax.nn.logsumexp(
      logits, axis=-1, keepdims=True
  )
  # Where p rounds to 1 nothing finite would be left of log(1 - p).
  log_p = jnp.minimum(jnp.where(weights > 0, log_p, -1.0), -jnp.finfo(logits.dtype).eps)
  return -jnp.sum(weights.astype(logits.dtype) * jnp.log(-jnp.expm1(log_p)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_cross_entropy(
    project: Callable[[Array, Array], Array],
    loss: Loss,
    states: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    repetition_weights: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Σ over heads and positions of weight × cross-entropy.

  Args:
    project: (state, kernel) -> logits, [..., d] -> [..., vocab].
    loss: smoothing and z-loss.
    states: [heads, batch, length, d].
    kernel: of the output projection.
    targets: [heads, batch, length] int32.
    weights: [heads, batch, length]; 0 where there is no target.
    repetition_weights: [batch, length, length], as `unlikelihood` takes them, which is
      added; where the heads are head 1 alone.

  Returns:
    The sum, and what metrics need: sums over the positions of weight above 0 of
    `nll` and `correct`, and their number `count`, each [heads]. Only the first is
    differentiated, with respect to states and kernel.
  """
  head = functools.partial(_head_loss, project, loss, repetition_weights)
  totals, sums = jax.lax.map(lambda x: head(x[0], kernel, *x[1:]), (states, targets, weights))
  return totals.sum(), sums


def _head_loss(project, loss: Loss, repetition_weights, state, kernel, targets, weights):
  """One head of `weighted_cross_entropy`."""
  logits = project(state, kernel)
  values, nll = cross_entropy(logits, targets, loss.label_smoothing, loss.z_loss)
  has_target = weights > 0
  count = lambda x: jnp.sum(jnp.where(has_target, x, 0), dtype=logits.dtype)
  best = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  is_correct = best >= logits.max(axis=-1)
  sums = {
      "nll": count(nll), "correct": count(is_correct), "count": count(has_target),
  }
  total = jnp.sum(values * weights.astype(values.dtype))
  if repetition_weights is not None:
    total += unlikelihood(logits, targets, repetition_weights)
  return total, sums


def _forward(project, loss, states, kernel, targets, weights, repetition_weights):
  grad = jax.value_and_grad(
      functools.partial(_head_loss, project, loss, repetition_weights), argnums=(0, 1), has_aux=True
  )

  def body(kernel_grad, x):
    (total, sums), (state_grad, part) = grad(x[0], kernel, *x[1:])
    return kernel_grad + part, (total, sums, state_grad)

  kernel_grad, (totals, sums, state_grads) = jax.lax.scan(
      body, jnp.zeros_like(kernel), (states, targets, weights)
  )
  return (totals.sum(), sums), (state_grads, kernel_grad)


def _backward(project, loss, saved, cotangents):
  del project, loss
  scale = cotangents[0]
  return (*(grad * scale.astype(grad.dtype) for grad in saved), None, None, None)


weighted_cross_entropy.defvjp(_forward, _backward)


def normalised_weights(masks: Array, head_weights: Array, counts: Array) -> Array:
  """What each position's cross-entropy is multiplied by: λ_i over head i's count.

  Args:
    masks: [heads, batch, length] bool, of any part of a batch.
    head_weights: [heads], λ.
    counts: [heads], targets of the whole batch.

  Returns:
    [heads, batch, length] float32.
  """
  each = head_weights / jnp.maximum(counts, 1)
  return jnp.where(masks, each[:, None, None], 0)


def head_losses(sums: dict[str, Any]) -> dict[str, float]:
  """Metrics by head from sums: loss_head_i in nats a token, and accuracy_head_i.

  Args:
    sums: `nll`, `correct` and `count`, each [heads].
  """
  metrics = {}
  for i, count in enumerate(sums["count"], start=1):
    if count:
      metrics[f"loss_head_{i}"] = float(sums["nll"][i - 1] / count)
      metrics[f"accuracy_head_{i}"] = float(sums["correct"][i - 1] / count)
  return metrics
