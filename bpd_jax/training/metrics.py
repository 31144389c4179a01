"""Where a run's figures go: `metrics.jsonl`, TensorBoard, and the console."""

from collections.abc import Mapping
import json
import os
from pathlib import Path

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  SpinnerColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from tensorboardX import SummaryWriter

JSONL_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricWriter:
  """Writes figures by step to a run's folder; a resumed run takes back what came after."""

  def __init__(self, workdir: str | os.PathLike, step: int):
    """Opens.

    Args:
      workdir: the run's folder.
      step: steps that are done; figures of later ones are dropped.
    """
    self._path = Path(workdir) / JSONL_FILE
    lines = []
    if self._path.is_file():
      for line in self._path.read_text(encoding="utf-8").splitlines():
        # A run that was killed may have left half a line.
        try:
          if json.loads(line)["step"] <= step:
            lines.append(line + "\n")
        except ValueError:
          break
    self._path.write_text("".join(lines), encoding="utf-8")
    self._tensorboard = SummaryWriter(
        os.fspath(Path(workdir) / TENSORBOARD_FOLDER), purge_step=step + 1
    )

  def write(self, step: int, figures: Mapping[str, float]) -> None:
    """Adds the figures of a step."""
    with open(self._path, "a", encoding="utf-8") as file:
      file.write(json.dumps({"step": step, **figures}) + "\n")
    for name, value in figures.items():
      self._tensorboard.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes."""
    self._tensorboard.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """The lines of a run's `metrics.jsonl`."""
  text = (Path(workdir) / JSONL_FILE).read_text(encoding="utf-8")
  return [json.loads(line) for line in text.splitlines()]


class Display:
  """The progress of a run on the console: a live line on a terminal, else a line a report.

  To be used as a context manager.
  """

  def __init__(self, num_steps: int, console: Console | None = None):
    self._console = console or Console()
    self._is_live = self._console.is_terminal
    self._progress = Progress(
        SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.description}"), console=self._console, disable=not self._is_live,
    )
    self._task = self._progress.add_task("compiling", total=num_steps)
    self._num_steps = num_steps

  def __enter__(self) -> "Display":
    self._progress.start()
    return self

  def __exit__(self, *error) -> None:
    self._progress.stop()

  def advance(self, step: int) -> None:
    """Shows how many steps are done."""
    self._progress.update(self._task, completed=step)

  def report(self, step: int, figures: Mapping[str, float], seconds_left: float) -> None:
    """Shows figures, those of training."""
    text = "  ".join(f"{name} {value:,.4g}" for name, value in figures.items())
    self._progress.update(self._task, description=text)
    if not self._is_live:
      left = f"{seconds_left / 3600:.1f} h" if seconds_left > 5400 else f"{seconds_left:.0f} s"
      self.say(f"step {step:,} of {self._num_steps:,}  {text}  {left} left")

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self._progress.console.print(text, highlight=False, soft_wrap=True)
