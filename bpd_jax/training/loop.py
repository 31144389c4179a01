"""The loop of a run: batches in, states and figures out, until the last step.

What a run has done is a function of its settings and its step, so that one that
was killed, at whatever moment, ends where an undisturbed one ends.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import math
import os
from pathlib import Path
import signal
import threading
import time
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.errors import check_count, InputError
from bpd_jax.folders import (
    check_identity,
    held,
    new_file,
    partial_file,
    read_object,
    write_object,
)
from bpd_jax.training.checkpointing import Checkpoints
from bpd_jax.training.loss import head_losses
from bpd_jax.training.metrics import Display, MetricWriter, read_metrics
from bpd_jax.training.step import place_batch, Step, TrainState

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
# Names of training's figures begin with it; the others are an evaluation's.
TRAIN = "train/"
# The evaluation's means over its tasks.
VALIDATION = "validation/"
# Steps whose figures wait on the device before they are looked at.
LATE_STEPS = 1


class TrainingError(RuntimeError):
  """A run can't go on; the message says at which step, and what is left of it."""


class BatchSource(Protocol):
  """Batches by step, as `bpd_jax.data.batches.Batches` has them."""

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This process's rows."""

  def steps_per_epoch(self) -> float:
    """Steps in which every example comes once."""


# (parameters, step) -> figures by name.
Evaluate = Callable[[Any, int], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long a run is, and what happens in between. None of it changes what is learned.

  Attributes:
    num_steps: of the run; a longer run goes on from a shorter one.
    log_every: steps between figures of training.
    save_every: steps between saved states.
    evaluate_every: steps between evaluations, each of which saves a state; there
      is one at the end anyway, and 0 is for no others.
    best_metric: of the evaluation, decides which state is kept besides the last.
    is_higher_better: of the metric.
  """

  num_steps: int
  log_every: int = 50
  save_every: int = 500
  evaluate_every: int = 0
  best_metric: str | None = None
  is_higher_better: bool = False

  def __post_init__(self):
    for name in ("num_steps", "log_every", "save_every"):
      check_count(f"Schedule.{name}", getattr(self, name))
    check_count("Schedule.evaluate_every", self.evaluate_every, 0)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    state: the last one.
    step: steps done.
    is_complete: whether all steps are done; False after SIGTERM.
    best_step: of the best state, None where none is kept.
    best_params: its parameters, None likewise.
  """

  state: TrainState
  step: int
  is_complete: bool
  best_step: int | None
  best_params: Any


@contextlib.contextmanager
def open_run(workdir: str | os.PathLike, identity: Mapping[str, Any]) -> Iterator[bool]:
  """Holds a run's folder, having checked that it is this run's or still nobody's.

  Until `claim_run` makes it this run's, nothing is left of what isn't well.

  Args:
    workdir: the run's folder.
    identity: all that decides what is learned, ready for JSON.

  Yields:
    Whether the run has begun before.

  Raises:
    InputError: naming the field in which the folder's run differs, or where the
      folder holds something else, is in use, or can't be written.
  """
  if jax.process_index() > 0:
    yield (Path(workdir) / RUN_FILE).is_file()
    return
  folder = Path(workdir)
  is_new, has_begun = not os.path.lexists(folder), (folder / RUN_FILE).is_file()
  leftovers = {LOCK_FILE, partial_file(folder / RUN_FILE).name}
  if has_begun:
    check_identity(
        f"workdir {folder}", read_object(folder / RUN_FILE), identity,
        "of the run that the folder holds",
    )
  elif not is_new and (not folder.is_dir() or {*os.listdir(folder)} - leftovers):
    raise InputError("workdir", str(folder), f"a new folder, or one with a {RUN_FILE}")
  with contextlib.ExitStack() as stack:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      stack.enter_context(held(folder / LOCK_FILE, "workdir", folder))
    except OSError as error:
      raise _unwritable(folder, error) from error
    try:
      yield has_begun
    finally:
      if not (folder / RUN_FILE).is_file():
        for name in leftovers:
          (folder / name).unlink(missing_ok=True)
        if is_new:
          with contextlib.suppress(OSError):  # Somebody else may have written there.
            folder.rmdir()


def claim_run(workdir: str | os.PathLike, identity: Mapping[str, Any]) -> None:
  """Makes a folder that `open_run` holds this run's; InputError where it can't be written."""
  path = Path(workdir) / RUN_FILE
  if jax.process_index() > 0 or path.is_file():
    return
  try:
    with new_file(path) as partial:
      write_object(partial, dict(identity))
  except OSError as error:
    raise _unwritable(path.parent, error) from error


def train_steps(
    workdir: str | os.PathLike,
    step_function: Step,
    batches: BatchSource,
    schedule: Schedule,
    initial_params: Callable[[], Any],
    *,
    base: Any = None,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    display: Display | None = None,
) -> Outcome:
  """Trains from the folder's last state, or from the initial parameters.

  Args:
    workdir: the run's folder, held by `open_run`.
    step_function: what a step does.
    batches: what it reads.
    schedule: when to stop, report, save and evaluate.
    initial_params: called where the folder has no state yet.
    base: parameters of a frozen base; None where it is trained.
    seed: of what a step draws.
    evaluate: gets the parameters to use (averaged where the step averages).
    display: shows the progress.

  Raises:
    InputError: for a folder that can't be written, or a state that can't be read.
    TrainingError: where the loss is no longer finite.
  """
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    checkpoints = enter(Checkpoints(workdir, is_higher_better=schedule.is_higher_better))
    done = checkpoints.last_step() or 0
    if done > schedule.num_steps:
      raise InputError(
          "Schedule.num_steps", schedule.num_steps,
          f"at least {done}, the steps that {workdir} has done",
      )
    # Each evaluation of the states that there are, as it was written down.
    evaluated = {
        line["step"]: line for line in read_metrics(workdir, done)
        if not any(name.startswith(TRAIN) for name in line)
    }
    if schedule.best_metric is not None:
      checkpoints.figures |= {
          step: line[schedule.best_metric] for step, line in evaluated.items()
          if schedule.best_metric in line
      }
    if done:
      state = checkpoints.restore(done, step_function.abstract_state)
    else:
      state = step_function.init(initial_params())
    writer = enter(MetricWriter(workdir, done)) if jax.process_index() == 0 else None
    display = enter(display or Display(schedule.num_steps))
    stop = enter(_Stop())
    partitioning, key = step_function.partitioning, jax.random.key(seed)
    rate = step_function.optimizer.rate()
    late: list[tuple[int, Any]] = []
    window = _Window(done)

    def fail(what: str, step: int) -> NoReturn:
      checkpoints.wait()
      last = checkpoints.last_step()
      raise TrainingError(
          f"{what} at step {step}; "
          + (f"the last good checkpoint is that of step {last}" if last
             else "there is no checkpoint before it")
      )

    def look(keep: int) -> None:
      """Brings figures to the host, all but the last `keep` steps'."""
      while len(late) > keep:
        number, figures = late.pop(0)
        figures = jax.device_get(figures)
        if not math.isfinite(figures["loss"]) or not math.isfinite(figures["gradient_norm"]):
          fail(f"loss {figures['loss']}, gradient norm {figures['gradient_norm']}", number)
        window.add(figures)

    def report(step: int) -> None:
      figures = window.figures()
      figures["learning_rate"] = float(rate(step - 1))
      if writer:
        writer.write(step, {TRAIN + name: value for name, value in figures.items()})
      names = ("loss", "accuracy_head_1", "tokens_per_second")
      display.report(
          step, {name: figures[name] for name in names if name in figures},
          (schedule.num_steps - step) * figures["seconds_per_step"],
      )
      window.restart(step)

    def save(step: int) -> None:
      # The last update may have been too large for the next loss to be finite.
      if not all_finite(state):
        fail("parameters that aren't finite", step)
      checkpoints.save(step, state)

    def is_evaluated(step: int) -> bool:
      every = schedule.evaluate_every
      return evaluate is not None and (
          step == schedule.num_steps or every > 0 and step % every == 0
      )

    def measure(step: int) -> None:
      figures = evaluate(step_function.averaged(state), step)
      if schedule.best_metric is not None:
        if schedule.best_metric not in figures:
          raise InputError("Schedule.best_metric", schedule.best_metric, f"one of {[*figures]}")
        checkpoints.figures[step] = figures[schedule.best_metric]
      if writer:
        writer.write(step, figures)
      # Of many tasks and heads the means are enough here.
      means = {name: value for name, value in figures.items() if "_head_" not in name}
      display.evaluation(
          step, {name: value for name, value in means.items() if name.startswith(VALIDATION)}
      )

    step = done
    if done and is_evaluated(done) and done not in evaluated:
      measure(done)  # The run was killed while it did.
    while step < schedule.num_steps and not stop.is_asked(checkpoints, step):
      batch = place_batch(partitioning, batches.batch(step))
      state, figures = step_function(state, batch, key, base)
      step += 1
      late.append((step, figures))
      look(LATE_STEPS)
      display.advance(step)
      if step % schedule.log_every == 0 or step == schedule.num_steps:
        look(0)
        report(step)
      if is_evaluated(step) or step % schedule.save_every == 0:
        look(0)
        began = time.perf_counter()
        # Saved first: an evaluation may take longer than who wants to stop the run waits.
        save(step)
        if is_evaluated(step):
          measure(step)
        window.pause(time.perf_counter() - began)
    look(0)
    if step > done:
      save(step)
    checkpoints.tidy()
    is_complete = step == schedule.num_steps
    if not is_complete:
      display.say(f"stopped by SIGTERM at step {step:,}; the same command goes on from there")
    best_step, best_params = checkpoints.best_step(), None
    if best_step is not None:
      best = checkpoints.restore(best_step, step_function.abstract_state)
      best_params = step_function.averaged(best)
    return Outcome(state, step, is_complete, best_step, best_params)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
  """Whether every number of a tree is one."""
  leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


class _Window:
  """Figures of training since the last report."""

  def __init__(self, step: int):
    self.restart(step)

  def restart(self, step: int) -> None:
    self._first = step
    self._steps: list[dict[str, Any]] = []
    self._began = time.perf_counter()

  def pause(self, seconds: float) -> None:
    """Leaves seconds out of the time a step takes."""
    self._began += seconds

  def add(self, figures: dict[str, Any]) -> None:
    self._steps.append(figures)

  def figures(self) -> dict[str, float]:
    """Means over the steps, by head where there are several."""
    seconds = (time.perf_counter() - self._began) / len(self._steps)
    sums = {
        name: sum(step[name] for step in self._steps) for name in ("nll", "correct", "count")
    }
    mean = lambda name: float(np.mean([step[name] for step in self._steps]))
    return {
        "loss": mean("loss"),
        "gradient_norm": mean("gradient_norm"),
        **head_losses(sums),
        "seconds_per_step": seconds,
        "tokens_per_second": float(sums["count"].max()) / len(self._steps) / seconds,
    }


class _Stop:
  """Notes SIGTERM while the block runs."""

  def __enter__(self) -> "_Stop":
    self._is_asked = False
    self._before = None
    # The processes of a larger job are told by JAX's own handler; see `is_asked`.
    # Only the main thread can have one.
    is_alone = jax.process_count() == 1
    if is_alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *error) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def is_asked(self, checkpoints: Checkpoints, step: int) -> bool:
    """Whether to end here; all processes get the same answer."""
    return self._is_asked or checkpoints.reached_preemption(step)

  def _note(self, *signal_and_frame) -> None:
    self._is_asked = True


def _unwritable(folder: Path, error: OSError) -> InputError:
  return InputError("workdir", str(folder), f"a path that can be written ({error.strerror})")
