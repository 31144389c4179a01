"""Figures for TensorBoard.

In a module of its own, as tensorboardX imports PyTorch wherever that is installed: seconds
that only a run which writes figures should wait.
"""

from collections.abc import Mapping
import os
from pathlib import Path
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class EventFile:
  """A file of events; errors of the disk are OSErrors."""

  def __init__(self, folder: Path, step: int):
    """Opens; what a run that was killed wrote of later steps than `step` is hidden."""
    # Not SummaryWriter, whose thread ends at a full disk, whereupon adding blocks for ever.
    self._events = EventsWriter(os.fspath(folder / "events"), f".{step}")
    self._events.write_event(
        Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
    )

  def write(self, step: int, figures: Mapping[str, float]) -> None:
    """Adds the figures of a step."""
    for name, value in figures.items():
      self._events.write_event(
          Event(step=step, wall_time=time.time(), summary=scalar(name, value))
      )
    self._events.flush()

  def close(self) -> None:
    self._events.close()
