"""One training step: a pure function of state, batch and key.

Gradients of microbatches are summed before anything is divided, and what an objective
divides by is of the whole batch, over all microbatches and devices: accumulation changes
the memory that a step takes and nothing else.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bpd_jax.errors import check_count, check_number, InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params, EncoderDecoder
from bpd_jax.partitioning import Partitioning
from bpd_jax.training.objective import Objective
from bpd_jax.training.optimizer import Optimizer

Array = jax.Array


@flax.struct.dataclass
class TrainState:
  """All that a run has learned.

  Attributes:
    step: int32, steps done.
    params: what is trained: "own", the add-on's parameters, and "base", the base's where
      the objective trains it.
    opt_state: the optimiser's.
    average: exponential moving average of `params`; None without.
  """

  step: Array
  params: Any
  opt_state: Any
  average: Any


class Step:
  """The jitted step of a run, with the shapes and places of its state.

  A frozen base is no part of the state; what needs it is given it.

  Attributes:
    config: of the base.
    partitioning: where base, state and batches live.
    optimizer: the description that `init` and the step follow.
    abstract_state: a `TrainState` of `jax.ShapeDtypeStruct` with shardings.
  """

  def __init__(
      self,
      config: ModelConfig,
      partitioning: Partitioning,
      optimizer: Optimizer,
      objective: Objective,
      addon: Any,
      *,
      num_microbatches: int = 1,
      average_decay: float | None = None,
  ):
    """Checks; nothing is compiled yet.

    Args:
      config: of the base.
      partitioning: where everything lives.
      optimizer: how parameters follow gradients.
      objective: what is minimised, and whether the base learns.
      addon: what learns, a `bpd_jax.addons.addon.Addon`.
      num_microbatches: parts of a batch that are gone through one by one.
      average_decay: of the moving average of parameters, 0.999 for example.

    Raises:
      InputError: naming the argument.
    """
    check_count("num_microbatches", num_microbatches)
    if average_decay is not None:
      check_number("average_decay", average_decay, "between 0 and 1", lambda x: 0 < x < 1)
    objective.check(addon)
    self.config = config
    self.partitioning = partitioning
    self.optimizer = optimizer
    self._objective, self._addon = objective, addon
    self._num_microbatches, self._average_decay = num_microbatches, average_decay
    self._model = EncoderDecoder(config, partitioning)
    self._transform = optimizer.make()
    params = {"own": addon.abstract(config, partitioning)}
    if objective.trains_base:
      params["base"] = abstract_params(config, partitioning)
    partitioning.check_params(params)
    self.abstract_state = place_state(partitioning, jax.eval_shape(self._init, params), params)
    self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
    self._step = jax.jit(
        self._run, donate_argnums=0, out_shardings=(self._shardings, partitioning.sharding(()))
    )
    self._measure = jax.jit(self._sums)

  def init(self, params: Any) -> TrainState:
    """The state before the first step; takes the parameters over."""
    return jax.jit(self._init, out_shardings=self._shardings)(params)

  def __call__(
      self, state: TrainState, batch: dict[str, Array], key: Array, base: Any = None
  ) -> tuple[TrainState, dict[str, Array]]:
    """Does a step.

    Args:
      state: given up.
      batch: arrays of `bpd_jax.data.batches.Batch`, placed by `place_batch`; instead
        of the encoder's, `hidden` [batch, length, d_model] where a frozen base has read it.
        Of own outputs only the unlikelihood counts.
      key: of the run; what is drawn depends on it and on the step's number.
      base: the frozen base's parameters; None where it is trained.

    Returns:
      The next state, and of this step `loss`, `gradient_norm`, and `nll`, `correct`
      and `count` by head.
    """
    return self._step(state, batch, key, base)

  def measure(self, params: Any, batch: dict[str, Array], base: Any = None) -> dict[str, Array]:
    """`nll`, `correct` and `count` [heads] of a batch, nothing drawn and nothing dropped."""
    return self._measure(params, batch, base)

  def gradients(
      self, params: Any, batch: dict[str, Array], key: Array, base: Any = None
  ) -> tuple[Any, Any]:
    """Gradients of the parameters and the step's metrics; for `jax.jit`."""
    num_parts = self._num_microbatches
    part_key, shared_key = jax.random.split(key)
    shared = self._objective.shared(self._addon, batch, shared_key)
    parts = (
        jax.tree.map(lambda x: split_batch(x, num_parts), batch),
        jax.random.split(part_key, num_parts),
    )

    def loss(params, batch, key):
      return self._loss(params, base, batch, shared, key)

    def part(batch_and_key):
      (loss_part, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch_and_key)
      return grads, {"loss": loss_part, **sums}

    first = jax.tree.map(lambda x: x[0], parts)
    if num_parts == 1:
      return part(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, first))
    add = lambda total, x: (jax.tree.map(jnp.add, total, part(x)), None)
    return jax.lax.scan(add, zeros, parts)[0]

  def averaged(self, state: TrainState) -> Any:
    """The parameters to use: the moving average where there is one."""
    return state.params if state.average is None else state.average

  def _loss(self, params, base, batch, shared, key):
    return self._objective.loss(
        self._addon, self._model, params.get("base", base), params["own"], batch, shared, key
    )

  def _sums(self, params, batch, base):
    shared = self._objective.shared(self._addon, batch, None)
    return self._loss(params, base, batch, shared, None)[1]

  def _init(self, params) -> TrainState:
    average = None if self._average_decay is None else jax.tree.map(jnp.array, params)
    return TrainState(jnp.zeros([], jnp.int32), params, self._transform.init(params), average)

  def _run(self, state: TrainState, batch, key, base):
    key = jax.random.fold_in(key, state.step)
    grads, metrics = self.gradients(state.params, batch, key, base)
    updates, opt_state = self._transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
      average = optax.incremental_update(params, average, 1 - self._average_decay)
    metrics = {**metrics, "gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state, average), metrics


def place_state(partitioning: Partitioning, state: TrainState, params: Any) -> TrainState:
  """Gives an abstract state its shardings: moments lie where their parameters do.

  Args:
    partitioning: of the mesh.
    state: shapes.
    params: of the state, with shardings.
  """
  everywhere = partitioning.sharding(())
  by_path = dict(jax.tree_util.tree_leaves_with_path(params))

  def like(path, leaf):
    # A moment's path ends with its parameter's. Factored ones have another shape, and
    # are small.
    ends = (by_path.get(path[i:]) for i in range(len(path)))
    param = next((end for end in ends if end is not None and end.shape == leaf.shape), None)
    sharding = everywhere if param is None else param.sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  place = lambda tree: jax.tree_util.tree_map_with_path(like, tree)
  return TrainState(
      place(state.step), params, place(state.opt_state),
      None if state.average is None else place(state.average),
  )


def split_batch(x: Array, num_parts: int) -> Array:
  """[batch, …] -> [parts, batch / parts, …], each device keeping its own rows."""
  return x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)


def place_batch(partitioning: Partitioning, batch: dict[str, Any]) -> dict[str, Array]:
  """Puts this process's rows of a batch on its devices."""

  def put(x):
    names = ("batch", "length", "embed")[: x.ndim]
    return jax.make_array_from_process_local_data(partitioning.sharding(names), x)

  return {name: put(x) for name, x in batch.items()}


def check_batch(partitioning: Partitioning, batch_size: int, num_microbatches: int) -> None:
  """Raises InputError where a batch can't be split over microbatches and devices."""
  if batch_size % num_microbatches:
    raise InputError(
        "batch_size", batch_size, f"a multiple of the {num_microbatches} microbatches"
    )
  partitioning.check_batch(batch_size // num_microbatches)

