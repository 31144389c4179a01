"""Trains a base model, an add-on behind one, or both together, as gin says.

  python -m bpd_jax.train --gin_file=gin/runs/train_tiny.gin \\
      --gin.WORKDIR="'runs/tiny'" --gin.STEPS=200

The same command goes on where a run was stopped or killed. The run's folder gets
`model/`, ready for evaluate and decode, or where the base was frozen `addon/`, ready for
`Draft.addon`; `checkpoints/`; `metrics.jsonl` and `tensorboard/`; `config.gin`, the
operative configuration; `environment.json`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np

from bpd_jax.addons.addon import Addon, make_addon
from bpd_jax.addons.folder import (
    addon_name,
    kind_of,
    load_addon,
    own_addon,
    save_addon,
    save_model_with,
)
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import describe, leaf_shapes, load_config, PARAMS_FOLDER
from bpd_jax.data.batches import Batches, Dataset, shares
from bpd_jax.data.datasets import (
    CachedTask,
    check_task,
    open_task,
    task_fingerprint,
    task_label,
    TextTask,
)
from bpd_jax.data.rows import shipped_vocabulary
from bpd_jax.decoding.types import Drafting
from bpd_jax.distillation import distil
from bpd_jax.environment import describe_device, git_revision, versions
from bpd_jax.errors import check_count, InputError
from bpd_jax.evaluation.validation import Evaluation, metric_names, Validation
from bpd_jax.folders import array_path, contents_fingerprint, local_path, write_object
from bpd_jax.generation import Generator, load
from bpd_jax.launch import print_error, read_gin, run
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import EncoderDecoder, init_params
from bpd_jax.partitioning import Partitioning, single_device
from bpd_jax.terminal import plain_console
from bpd_jax.training.loop import (
    BatchSource,
    claim_run,
    open_run,
    Schedule,
    train_steps,
    TrainingError,
)
from bpd_jax.training.metrics import Display
from bpd_jax.training.objective import Objective, TEXTS
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.states import HiddenStates, StateBatches, write_states
from bpd_jax.training.step import check_batch, Step
from bpd_jax.vocabulary import open_vocabulary, Vocabulary, vocabulary_path

MODEL_FOLDER = "model"
ADDON_FOLDER = "addon"


@gin.configurable(module="bpd_jax")
def train(
    workdir: str,
    tasks: Sequence[CachedTask | TextTask],
    schedule: Schedule,
    *,
    config: ModelConfig | None = None,
    checkpoint: str | None = None,
    addon: Addon,
    objective: Objective,
    has_fresh_addon: bool = False,
    dropout_rate: float | None = None,
    vocabulary: str | None = None,
    rates: Sequence[float] | None = None,
    output_rates: Sequence[float] | None = None,
    batch_size: int = 32,
    input_length: int = 256,
    target_length: int = 128,
    is_packed: bool = False,
    num_microbatches: int = 1,
    optimizer: Optimizer = Optimizer(),
    average_decay: float | None = None,
    validation: Validation | None = None,
    max_states: int = 20_000,
    seed: int = 0,
    partitioning: Partitioning | None = None,
) -> None:
  """Trains, from the run's own last state, else a checkpoint, else from scratch.

  Args:
    workdir: the run's folder, new or this run's.
    tasks: what to train on.
    schedule: how long, and when to report, save and evaluate.
    config: of a model that starts from scratch.
    checkpoint: a model folder to start from, in place of `config`.
    addon: what is trained beside the base or behind it; `Heads(1)` has no parameters.
    objective: what is minimised, and whether the base learns as well.
    has_fresh_addon: whether an add-on of this kind in the checkpoint is left out; else
      it is what the add-on starts from.
    dropout_rate: in place of the checkpoint's.
    vocabulary: a SentencePiece model, or a tokenizer_config.json of ByT5; that of
      the checkpoint by default.
    rates: relative share of each task; by default their numbers of examples.
    output_rates: beside `rates`, the share of the checkpoint's own greedy outputs on
      each task's inputs, from which the model learns not to repeat itself; see
      `Loss.unlikelihood`. By default there are none.
    batch_size: rows of a step, over all devices and microbatches.
    input_length: tokens of a row's inputs; longer ones are cut.
    target_length: tokens of a row's targets; longer ones are cut.
    is_packed: whether a row holds as many examples as fit; states from disk always are.
    num_microbatches: parts in which a batch is gone through.
    optimizer: how parameters follow gradients.
    average_decay: of a moving average of parameters that is used in their place.
    validation: what evaluations look at; None for no evaluations.
    max_states: examples of each task that the checkpoint reads first: for its decoder
      states where the objective reads those, else for its own outputs.
    seed: of parameters, order and dropout.
    partitioning: where the model lives; one device by default.

  Raises:
    InputError: naming the argument, before anything is compiled.
    TrainingError: where the loss is no longer finite.
  """
  # --- what there is, and whether it fits together ---
  partitioning = partitioning or single_device()
  array_path(workdir, "workdir")
  workdir = local_path(workdir)
  sizes = {"batch_size": batch_size, "input_length": input_length,
           "target_length": target_length, "num_microbatches": num_microbatches}
  for name, size in (sizes | {"max_states": max_states}).items():
    check_count(f"train.{name}", size)
  check_count("train.seed", seed, 0)
  if (config is None) == (checkpoint is None):
    raise InputError(
        "train.config", "both" if config else None, "a config, or else a checkpoint to start from"
    )
  check_parts(addon, objective, checkpoint)
  if output_rates is not None:
    check_output_rates(output_rates, rates, objective, checkpoint)
  if checkpoint is not None:
    config = load_config(checkpoint)
  if dropout_rate is not None:
    config = config.replace(dropout_rate=dropout_rate)
  words, vocabulary = run_vocabulary(vocabulary, checkpoint, config.vocab_size)
  check_batch(partitioning, batch_size, num_microbatches)
  step = Step(
      config, partitioning, optimizer, objective, addon, num_microbatches=num_microbatches,
      average_decay=average_decay,
  )
  read_tasks = [*check_tasks("train.tasks", tasks)]
  if rates is not None:
    shares(rates, tasks)
  if validation is not None:
    read_tasks += check_tasks("Validation.tasks", validation.tasks)
  check_schedule(
      schedule, validation, addon.block_size if isinstance(addon, Heads) else None
  )
  fingerprints = {task: task_fingerprint(task) for task in read_tasks}
  reads_base = objective.texts == "outputs" or objective.reads_states or output_rates
  identity = {
      "model": model_identity(config),
      # Where it lies doesn't count, nor when it was copied there, nor what came beside it.
      "checkpoint": None if checkpoint is None else contents_fingerprint(
          local_path(checkpoint, "model folder") / PARAMS_FOLDER
      ),
      "addon": fields_of(addon), "objective": fields_of(objective),
      "has_fresh_addon": has_fresh_addon, "rates": rates, **sizes, "is_packed": is_packed,
      "optimizer": optimizer.to_dict(), "output_rates": output_rates,
      "average_decay": average_decay, "max_states": max_states if reads_base else None,
      "seed": seed, "vocabulary": words.fingerprint,
      "tasks": [fingerprints[task] for task in tasks],
  }
  console = plain_console()
  say = lambda text: console.print(text, soft_wrap=True)

  @functools.cache
  def base() -> Generator:
    """The model to start from, or to stay behind."""
    if checkpoint is None:
      params = init_params(config, partitioning, jax.random.key(seed))
      return Generator(config, params, partitioning, words)
    found = load(checkpoint, partitioning=partitioning)
    return Generator(
        config, found.params, partitioning, words, lambda: found.fingerprint, found.own_heads
    )

  @functools.cache
  def first_params() -> dict[str, Any]:
    """What is trained, as it is to begin with."""
    own, said = begin_addon(addon, base(), checkpoint, has_fresh_addon, seed)
    say(f"base: {'from scratch' if checkpoint is None else f'from {checkpoint}'}; {said}")
    params = {"base": base().params, "own": own}
    say(describe(params, addon.describe(config)))
    say(place_table(partitioning, params))
    return params if objective.trains_base else {"own": own}

  def take_params() -> dict[str, Any]:
    params = first_params()
    # The state takes their place; there would be two copies of a large model else.
    first_params.cache_clear()
    if objective.trains_base:
      base.cache_clear()
    return params

  with open_run(workdir, identity) as has_begun:
    say(f"{'goes on in' if has_begun else 'new run in'} {workdir}; {describe_device()}, mesh "
        + " × ".join(f"{size} {name}" for name, size in partitioning.mesh.shape.items()))
    if not has_begun:
      # All that can be wrong with what is read is found before the folder is claimed.
      for task in read_tasks:
        check_task(task, words, config.vocab_size, config.eos_id)
      if checkpoint is not None:
        first_params()
      claim_run(workdir, identity)
    write_records(str(workdir))

    # --- data ---
    open_all = lambda tasks: [
        open_task(
            task, words, workdir / "tasks", fingerprints[task],
            vocab_size=config.vocab_size, eos_id=config.eos_id,
        ) for task in tasks
    ]
    lengths = {"input_length": input_length, "target_length": target_length}
    batches = make_batches(
        workdir, open_all(tasks), base, objective, rates=rates,
        output_rates=output_rates, max_states=max_states, batch_size=batch_size,
        is_packed=is_packed, seed=seed, lengths=lengths, config=config,
    )
    if has_begun and objective.trains_base:
      base.cache_clear()  # The state of the run takes its place.
    say(f"an epoch is {batches.steps_per_epoch():,.1f} steps of {batch_size} rows")

    # --- steps ---
    frozen = None
    if not objective.trains_base:
      # Without what only reading texts needed: its view, its own heads.
      frozen = Generator(
          config, base().params, partitioning, words, fingerprint=base().fingerprint
      )
      base.cache_clear()

    def decoder(params: Any) -> tuple[Generator, Drafting | str]:
      behind = frozen or Generator(config, params["base"], partitioning, words)
      return behind, make_addon(addon, params["own"], behind).drafting or "greedy"

    frozen_params = None if frozen is None else frozen.params
    evaluate = None
    if validation is not None:
      evaluate = Evaluation(
          step, open_all(validation.tasks), validation, batch_size, lengths, decoder,
          frozen_params,
      )
    outcome = train_steps(
        workdir, step, batches, schedule, take_params, base=frozen_params, seed=seed,
        evaluate=evaluate, display=Display(schedule.num_steps, console),
    )

    # --- what was learned ---
    params, which = step.averaged(outcome.state), f"step {outcome.step:,}"
    if outcome.best_step is not None:
      params, which = outcome.best_params, f"step {outcome.best_step:,}, the best"
    if frozen is None:
      folder = workdir / MODEL_FOLDER
      save_model_with(
          folder, config, params["base"], vocabulary, addon, params["own"], recipe=identity,
          may_replace=True,
      )
    else:
      folder = workdir / ADDON_FOLDER
      save_addon(folder, addon, params["own"], frozen, recipe=identity, may_replace=True)
    say(f"{folder} holds {which}")


def check_parts(addon: Addon, objective: Objective, checkpoint: str | None) -> None:
  """Raises InputError where there is nothing of what is to be trained, or to be read."""
  for name, value, kind in (("addon", addon, Addon), ("objective", objective, Objective)):
    if not (isinstance(value, kind) and dataclasses.is_dataclass(value)):
      raise InputError(
          f"train.{name}", value, f"of a class derived from {kind.__name__}, a dataclass"
      )
  kind_of(addon)
  addon_name(addon)
  if objective.texts not in TEXTS:
    raise InputError("objective.texts", objective.texts, f"one of {TEXTS}")
  if objective.trains_base and objective.reads_states:
    raise InputError("objective.reads_states", True, "False where the base is trained")
  if checkpoint is None and not (objective.trains_base and objective.texts == "references"):
    raise InputError(
        "train.checkpoint", None, "a model folder, where the base isn't trained or is to be read"
    )
  if jax.process_count() > 1 and objective.texts == "outputs":
    raise InputError(
        "objective.texts", "outputs", "references where several processes train"
    )


def begin_addon(
    addon: Addon, base: Generator, checkpoint: str | None, is_fresh: bool, seed: int
) -> tuple[Any, str]:
  """An add-on's parameters to start from, and a line on where they are from.

  Raises:
    InputError: where the checkpoint has an add-on of this kind and other sizes.
  """
  name = addon_name(addon)
  found, own = None, {}
  if checkpoint is not None and not is_fresh:
    if isinstance(addon, Heads):
      found, own = base.own_heads
    elif (folder := own_addon(checkpoint, name)).is_dir():
      found, own = load_addon(folder, base)
  if not jax.tree.leaves(own):
    own = addon.begin(base.config, base.partitioning, jax.random.key(seed))
    return own, f"{name}: {'new' if jax.tree.leaves(own) else 'none'}"
  wanted = addon.abstract(base.config, base.partitioning)
  if type(found) is not type(addon) or leaf_shapes(wanted) != leaf_shapes(own):
    raise InputError(
        "train.addon", addon, f"{found}, as in {checkpoint}, or FRESH (train.has_fresh_addon)"
    )
  return own, f"{name}: from {checkpoint}"


def fields_of(part: Any) -> dict[str, Any]:
  """Kind and fields of an add-on or objective, ready for JSON."""
  kind = type(part)
  return {"kind": f"{kind.__module__}:{kind.__qualname__}", "config": dataclasses.asdict(part)}


def make_batches(
    workdir: Path, datasets: Sequence[Dataset], base: Callable[[], Generator],
    objective: Objective, *,
    rates: Sequence[float] | None, output_rates: Sequence[float] | None, max_states: int,
    batch_size: int, is_packed: bool, seed: int, lengths: Mapping[str, int],
    config: ModelConfig,
) -> BatchSource:
  """What steps read; of the base's outputs and states what isn't there yet is made.

  Args:
    workdir: the run's, where those lie.
    datasets: of the tasks.
    base: called for the checkpoint's model where it is read.
    objective: what is minimised.
    rates, output_rates, max_states, batch_size, is_packed, seed: see `train`.
    lengths: `input_length` and `target_length`.
    config: of the model.
  """
  sizes = {"batch_size": batch_size, **lengths}

  def outputs_of(number: int) -> Dataset:
    return distil(
        workdir / "outputs" / str(number), base(), datasets[number],
        examples=drawn_examples(datasets[number], number, max_states, seed), **sizes,
    )

  def states_of(number: int) -> HiddenStates:
    folder = workdir / "states" / str(number)
    if folder.is_dir():
      return HiddenStates(folder)
    if objective.texts == "outputs":
      dataset = outputs_of(number)
      examples = range(len(dataset.lengths))
    else:
      dataset = datasets[number]
      examples = drawn_examples(dataset, number, max_states, seed)
    model = EncoderDecoder(config, base().partitioning)
    return write_states(folder, model, base().params, dataset, examples=examples, **sizes)

  common = {"batch_size": batch_size, "seed": seed, **config.special_ids}
  numbers = range(len(datasets))
  if objective.reads_states and jax.process_count() == 1:
    return StateBatches(
        [states_of(number) for number in numbers], rates=rates,
        target_length=lengths["target_length"], **common,
    )
  outputs = []
  if objective.texts == "outputs":
    datasets = [outputs_of(number) for number in numbers]
  elif output_rates is not None:
    outputs = [outputs_of(number) for number in numbers if output_rates[number]]
    rates = [*rates, *(rate for rate in output_rates if rate)]
  return Batches(
      [*datasets, *outputs], num_outputs=len(outputs), is_packed=is_packed,
      rates=rates, process_index=jax.process_index(), process_count=jax.process_count(),
      **common, **lengths,
  )


def run_vocabulary(
    path: str | None, checkpoint: str | None, vocab_size: int
) -> tuple[Vocabulary, str | Path]:
  """The run's vocabulary and its file.

  Raises:
    InputError: where there is none, it doesn't fit, or the checkpoint has another.
  """
  own = None if checkpoint is None else vocabulary_path(checkpoint)
  if path is None and own is None:
    raise InputError("train.vocabulary", None, "a vocabulary file")
  path = own if path is None else shipped_vocabulary(path)
  words = open_vocabulary(path, vocab_size, has_sentinels=True)
  if own is not None:
    expected = open_vocabulary(own, vocab_size).fingerprint
    if words.fingerprint != expected:
      raise InputError(
          "train.vocabulary", f"{path}, {words.fingerprint}",
          f"None, or {expected}, the checkpoint's",
      )
  return words, path


def model_identity(config: ModelConfig) -> dict[str, Any]:
  """What of a config decides what is learned; alike before there was a `start_id`."""
  # But for what only says how it is compiled.
  fields = config.replace(scan_unroll=1).to_dict()
  if config.start_id == config.pad_id:
    fields.pop("start_id")
  return fields


def check_output_rates(
    output_rates: Sequence[float], rates: Sequence[float] | None, objective: Objective,
    checkpoint: str | None,
) -> None:
  """Raises InputError where there are no own outputs, or nothing is learned from them."""
  if not objective.trains_base or jax.process_count() > 1:
    raise InputError(
        "train.output_rates", list(output_rates), "None but where a base is trained in one process"
    )
  if rates is None or len(output_rates) != len(rates) or min(output_rates) < 0:
    raise InputError(
        "train.output_rates", list(output_rates), "numbers from 0, as many as train.rates"
    )
  if checkpoint is None:
    raise InputError("train.checkpoint", None, "a model folder with output_rates")
  if not objective.unlearns_loops:
    raise InputError(
        "train.objective", objective, "one that unlearns loops, as Loss with unlikelihood above 0"
    )


def check_schedule(
    schedule: Schedule, validation: Validation | None, block_size: int | None = None
) -> None:
  """Raises InputError where evaluations are asked for that there won't be.

  Without a block size any metric may come.
  """
  if validation is None:
    for name in ("evaluate_every", "best_metric"):
      if getattr(schedule, name):
        raise InputError(f"Schedule.{name}", getattr(schedule, name), "none without validation")
    return
  if block_size is None:
    return
  names = metric_names(validation, block_size)
  if schedule.best_metric is not None and schedule.best_metric not in names:
    raise InputError("Schedule.best_metric", schedule.best_metric, f"one of {names}")


def check_tasks(name: str, tasks: Sequence[Any]) -> Sequence[Any]:
  """The tasks; InputError where there are none, or two datasets of one name."""
  labels = [task_label(task) for task in tasks]
  if not labels or len(set(labels)) < len(labels):
    raise InputError(name, labels, "at least one task, with names that differ")
  for label in labels:
    if "/" in label:
      raise InputError(name, label, "names without /")
  return tasks


def write_records(workdir: str) -> None:
  """Writes what the run was configured with and made with."""
  folder = Path(workdir)
  try:
    (folder / "config.gin").write_text(gin.operative_config_str(), encoding="utf-8")
    write_object(folder / "environment.json", {
        "git_revision": git_revision(), "versions": versions(), "device": describe_device(),
    })
  except OSError as error:
    raise InputError(
        "workdir", workdir, f"a path that can be written ({error.strerror})"
    ) from error


def place_table(partitioning: Partitioning, params: Any) -> str:
  """Parameters with their shapes and places, one a line, where there is a mesh."""
  if partitioning.mesh.size == 1:
    return "all on one device"
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return "\n".join(
      f"{jax.tree_util.keystr(path, simple=True, separator='/'):60} {str(leaf.shape):22} "
      f"{leaf.sharding.spec}  {leaf.size * leaf.dtype.itemsize / 1e6:,.1f} MB"
      for path, leaf in leaves
  )


def drawn_examples(dataset: Dataset, number: int, most: int, seed: int) -> list[int]:
  """The examples of the run's dataset of this number that its checkpoint reads first."""
  count = len(dataset.lengths)
  return np.random.default_rng([seed, number]).permutation(count)[:most].tolist()


def main(argv: Sequence[str]) -> int:
  """Trains as gin says; see `--help`."""
  read_gin(argv, "python -m bpd_jax.train", __doc__.splitlines()[0], train)
  # Orbax logs whole tracebacks of what it raises as well, and is said in one line.
  logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR)
  try:
    train()
  except TrainingError as error:
    print_error(error)
    return 1
  return 0


if __name__ == "__main__":
  run(main)
