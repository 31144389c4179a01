"""The loop of a run: batches in, states and figures out, until the last step.

What a run has done is a function of its settings and its step, so that one that
was killed, at whatever moment, ends where an undisturbed one ends.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
from pathlib import Path
import signal
import threading
import time
from typing import Any, Protocol

import jax
import numpy as np

from bpd_jax.errors import InputError
from bpd_jax.folders import read_object, write_object
from bpd_jax.training.checkpointing import Checkpoints
from bpd_jax.training.loss import head_losses
from bpd_jax.training.metrics import Display, MetricWriter
from bpd_jax.training.step import place_batch, Step, TrainState

RUN_FILE = "run.json"
# Steps whose figures wait on the device before they are looked at.
LATE_STEPS = 1


class TrainingError(RuntimeError):
  """A run can't go on; the message says at which step, and what is left of it."""


class BatchSource(Protocol):
  """Batches by step, as `bpd_jax.data.batches.Batches` has them."""

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This process's rows."""


# (parameters, step) -> figures by name.
Evaluate = Callable[[Any, int], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long a run is, and what happens in between. None of it changes what is learned.

  Attributes:
    num_steps: of the run; a longer run goes on from a shorter one.
    log_every: steps between figures of training.
    save_every: steps between saved states.
    evaluate_every: steps between evaluations, each of which saves a state; 0 for
      one at the end.
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
      if getattr(self, name) < 1:
        raise InputError(f"Schedule.{name}", getattr(self, name), "a positive integer")
    if self.evaluate_every < 0:
      raise InputError("Schedule.evaluate_every", self.evaluate_every, "0 or more")


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


def check_run(workdir: str | os.PathLike, identity: Mapping[str, Any]) -> bool:
  """Claims a folder for a run, or checks that it is this run's.

  Args:
    workdir: the run's folder.
    identity: all that decides what is learned, ready for JSON.

  Returns:
    Whether the run has begun before.

  Raises:
    InputError: naming the field in which the folder's run differs, or where the
      folder holds something else.
  """
  folder = Path(workdir)
  path = folder / RUN_FILE
  if path.is_file():
    found, wanted = _flat(read_object(path)), _flat(identity)
    for name in sorted(found.keys() | wanted.keys()):
      if found.get(name) != wanted.get(name):
        raise InputError(
            f"workdir {folder} {name}", wanted.get(name),
            f"{found.get(name)!r}, of the run that the folder holds",
        )
    return True
  if folder.exists() and any(folder.iterdir()):
    raise InputError("workdir", str(folder), f"a new folder, or one with a {RUN_FILE}")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{RUN_FILE}.partial"
    write_object(partial, dict(identity))
    partial.rename(path)
  except OSError as error:
    raise InputError(
        "workdir", str(folder), f"a path that can be written ({error.strerror})"
    ) from error
  return False


def train_steps(
    workdir: str | os.PathLike,
    step_function: Step,
    batches: BatchSource,
    schedule: Schedule,
    initial_params: Callable[[], Any],
    *,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    display: Display | None = None,
) -> Outcome:
  """Trains from the folder's last state, or from the initial parameters.

  Args:
    workdir: the run's folder, claimed by `check_run`.
    step_function: what a step does.
    batches: what it reads.
    schedule: when to stop, report, save and evaluate.
    initial_params: called where the folder has no state yet.
    seed: of what a step draws.
    evaluate: gets the parameters to use (averaged where the step averages).
    display: shows the progress.

  Raises:
    InputError: for a folder that can't be written, or a state that can't be read.
    TrainingError: where the loss is no longer finite.
  """
  partitioning, key = step_function.partitioning, jax.random.key(seed)
  checkpoints = Checkpoints(workdir, schedule.best_metric, schedule.is_higher_better)
  display = display or Display(schedule.num_steps)
  done = checkpoints.last_step() or 0
  if done:
    state = checkpoints.restore(done, step_function.abstract_state)
  else:
    state = step_function.init(initial_params())
  is_writer = jax.process_index() == 0
  writer = MetricWriter(workdir, done) if is_writer else None
  late: list[tuple[int, Any]] = []
  window = _Window(done)
  rate = step_function.optimizer.rate()

  def look(keep: int) -> None:
    """Brings figures to the host, all but the last `keep` steps'."""
    while len(late) > keep:
      number, figures = late.pop(0)
      figures = jax.device_get(figures)
      if not math.isfinite(figures["loss"]) or not math.isfinite(figures["gradient_norm"]):
        checkpoints.wait()
        last = checkpoints.last_step()
        raise TrainingError(
            f"loss {figures['loss']}, gradient norm {figures['gradient_norm']} at step {number}; "
            + (f"the last good checkpoint is that of step {last}" if last
               else "there is no checkpoint before it")
        )
      window.add(figures)

  def report(step: int) -> None:
    figures = window.figures()
    figures["learning_rate"] = float(rate(step - 1))
    if writer:
      writer.write(step, {f"train/{name}": value for name, value in figures.items()})
    shown = ("loss", "accuracy_head_1", "tokens_per_second")
    display.report(
        step, {name: figures[name] for name in shown if name in figures},
        (schedule.num_steps - step) * figures["seconds_per_step"],
    )
    window.restart(step)

  def measure(step: int) -> Mapping[str, float] | None:
    if evaluate is None:
      return None
    figures = evaluate(step_function.averaged(state), step)
    if writer:
      writer.write(step, figures)
    display.say(f"step {step:,}  " + "  ".join(f"{k} {v:,.4g}" for k, v in figures.items()))
    return figures

  with display, _Stop() as stop:
    step = done
    while step < schedule.num_steps and not stop.is_asked(checkpoints, step):
      batch = place_batch(partitioning, batches.batch(step))
      state, figures = step_function(state, batch, key)
      step += 1
      late.append((step, figures))
      look(LATE_STEPS)
      display.advance(step)
      is_last = step == schedule.num_steps
      if step % schedule.log_every == 0 or is_last:
        look(0)
        report(step)
      is_measured = is_last or (schedule.evaluate_every and step % schedule.evaluate_every == 0)
      if is_measured or step % schedule.save_every == 0:
        look(0)
        began = time.perf_counter()
        checkpoints.save(step, state, measure(step) if is_measured else None)
        window.pause(time.perf_counter() - began)
    look(0)
    if step > done:
      checkpoints.save(step, state)
    checkpoints.wait()
    is_complete = step == schedule.num_steps
    if not is_complete:
      display.say(f"stopped by SIGTERM at step {step:,}, which is saved; the same command goes on")
    best_step, best_params = checkpoints.best_step(), None
    if best_step is not None:
      best = checkpoints.restore(best_step, step_function.abstract_state)
      best_params = step_function.averaged(best)
  if writer:
    writer.close()
  checkpoints.close()
  return Outcome(state, step, is_complete, best_step, best_params)


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


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested fields by dotted names, as JSON has their values."""
  flat = {}
  for name, value in fields.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat
