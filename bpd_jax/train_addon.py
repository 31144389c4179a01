"""Trains an add-on behind a frozen base, as gin says.

  python -m bpd_jax.train_addon --gin_file=MY.gin --gin_file=gin/tasks/jsonl_train.gin \\
      --gin_file=gin/runs/train_addon.gin --gin.CHECKPOINT="'DIR'" …

The same command goes on where a run was stopped or killed. The run's folder gets `addon/`,
ready for `Draft.addon`, and what a folder of `bpd_jax.train` has.
"""

from collections.abc import Sequence
import dataclasses
import logging
from typing import Any

import gin
import jax

from bpd_jax.addons.addon import abstract_own, Addon, init_own
from bpd_jax.addons.folder import make_addon, save_addon
from bpd_jax.data.batches import Batches, shares
from bpd_jax.data.datasets import CachedTask, check_task, open_task, task_fingerprint, TextTask
from bpd_jax.distillation import distil
from bpd_jax.environment import describe_device
from bpd_jax.errors import check_count, InputError
from bpd_jax.evaluation.validation import Evaluation, Validation
from bpd_jax.folders import array_path, local_path
from bpd_jax.generation import load
from bpd_jax.launch import print_error, read_gin, run
from bpd_jax.partitioning import Partitioning, single_device
from bpd_jax.terminal import plain_console
from bpd_jax.train import (
    check_schedule,
    check_tasks,
    drawn_examples,
    model_identity,
    run_vocabulary,
    write_records,
)
from bpd_jax.training.addon_step import AddonStep
from bpd_jax.training.loop import claim_run, open_run, Schedule, train_steps, TrainingError
from bpd_jax.training.metrics import Display
from bpd_jax.training.objective import Objective, TEXTS
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.states import HiddenStates, StateBatches, write_states
from bpd_jax.training.step import check_batch, Step

ADDON_FOLDER = "addon"


@gin.configurable(module="bpd_jax")
def train_addon(
    workdir: str,
    checkpoint: str,
    addon: Addon,
    objective: Objective,
    tasks: Sequence[CachedTask | TextTask],
    schedule: Schedule,
    *,
    rates: Sequence[float] | None = None,
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
  """Trains, from the run's own last state, else from the add-on's first parameters.

  Args:
    workdir: the run's folder, new or this run's.
    checkpoint: the base, a model folder.
    addon: what is trained.
    objective: what it learns from.
    tasks: what to train on.
    schedule: how long, and when to report, save and evaluate.
    rates: relative share of each task; by default their numbers of examples.
    batch_size: rows of a step, over all devices and microbatches.
    input_length: tokens of a row's inputs; longer ones are cut.
    target_length: tokens of a row's targets; longer ones are cut.
    is_packed: whether a row holds as many examples as fit; states are always packed.
    num_microbatches: parts in which a batch is gone through.
    optimizer: how parameters follow gradients.
    average_decay: of a moving average of parameters that is used in their place.
    validation: what evaluations look at; None for no evaluations.
    max_states: examples of each task that the base reads first, where the objective reads
      its states or outputs.
    seed: of parameters, order and what is drawn.
    partitioning: where base and add-on live; one device by default.

  Raises:
    InputError: naming the argument, before anything is compiled.
    TrainingError: where the loss is no longer finite.
  """
  partitioning = partitioning or single_device()
  array_path(workdir, "workdir")
  workdir = local_path(workdir)
  for name, value, kind in (("addon", addon, Addon), ("objective", objective, Objective)):
    if not isinstance(value, kind):
      raise InputError(f"train_addon.{name}", value, f"of a class derived from {kind.__name__}")
  if objective.texts not in TEXTS:
    raise InputError("objective.texts", objective.texts, f"one of {TEXTS}")
  if jax.process_count() > 1 and (objective.texts == "outputs" or objective.reads_states):
    raise InputError(
        "train_addon.objective", objective,
        "one of references that reads no states, where several processes train",
    )
  sizes = {"batch_size": batch_size, "input_length": input_length,
           "target_length": target_length, "max_states": max_states}
  for name, size in (sizes | {"num_microbatches": num_microbatches}).items():
    check_count(f"train_addon.{name}", size)
  check_count("train_addon.seed", seed, 0)
  check_batch(partitioning, batch_size, num_microbatches)
  read_tasks = [*check_tasks("train_addon.tasks", tasks)]
  if rates is not None:
    shares(rates, tasks)
  if validation is not None:
    read_tasks += check_tasks("Validation.tasks", validation.tasks)
  base = load(checkpoint, partitioning=partitioning)
  config, (words, _) = base.config, run_vocabulary(
      None, checkpoint, base.config.vocab_size, f"{checkpoint} vocabulary"
  )
  own = abstract_own(addon, config, partitioning)
  step = AddonStep(
      config, partitioning, optimizer, objective, addon, own, base.params,
      num_microbatches=num_microbatches, average_decay=average_decay,
  )
  check_schedule(schedule, validation)
  fingerprints = {task: task_fingerprint(task) for task in read_tasks}
  identity = {
      "addon": describe(addon), "objective": describe(objective), "base": base.fingerprint,
      "model": model_identity(config), "vocabulary": words.fingerprint,
      "tasks": [fingerprints[task] for task in tasks], "rates": rates, **sizes,
      "is_packed": is_packed, "num_microbatches": num_microbatches,
      "optimizer": optimizer.to_dict(), "average_decay": average_decay, "seed": seed,
  }
  console = plain_console()
  with open_run(workdir, identity) as has_begun:
    console.print(
        f"{'goes on in' if has_begun else 'new run in'} {workdir}; {describe_device()}, mesh "
        + " × ".join(f"{size} {name}" for name, size in partitioning.mesh.shape.items()),
        soft_wrap=True,
    )
    if not has_begun:
      for task in read_tasks:
        check_task(task, words, config.vocab_size, config.eos_id)
      claim_run(workdir, identity)
    write_records(str(workdir))
    open_all = lambda tasks: [
        open_task(
            task, words, workdir / "tasks", fingerprints[task], vocab_size=config.vocab_size,
            eos_id=config.eos_id,
        ) for task in tasks
    ]
    reader = Step(config, partitioning, Optimizer())
    lengths = {"input_length": input_length, "target_length": target_length}
    datasets = open_all(tasks)
    chosen = [drawn_examples(x, i, max_states, seed) for i, x in enumerate(datasets)]
    if objective.texts == "outputs":
      datasets = [
          distil(workdir / f"outputs/{i}", base, x, examples=chosen[i], batch_size=batch_size,
                 **lengths)
          for i, x in enumerate(datasets)
      ]
      chosen = [range(len(x.lengths)) for x in datasets]
    common = {"rates": rates, "batch_size": batch_size, "seed": seed, **config.special_ids}
    if objective.reads_states:
      for i, dataset in enumerate(datasets):
        if not (workdir / f"states/{i}").is_dir():
          write_states(
              workdir / f"states/{i}", reader, base.params, dataset, examples=chosen[i],
              batch_size=batch_size, **lengths,
          )
      states = [HiddenStates(workdir / f"states/{i}") for i in range(len(datasets))]
      batches = StateBatches(states, target_length=target_length, **common)
    else:
      batches = Batches(
          datasets, is_packed=is_packed, process_index=jax.process_index(),
          process_count=jax.process_count(), **common, **lengths,
      )
    evaluate = None
    if validation is not None:
      evaluate = Evaluation(
          step, open_all(validation.tasks), validation, batch_size, words, lengths,
          lambda params: (base, make_addon(addon, params, base).drafting or "greedy"),
          lambda batch: batch | (
              {"hidden": reader.hidden(base.params, batch)} if objective.reads_states else {}
          ),
      )
    outcome = train_steps(
        workdir, step, batches, schedule,
        lambda: init_own(addon, config, partitioning, jax.random.key(seed)), seed=seed,
        evaluate=evaluate, display=Display(schedule.num_steps, console),
    )
    params = step.averaged(outcome.state)
    if outcome.best_step is not None:
      params = outcome.best_params
    save_addon(
        workdir / ADDON_FOLDER, addon, params, base, recipe=identity, may_replace=True
    )
    console.print(f"{workdir / ADDON_FOLDER} holds step {outcome.best_step or outcome.step:,}")


def describe(part: Any) -> dict[str, Any]:
  """Kind and fields of an add-on or objective, ready for JSON."""
  kind = type(part)
  return {"kind": f"{kind.__module__}:{kind.__qualname__}", **dataclasses.asdict(part)}


def main(argv: Sequence[str]) -> int:
  """Trains as gin says; see `--help`."""
  read_gin(argv, "python -m bpd_jax.train_addon", __doc__.splitlines()[0], train_addon)
  # Orbax logs whole tracebacks of what it raises as well, and is said in one line.
  logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR)
  try:
    train_addon()
  except TrainingError as error:
    print_error(error)
    return 1
  return 0


if __name__ == "__main__":
  run(main)
