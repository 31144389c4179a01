"""One training step of an add-on: its own parameters move, the base behind it doesn't."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bpd_jax.errors import check_number, InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import EncoderDecoder
from bpd_jax.partitioning import Partitioning
from bpd_jax.training.objective import Objective
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.step import place_state, split_batch, TrainState

Array = jax.Array


class AddonStep:
  """The jitted step of a run behind a frozen base, which is no part of its state.

  Attributes:
    config: of the base.
    partitioning: where base, state and batches live.
    optimizer: the description that `init` and the step follow.
    abstract_state: a `TrainState` of `jax.ShapeDtypeStruct` with shardings; its `params` are
      the add-on's.
  """

  def __init__(
      self, config: ModelConfig, partitioning: Partitioning, optimizer: Optimizer,
      objective: Objective, addon: Any, own: Any, base: Any, *, num_microbatches: int = 1,
      average_decay: float | None = None,
  ):
    """Checks; nothing is compiled yet.

    Args:
      config: of the base.
      partitioning: where everything lives.
      optimizer: how parameters follow gradients.
      objective: what is minimised.
      addon: what is trained.
      own: shapes of its parameters, with shardings.
      base: parameters of the base.
      num_microbatches: parts of a batch that are gone through one by one.
      average_decay: of the moving average of parameters; None for none.
    """
    if average_decay is not None:
      check_number("average_decay", average_decay, "between 0 and 1", lambda x: 0 < x < 1)
    if num_microbatches < 1:
      raise InputError("num_microbatches", num_microbatches, "a positive integer")
    self.config, self.partitioning, self.optimizer = config, partitioning, optimizer
    self._objective, self._addon, self._base = objective, addon, base
    self._model = EncoderDecoder(config, partitioning)
    self._num_microbatches, self._average_decay = num_microbatches, average_decay
    self._transform = optimizer.make()
    partitioning.check_params(own)
    self.abstract_state = place_state(partitioning, jax.eval_shape(self._init, own), own, own)
    self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
    self._step = jax.jit(
        self._run, donate_argnums=0, out_shardings=(self._shardings, partitioning.sharding(()))
    )
    self._measure = jax.jit(self._sums)

  def init(self, own: Any) -> TrainState:
    """The state before the first step; takes the parameters over."""
    return jax.jit(self._init, out_shardings=self._shardings)(own)

  def __call__(
      self, state: TrainState, batch: dict[str, Array], key: Array
  ) -> tuple[TrainState, dict[str, Array]]:
    """Does a step; see `bpd_jax.training.step.Step`."""
    return self._step(state, self._base, batch, key)

  def measure(self, own: Any, batch: dict[str, Array]) -> dict[str, Array]:
    """`nll`, `correct` and `count` [steps] of a batch."""
    return self._measure(own, self._base, batch)

  def averaged(self, state: TrainState) -> Any:
    """The parameters to use: the moving average where there is one."""
    return state.params if state.average is None else state.average

  def _init(self, own) -> TrainState:
    average = None if self._average_decay is None else jax.tree.map(jnp.array, own)
    return TrainState(jnp.zeros([], jnp.int32), own, self._transform.init(own), average)

  def _sums(self, own, base, batch):
    _, sums = self._objective.loss(
        self._addon, self._model, base, own, batch, self._objective.counts(batch),
        jax.random.key(0),
    )
    return sums

  def _run(self, state: TrainState, base, batch, key):
    keys = jax.random.split(jax.random.fold_in(key, state.step), self._num_microbatches)
    counts = self._objective.counts(batch)
    parts = jax.tree.map(lambda x: split_batch(x, self._num_microbatches), batch)

    def part(own, batch, key):
      return self._objective.loss(self._addon, self._model, base, own, batch, counts, key)

    def body(total, batch_and_key):
      (loss, sums), grads = jax.value_and_grad(part, has_aux=True)(state.params, *batch_and_key)
      return jax.tree.map(jnp.add, total, (grads, {"loss": loss, **sums})), None

    first = jax.tree.map(lambda x: x[0], (parts, keys))
    (loss, sums), grads = jax.eval_shape(
        jax.value_and_grad(part, has_aux=True), state.params, *first
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, {"loss": loss, **sums}))
    (grads, metrics), _ = jax.lax.scan(body, zeros, (parts, keys))
    updates, opt_state = self._transform.update(grads, state.opt_state, state.params)
    own = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
      average = optax.incremental_update(own, average, 1 - self._average_decay)
    metrics = {**metrics, "gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, own, opt_state, average), metrics
