"""A run's states on disk: the last one and the best one, by Orbax.

States are written in the background and appear whole or not at all. Which one is
the best follows from figures that are noted later than the state is saved, so
that a run that is killed while it evaluates has lost nothing.
"""

from collections.abc import Mapping, Sequence
import math
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from bpd_jax.checkpoints import read_back
from bpd_jax.errors import brief, InputError
from bpd_jax.folders import array_path

FOLDER = "checkpoints"
# What Orbax calls the one thing of a step.
STATE = "default"


class Checkpoints:
  """The states of a run; to be used as a context manager, which waits and closes.

  Attributes:
    figures: the metric that decides which state is the best, by step; without
      any the last state is kept alone.
  """

  def __init__(
      self, workdir: str | os.PathLike, figures: Mapping[int, float] | None = None,
      is_higher_better: bool = False,
  ):
    """Opens the run's folder `checkpoints`, and clears what a killed run left half written."""
    self.figures = dict(figures or {})
    self._is_higher_better = is_higher_better
    self._folder = array_path(workdir, "workdir") / FOLDER
    self._is_proved = False
    try:
      self._manager = ocp.CheckpointManager(
          self._folder,
          options=ocp.CheckpointManagerOptions(
              preservation_policy=_LastAndBest(self), cleanup_tmp_directories=True,
          ),
      )
    except OSError as error:
      raise self._unwritable(error) from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *error) -> None:
    self.wait()
    self._manager.close()

  def last_step(self) -> int | None:
    """The step of the last state; None where there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step of the best state, of like ones the last; None where none has a figure."""
    return self.best_of(self._manager.all_steps())

  def best_of(self, steps: Sequence[int]) -> int | None:
    """The best of some steps; see `best_step`."""
    sign = 1 if self._is_higher_better else -1
    measured = [
        (sign * self.figures[step], step)
        for step in steps if math.isfinite(self.figures.get(step, math.nan))
    ]
    return max(measured)[1] if measured else None

  def kept(self, steps: Sequence[int]) -> set[int | None]:
    """Which of some steps stay: the last one and the best one."""
    return {max(steps, default=None), self.best_of(steps)}

  def save(self, step: int, state: Any) -> None:
    """Begins to write a state; waits for the one before, and the first time until it is read.

    Args:
      step: its number.
      state: a dict or dataclass.

    Raises:
      InputError: where the disk is full, can't be written, or can't be read back.
    """
    if self._manager.latest_step() == step:
      return
    try:
      self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
    except (OSError, ValueError) as error:
      raise self._unwritable(error) from error
    if not self._is_proved:
      self.wait()
      parts = state if isinstance(state, dict) else vars(state)
      size = lambda part: sum(leaf.size for leaf in jax.tree.leaves(part))
      name = min(filter(lambda name: size(parts[name]), parts), key=lambda name: size(parts[name]))
      read_back(self._folder / str(step) / STATE, {name: parts[name]})
      self._is_proved = True

  def tidy(self) -> None:
    """Waits, and deletes all states but the last one and the best one."""
    self.wait()
    steps = self._manager.all_steps()
    for step in set(steps) - self.kept(steps):
      self._manager.delete(step)

  def reached_preemption(self, step: int) -> bool:
    """Whether the processes of a job agree that they are about to be stopped."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Waits until what was saved is on disk; InputError where that fails."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as error:
      raise self._unwritable(error) from error

  def restore(self, step: int, abstract_state: Any) -> Any:
    """Reads a state straight into its places.

    Raises:
      InputError: where it is truncated or has other shapes.
    """
    try:
      return self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
    except Exception as error:  # Orbax raises a bare Exception for arrays that are cut.
      others = [other for other in self._manager.all_steps() if other != step]
      rest = f"goes on from step {max(others)}" if others else "starts anew"
      raise InputError(
          "checkpoint", str(self._folder / str(step)),
          f"a whole state of this run's shapes; without that folder the run {rest} "
          f"({brief(error)})",
      ) from error

  def _unwritable(self, error: Exception) -> InputError:
    return InputError(
        "workdir", str(self._folder), f"a path that can be written ({brief(error)})"
    )


class _LastAndBest(checkpoint_managers.PreservationPolicy):
  """Which states Orbax keeps once a new one is whole."""

  def __init__(self, checkpoints: Checkpoints):
    self._checkpoints = checkpoints

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = self._checkpoints.kept(steps)
    return [step in kept for step in steps]

