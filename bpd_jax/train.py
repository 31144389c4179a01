"""Trains a model with parallel heads, or the heads alone, as gin says.

  python -m bpd_jax.train --gin_file=gin/runs/train_tiny.gin \\
      --gin.WORKDIR="'runs/tiny'" --gin.STEPS=200

The same command goes on where a run was stopped or killed. The run's folder
gets `model/`, ready for evaluate and decode; `checkpoints/`; `metrics.jsonl` and
`tensorboard/`; `config.gin`, the operative configuration; `environment.json`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np

from bpd_jax.checkpoints import describe, load_config, save_model, start_from
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
from bpd_jax.distillation import distil
from bpd_jax.environment import describe_device, git_revision, versions
from bpd_jax.errors import check_count, InputError
from bpd_jax.evaluation.validation import Evaluation, metric_names, Validation
from bpd_jax.folders import array_path, contents_fingerprint, local_path, write_object
from bpd_jax.generation import Generator
from bpd_jax.launch import print_error, read_gin, run
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import Partitioning, single_device
from bpd_jax.terminal import plain_console
from bpd_jax.training.loop import claim_run, open_run, Schedule, train_steps, TrainingError
from bpd_jax.training.loss import Loss
from bpd_jax.training.metrics import Display
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.states import HiddenStates, StateBatches, write_states
from bpd_jax.training.step import check_batch, MODES, Step
from bpd_jax.vocabulary import open_vocabulary, Vocabulary, vocabulary_path

MODEL_FOLDER = "model"


@gin.configurable(module="bpd_jax")
def train(
    workdir: str,
    tasks: Sequence[CachedTask | TextTask],
    schedule: Schedule,
    *,
    config: ModelConfig | None = None,
    checkpoint: str | None = None,
    block_size: int | None = None,
    dropout_rate: float | None = None,
    has_fresh_heads: bool = False,
    vocabulary: str | None = None,
    mode: str = "joint",
    rates: Sequence[float] | None = None,
    output_rates: Sequence[float] | None = None,
    batch_size: int = 32,
    input_length: int = 256,
    target_length: int = 128,
    is_packed: bool = False,
    num_microbatches: int = 1,
    optimizer: Optimizer = Optimizer(),
    loss: Loss = Loss(),
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
    block_size: h, in place of the checkpoint's; heads that it lacks start fresh.
    dropout_rate: in place of the checkpoint's.
    has_fresh_heads: whether the checkpoint's parallel heads are dropped.
    vocabulary: a SentencePiece model, or a tokenizer_config.json of ByT5; that of
      the checkpoint by default.
    mode: "joint" trains everything; "heads_only" the parallel heads behind the
      frozen base model; "distill" likewise, on the base's own greedy outputs.
    rates: relative share of each task; by default their numbers of examples.
    output_rates: beside `rates`, the share of the checkpoint's own greedy outputs on
      each task's inputs, from which the model learns not to repeat itself; see
      `Loss.unlikelihood`. By default there are none.
    batch_size: rows of a step, over all devices and microbatches.
    input_length: tokens of a row's inputs; longer ones are cut.
    target_length: tokens of a row's targets; longer ones are cut.
    is_packed: whether a row holds as many examples as fit.
    num_microbatches: parts in which a batch is gone through.
    optimizer: how parameters follow gradients.
    loss: what is minimised.
    average_decay: of a moving average of parameters that is used in their place.
    validation: what evaluations look at; None for no evaluations.
    max_states: examples of each task that the checkpoint reads first: for its decoder
      states where the base is frozen, else for its own outputs.
    seed: of parameters, order and dropout.
    partitioning: where the model lives; one device by default.

  Raises:
    InputError: naming the argument, before anything is compiled.
    TrainingError: where the loss is no longer finite.
  """
  # --- what there is, and whether it fits together ---
  partitioning = partitioning or single_device()
  array_path(workdir, "workdir")
  workdir = str(local_path(workdir))
  if mode not in MODES:
    raise InputError("train.mode", mode, f"one of {tuple(MODES)}")
  if (config is None) == (checkpoint is None):
    raise InputError(
        "train.config", "both" if config else None, "a config, or else a checkpoint to start from"
    )
  is_frozen = mode != "joint"
  if is_frozen and checkpoint is None:
    raise InputError("train.checkpoint", None, f"a model folder in mode {mode!r}")
  if output_rates is not None:
    check_output_rates(output_rates, rates, mode, checkpoint, loss)
  if mode == "distill" and jax.process_count() > 1:
    raise InputError("train.mode", mode, "another one where several processes train")
  for name, size in (
      ("batch_size", batch_size), ("input_length", input_length),
      ("target_length", target_length), ("num_microbatches", num_microbatches),
      ("max_states", max_states),
  ):
    check_count(f"train.{name}", size)
  check_count("train.seed", seed, 0)
  if checkpoint is not None:
    config = load_config(checkpoint)
    changes = {"block_size": block_size, "dropout_rate": dropout_rate}
    config = config.replace(**{k: v for k, v in changes.items() if v is not None})
  words, vocabulary = run_vocabulary(vocabulary, checkpoint, config.vocab_size)
  check_batch(partitioning, batch_size, num_microbatches)
  step = Step(
      config, partitioning, optimizer, loss, mode=mode, num_microbatches=num_microbatches,
      average_decay=average_decay,
  )
  read_tasks = [*check_tasks("train.tasks", tasks)]
  if rates is not None:
    shares(rates, tasks)
  if validation is not None:
    read_tasks += check_tasks("Validation.tasks", validation.tasks)
  check_schedule(schedule, validation, config.block_size)
  fingerprints = {task: task_fingerprint(task) for task in read_tasks}
  identity = {
      "model": model_identity(config),
      # Where it lies doesn't count, nor when it was copied there.
      "checkpoint": None if checkpoint is None else contents_fingerprint(checkpoint),
      "has_fresh_heads": has_fresh_heads,
      "mode": mode, "rates": rates, "batch_size": batch_size, "input_length": input_length,
      "target_length": target_length, "is_packed": is_packed,
      "num_microbatches": num_microbatches, "optimizer": optimizer.to_dict(),
      "output_rates": output_rates, "loss": dataclasses.asdict(loss),
      "average_decay": average_decay,
      "max_states": max_states if is_frozen or output_rates else None, "seed": seed,
      "vocabulary": words.fingerprint,
      "tasks": [fingerprints[task] for task in tasks],
  }
  console = plain_console()
  say = lambda text: console.print(text, soft_wrap=True)

  @functools.cache
  def initial_params() -> Any:
    if checkpoint is None:
      params = init_params(config, partitioning, jax.random.key(seed))
      say("parameters start from scratch")
    else:
      params, matched = start_from(
          checkpoint, config, partitioning, has_fresh_heads=has_fresh_heads, seed=seed
      )
      say(matched)
    say(describe(config, params))
    say(place_table(step))
    return params

  def take_params() -> Any:
    params = initial_params()
    # The state takes them over; there would be two copies of a large model else.
    initial_params.cache_clear()
    return params

  with open_run(workdir, identity) as has_begun:
    say(f"{'goes on in' if has_begun else 'new run in'} {workdir}; {describe_device()}, mesh "
        + " × ".join(f"{size} {name}" for name, size in partitioning.mesh.shape.items()))
    if not has_begun:
      # All that can be wrong with what is read is found before the folder is claimed.
      for task in read_tasks:
        check_task(task, words, config.vocab_size, config.eos_id)
      if checkpoint is not None:
        initial_params()
      claim_run(workdir, identity)
    write_records(workdir)

    # --- data ---
    open_all = lambda tasks: [
        open_task(
            task, words, Path(workdir) / "tasks", fingerprints[task],
            vocab_size=config.vocab_size, eos_id=config.eos_id,
        ) for task in tasks
    ]
    datasets = open_all(tasks)
    lengths = {"input_length": input_length, "target_length": target_length}
    if is_frozen and jax.process_count() == 1:
      states = cached_states(
          Path(workdir) / "states", step, initial_params, datasets, mode, words, max_states,
          batch_size, lengths, seed,
      )
      batches = StateBatches(
          states, rates=rates, batch_size=batch_size, target_length=target_length, seed=seed,
          **config.special_ids,
      )
    else:
      outputs = []
      if output_rates is not None:
        outputs = own_outputs(
            Path(workdir) / "outputs", Generator(config, initial_params(), partitioning, words),
            datasets, output_rates, max_states, batch_size, lengths, seed,
        )
        rates = [*rates, *(rate for rate in output_rates if rate)]
      batches = Batches(
          [*datasets, *outputs], num_outputs=len(outputs), rates=rates, batch_size=batch_size,
          is_packed=is_packed, seed=seed, **config.special_ids,
          process_index=jax.process_index(), process_count=jax.process_count(), **lengths,
      )
    say(f"an epoch is {batches.steps_per_epoch():,.1f} steps of {batch_size} rows")

    # --- steps ---
    evaluate = None
    if validation is not None:
      evaluate = Evaluation(
          step, open_all(validation.tasks), validation, batch_size, words, lengths
      )
    outcome = train_steps(
        workdir, step, batches, schedule, take_params, seed=seed, evaluate=evaluate,
        display=Display(schedule.num_steps, console),
    )

    # --- the model ---
    params, which = step.averaged(outcome.state), f"step {outcome.step:,}"
    if outcome.best_step is not None:
      params, which = outcome.best_params, f"step {outcome.best_step:,}, the best"
    folder = Path(workdir) / MODEL_FOLDER
    save_model(folder, config, params, vocabulary, may_replace=True)
    say(f"{folder} holds {which}")


def run_vocabulary(
    path: str | None, checkpoint: str | None, vocab_size: int, field: str = "train.vocabulary"
) -> tuple[Vocabulary, str | Path]:
  """The run's vocabulary and its file.

  Raises:
    InputError: where there is none, it doesn't fit, or the checkpoint has another.
  """
  own = None if checkpoint is None else vocabulary_path(checkpoint)
  if path is None and own is None:
    raise InputError(field, None, "a vocabulary file")
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
    output_rates: Sequence[float], rates: Sequence[float] | None, mode: str,
    checkpoint: str | None, loss: Loss,
) -> None:
  """Raises InputError where there are no own outputs, or nothing is learned from them."""
  if mode != "joint" or jax.process_count() > 1:
    raise InputError(
        "train.output_rates", list(output_rates), "None but in mode 'joint', in one process"
    )
  if rates is None or len(output_rates) != len(rates) or min(output_rates) < 0:
    raise InputError(
        "train.output_rates", list(output_rates), "numbers from 0, as many as train.rates"
    )
  if checkpoint is None:
    raise InputError("train.checkpoint", None, "a model folder with output_rates")
  if not loss.unlikelihood:
    raise InputError("Loss.unlikelihood", loss.unlikelihood, "above 0 with output_rates")


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


def place_table(step: Step) -> str:
  """Parameters with their shapes and places, one a line, where there is a mesh."""
  if step.partitioning.mesh.size == 1:
    return "all on one device"
  leaves = jax.tree_util.tree_leaves_with_path(step.abstract_state.params)
  return "\n".join(
      f"{jax.tree_util.keystr(path, simple=True, separator='/'):60} {str(leaf.shape):22} "
      f"{leaf.sharding.spec}  {leaf.size * leaf.dtype.itemsize / 1e6:,.1f} MB"
      for path, leaf in leaves
  )


def drawn_examples(dataset: Dataset, number: int, most: int, seed: int) -> list[int]:
  """The examples of the run's dataset of this number that its checkpoint reads first."""
  count = len(dataset.lengths)
  return np.random.default_rng([seed, number]).permutation(count)[:most].tolist()


def own_outputs(
    folder: Path, generator: Generator, datasets: Sequence[Dataset], rates: Sequence[float],
    max_examples: int, batch_size: int, lengths: Mapping[str, int], seed: int,
) -> list[Dataset]:
  """The checkpoint's outputs on each dataset with a rate above 0, decoded where they aren't."""
  return [
      distil(
          folder / str(number), generator, dataset, batch_size=batch_size,
          examples=drawn_examples(dataset, number, max_examples, seed), **lengths,
      )
      for number, (dataset, rate) in enumerate(zip(datasets, rates)) if rate
  ]


def cached_states(
    folder: Path, step: Step, initial_params, datasets: Sequence[Dataset], mode: str,
    vocabulary: Vocabulary, max_states: int, batch_size: int, lengths: Mapping[str, int],
    seed: int,
) -> list[HiddenStates]:
  """The frozen base's states over each task, made where they aren't there yet."""
  states = []
  for number, dataset in enumerate(datasets):
    path = folder / str(number)
    if not path.is_dir():
      examples = drawn_examples(dataset, number, max_states, seed)
      params = initial_params()
      if mode == "distill":
        generator = Generator(step.config, params, step.partitioning, vocabulary)
        dataset = distil(
            folder / f"distilled_{number}", generator, dataset, examples=examples,
            batch_size=batch_size, **lengths,
        )
        examples = range(len(examples))
      write_states(
          path, step, params, dataset, examples=examples, batch_size=batch_size, **lengths
      )
    states.append(HiddenStates(path))
  return states


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
