"""One training step: a pure function of state, batch and key.

Gradients of microbatches are summed before anything is divided, and each head's
sum is divided by the number of its targets in the whole batch, over all
microbatches and devices: accumulation changes the memory that a step takes and
nothing else.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bpd_jax.errors import InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.heads import ParallelHeads
from bpd_jax.model.model import abstract_params, EncoderDecoder, project_logits
from bpd_jax.partitioning import Partitioning
from bpd_jax.training.loss import (
    head_targets,
    Loss,
    normalised_weights,
    repetitions,
    weighted_cross_entropy,
)
from bpd_jax.training.optimizer import Optimizer

Array = jax.Array

# What each mode trains; the rest of the parameters stays as it is, bit for bit.
MODES = {
    "joint": ("decoder", "embedding", "encoder", "heads", "logits_kernel"),
    "heads_only": ("heads",),
    "distill": ("heads",),
}


@flax.struct.dataclass
class TrainState:
  """All that a run has learned.

  Attributes:
    step: int32, steps done.
    params: all parameters, as a model folder has them.
    opt_state: the optimiser's, of the trained part of `params`.
    average: exponential moving average of the trained part; None without.
  """

  step: Array
  params: Any
  opt_state: Any
  average: Any


class Step:
  """The jitted step of a run, with the shapes and places of its state.

  Attributes:
    config: of the model.
    partitioning: where state and batches live.
    optimizer: the description that `init` and the step follow.
    abstract_state: a `TrainState` of `jax.ShapeDtypeStruct` with shardings.
  """

  def __init__(
      self,
      config: ModelConfig,
      partitioning: Partitioning,
      optimizer: Optimizer,
      loss: Loss = Loss(),
      *,
      mode: str = "joint",
      num_microbatches: int = 1,
      average_decay: float | None = None,
  ):
    """Checks; nothing is compiled yet.

    Args:
      config: of the model.
      partitioning: where everything lives.
      optimizer: how parameters follow gradients.
      loss: what is minimised.
      mode: one of `MODES`. "heads_only" and "distill" read the base model without
        dropout and train its parallel heads; they differ in their data alone.
      num_microbatches: parts of a batch that are gone through one by one.
      average_decay: of the moving average of parameters, 0.999 for example.

    Raises:
      InputError: naming the argument.
    """
    if mode not in MODES:
      raise InputError("mode", mode, f"one of {tuple(MODES)}")
    if mode != "joint" and config.block_size == 1:
      raise InputError("ModelConfig.block_size", 1, f"2 or more in mode {mode!r}")
    if num_microbatches < 1:
      raise InputError("num_microbatches", num_microbatches, "a positive integer")
    if average_decay is not None and not 0 < average_decay < 1:
      raise InputError("average_decay", average_decay, "between 0 and 1")
    self.config = config
    self.partitioning = partitioning
    self.optimizer = optimizer
    self._loss = loss
    self._mode = mode
    self._head_weights = loss.weights(config.block_size)
    self._num_microbatches = num_microbatches
    self._average_decay = average_decay
    self._has_dropout = mode == "joint" and config.dropout_rate > 0
    self._model = EncoderDecoder(config, partitioning)
    self._transform = optimizer.make()
    params = abstract_params(config, partitioning)
    partitioning.check_params(params)
    self.abstract_state = place_state(
        partitioning, jax.eval_shape(self._init, params), params, self._split(params)[0]
    )
    self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
    self._step = jax.jit(
        self._run, donate_argnums=0, out_shardings=(self._shardings, partitioning.sharding(()))
    )
    self._measure = jax.jit(self._sums)
    self._read = jax.jit(lambda params, batch: self._hidden(params, batch, None))

  def init(self, params: Any) -> TrainState:
    """The state before the first step; takes the parameters over."""
    return jax.jit(self._init, out_shardings=self._shardings)(params)

  def __call__(
      self, state: TrainState, batch: dict[str, Array], key: Array
  ) -> tuple[TrainState, dict[str, Array]]:
    """Does a step.

    Args:
      state: given up.
      batch: arrays of `bpd_jax.data.batches.Batch`, placed by `place_batch`; instead
        of the encoder's, `hidden` [batch, length, d_model] where the base is frozen.
        Of own outputs only the unlikelihood counts.
      key: of the run; what is drawn depends on it and on the step's number.

    Returns:
      The next state, and of this step `loss`, `gradient_norm`, and `nll`, `correct`
      and `count` by head.
    """
    return self._step(state, batch, key)

  def measure(self, params: Any, batch: dict[str, Array]) -> dict[str, Array]:
    """`nll`, `correct` and `count` [heads] of a batch, without dropout."""
    return self._measure(params, batch)

  def hidden(self, params: Any, batch: dict[str, Array]) -> Array:
    """The decoder's normed last states [batch, length, d_model], without dropout."""
    return self._read(params, batch)

  def gradients(self, params: Any, batch: dict[str, Array], key: Array) -> tuple[Any, Any]:
    """Gradients of the trained part and the step's metrics; for `jax.jit`."""
    block_size, num_parts = self.config.block_size, self._num_microbatches
    dtype = jnp.dtype(self.config.accum_dtype)
    targets, masks = head_targets(
        batch["decoder_target_tokens"], batch["decoder_segment_ids"], block_size
    )
    is_output = batch.get("decoder_output_mask")
    if is_output is not None:
      masks &= ~is_output
    keys = jax.random.split(key)
    positions = None
    if self._loss.draft_stride > 1 and block_size > 1:
      length, stride = masks.shape[2], self._loss.draft_stride
      positions = jax.random.randint(keys[1], [], 0, stride) + jnp.arange(0, length, stride)
      is_drawn = jnp.zeros([length], bool).at[positions].set(True)
      masks = masks.at[1:].set(masks[1:] & is_drawn)
    counts = masks.sum(axis=(1, 2), dtype=dtype)
    head_weights = jnp.asarray(self._head_weights, dtype)
    part_loss = functools.partial(self._heads_loss, positions)
    if self._loss.one_random_head:
      # In proportion to nothing: what each head weighs is in its λ.
      chosen = jax.random.randint(keys[1], [], 0, block_size)
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, chosen, 1)
      targets, masks, counts = take(targets), take(masks), take(counts)
      head_weights = take(head_weights) * block_size
      part_loss = functools.partial(self._one_head_loss, chosen)
    weights = normalised_weights(masks, head_weights, counts)
    repetition_weights = None
    if self._loss.unlikelihood:
      found = repetitions(targets[0], batch["decoder_segment_ids"], is_output)
      each = self._loss.unlikelihood * head_weights[0] / jnp.maximum(counts[0], 1)
      repetition_weights = jnp.where(found, each, 0)
    trained, frozen = self._split(params)
    split = functools.partial(split_batch, num_parts=num_parts)
    # The batch is the second axis of what is by head.
    by_head = jax.vmap(split, in_axes=0, out_axes=1)
    parts = (
        jax.tree.map(split, batch), by_head(targets), by_head(weights),
        jax.tree.map(split, repetition_weights), jax.random.split(keys[0], num_parts),
    )
    grad = jax.value_and_grad(part_loss, has_aux=True)

    def body(total, part):
      (loss, sums), grads = grad(trained, frozen, *part)
      return jax.tree.map(jnp.add, total, (grads, {"loss": loss, **sums})), None

    zeros = jnp.zeros([len(counts)], dtype)
    start = {"loss": jnp.zeros([], dtype), "nll": zeros, "correct": zeros, "count": zeros}
    start = (jax.tree.map(jnp.zeros_like, trained), start)
    if num_parts == 1:
      (grads, metrics), _ = body(start, jax.tree.map(lambda x: x[0], parts))
    else:
      (grads, metrics), _ = jax.lax.scan(body, start, parts)
    if self._loss.one_random_head:
      loss = metrics.pop("loss")
      metrics = {name: jnp.zeros([block_size], dtype).at[chosen].set(x[0])
                 for name, x in metrics.items()}
      metrics["loss"] = loss
    return grads, metrics

  def _one_head_loss(
      self, chosen, trained, frozen, batch, targets, weights, repetition_weights, key
  ):
    """What a microbatch adds to the loss of head `chosen` + 1 alone."""
    del repetition_weights  # None, with one head.
    params = {**trained, **frozen}
    hidden = self._hidden(params, batch, key if self._has_dropout else None)
    # Head 1 reads the state as it is.
    other = self._read_heads(params, hidden, which=jnp.maximum(chosen + 1, 2))
    states = jnp.where(chosen > 0, other, hidden[None])
    return self._entropy(params, states, targets, weights)

  def _heads_loss(
      self, positions, trained, frozen, batch, targets, weights, repetition_weights, key
  ):
    """What a microbatch adds to the loss, drafts read at some positions; None is at all."""
    params = {**trained, **frozen}
    hidden = self._hidden(params, batch, key if self._has_dropout else None)
    loss, sums = self._entropy(
        params, hidden[None], targets[:1], weights[:1], repetition_weights
    )
    if self.config.block_size == 1:
      return loss, sums
    at = lambda x, axis: x
    if positions is not None:
      # The last position may be past the end; the one read in its place has no weight.
      at = lambda x, axis: jnp.take(x, positions, axis, mode="clip")
    drafts = self._read_heads(params, at(hidden, 1))
    draft_loss, draft_sums = self._entropy(
        params, drafts, at(targets[1:], 2), at(weights[1:], 2)
    )
    return loss + draft_loss, jax.tree.map(
        lambda x, y: jnp.concatenate([x, y]), sums, draft_sums
    )

  def _entropy(self, params, states, targets, weights, repetition_weights=None):
    return weighted_cross_entropy(
        self._project, self._loss, states, self._kernel(params), targets, weights,
        repetition_weights,
    )

  def _sums(self, params, batch):
    targets, masks = head_targets(
        batch["decoder_target_tokens"], batch["decoder_segment_ids"], self.config.block_size
    )
    states = self._head_states(params, self._hidden(params, batch, None))
    _, sums = weighted_cross_entropy(
        self._project, Loss(), states, self._kernel(params), targets,
        masks.astype(self.config.accum_dtype),
    )
    return sums

  def _hidden(self, params, batch, dropout_key: Array | None) -> Array:
    """Normed last states of the decoder, teacher-forced."""
    if "hidden" in batch:
      return batch["hidden"]
    is_training = dropout_key is not None
    rngs, fold = {}, jax.random.fold_in
    apply = functools.partial(self._model.apply, {"params": params})
    if is_training:
      rngs = {"dropout": fold(dropout_key, 0)}
    encoder, decoder = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
    same = lambda rows, columns: (rows[:, :, None] == columns[:, None, :]) & (
        columns[:, None, :] > 0
    )
    encoded = apply(
        batch["encoder_input_tokens"], same(encoder, encoder), is_training, rngs=rngs,
        method="encode",
    )
    if is_training:
      rngs = {"dropout": fold(dropout_key, 1)}
    length = decoder.shape[1]
    causal = jnp.tri(length, dtype=bool)
    return apply(
        encoded, same(decoder, encoder), batch["decoder_input_tokens"],
        same(decoder, decoder) & causal, is_training, rngs=rngs, method="decode",
    )

  def _head_states(self, params, hidden: Array) -> Array:
    """States of all heads, [heads, batch, length, d_model]."""
    if self.config.block_size == 1:
      return hidden[None]
    return jnp.concatenate([hidden[None], self._read_heads(params, hidden)])

  def _read_heads(self, params, hidden: Array, which: Array | None = None) -> Array:
    """States of heads 2 … h, or of one of them, heads first."""
    heads = ParallelHeads(self.config)
    states = heads.apply({"params": params["heads"]}, hidden, which=which)
    return jnp.moveaxis(states, -2, 0)

  def _kernel(self, params) -> Array:
    return params["embedding" if self.config.is_tied else "logits_kernel"]

  def _project(self, state: Array, kernel: Array) -> Array:
    logits = project_logits(self.config, kernel, state, is_view=False)
    return self.partitioning.constrain(logits, ("batch", "length", "vocab"))

  def _init(self, params) -> TrainState:
    trained, _ = self._split(params)
    average = None if self._average_decay is None else jax.tree.map(jnp.array, trained)
    return TrainState(jnp.zeros([], jnp.int32), params, self._transform.init(trained), average)

  def _run(self, state: TrainState, batch, key):
    key = jax.random.fold_in(key, state.step)
    grads, metrics = self.gradients(state.params, batch, key)
    trained, frozen = self._split(state.params)
    updates, opt_state = self._transform.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    average = state.average
    if average is not None:
      average = optax.incremental_update(trained, average, 1 - self._average_decay)
    metrics = {**metrics, "gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, {**trained, **frozen}, opt_state, average), metrics

  def _split(self, params) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trained and the frozen part of parameters."""
    names = MODES[self._mode]
    return (
        {name: part for name, part in params.items() if name in names},
        {name: part for name, part in params.items() if name not in names},
    )

  def averaged(self, state: TrainState) -> Any:
    """The parameters to use: the moving average where there is one."""
    return state.params if state.average is None else {**state.params, **state.average}


def place_state(
    partitioning: Partitioning, state: TrainState, params: Any, trained: Any
) -> TrainState:
  """Gives an abstract state its shardings: moments lie where their parameters do.

  Args:
    partitioning: of the mesh.
    state: shapes.
    params: of the state, with shardings.
    trained: the part of them that has moments.
  """
  everywhere = partitioning.sharding(())
  by_path = dict(jax.tree_util.tree_leaves_with_path(trained))

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

