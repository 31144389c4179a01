"""A run's states on disk: the last one and the best one, by Orbax.

States are written in the background and appear whole or not at all.
"""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from bpd_jax.errors import InputError

FOLDER = "checkpoints"


class Checkpoints:
  """The states of a run.

  Attributes:
    best_metric: the figure that decides which state is the best; None keeps the
      last one only.
  """

  def __init__(
      self, workdir: str | os.PathLike, best_metric: str | None = None,
      is_higher_better: bool = False,
  ):
    """Opens the run's folder `checkpoints`, and clears what a killed run left half written."""
    self.best_metric = best_metric
    self._is_higher_better = is_higher_better
    policies = [checkpoint_managers.LatestN(1)]
    if best_metric is not None:
      policies.append(
          checkpoint_managers.BestN(
              get_metric_fn=lambda metrics: metrics[best_metric], reverse=not is_higher_better,
              n=1, keep_checkpoints_without_metrics=False,
          )
      )
    self._folder = Path(os.path.abspath(workdir)) / FOLDER
    try:
      self._manager = ocp.CheckpointManager(
          self._folder,
          options=ocp.CheckpointManagerOptions(
              preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
              cleanup_tmp_directories=True,
          ),
      )
    except OSError as error:
      raise InputError(
          "workdir", str(workdir), f"a path that can be written ({error.strerror})"
      ) from error

  def last_step(self) -> int | None:
    """The step of the last whole state; None where there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step of the best state; None where none was measured."""
    if self.best_metric is None:
      return None
    measured = [
        (metrics[self.best_metric], step)
        for step in self._manager.all_steps() if (metrics := self._manager.metrics(step))
    ]
    choose = max if self._is_higher_better else min
    return choose(measured)[1] if measured else None

  def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Begins to write a state; waits for the one before.

    Raises:
      InputError: where the disk is full or can't be written.
    """
    if self._manager.latest_step() == step:
      return
    try:
      self._manager.save(
          step, args=ocp.args.StandardSave(state),
          metrics=None if metrics is None else dict(metrics), force=True,
      )
    except (OSError, ValueError) as error:
      raise self._unwritable(error) from error

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
    except (OSError, KeyError, TypeError, ValueError) as error:
      message = str(error).splitlines()[0] if str(error) else type(error).__name__
      raise InputError(
          "checkpoint", str(self._folder / str(step)),
          f"a whole state of this run's shapes ({message})",
      ) from error

  def close(self) -> None:
    """Waits and closes."""
    self.wait()
    self._manager.close()

  def _unwritable(self, error: Exception) -> InputError:
    return InputError(
        "workdir", str(self._folder), f"a path that can be written ({str(error).splitlines()[0]})"
    )

