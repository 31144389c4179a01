"""Where a run's figures go: `metrics.jsonl`, TensorBoard, and the console."""

from collections.abc import Iterator, Mapping, Sequence
import json
import os
from pathlib import Path
import time
from typing import Any

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

from bpd_jax.errors import InputError
from bpd_jax.folders import new_file
from bpd_jax.terminal import description_column, plain_console, track

JSONL_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


# Seconds between lines on what takes long, where no terminal shows a bar.
LINE_SECONDS = 30


class MetricWriter:
  """Writes figures by step to a run's folder; a resumed run takes back what came after.

  To be used as a context manager. Errors of the disk are InputErrors.
  """

  def __init__(self, workdir: str | os.PathLike, step: int):
    """Opens.

    Args:
      workdir: the run's folder.
      step: steps that are done; figures of later ones are dropped.
    """
    self._workdir = Path(workdir)
    self._path = self._workdir / JSONL_FILE
    folder = self._workdir / TENSORBOARD_FOLDER
    # Imported late, as it takes seconds where PyTorch is installed.
    from bpd_jax.training.tensorboard import EventFile

    try:
      lines = [json.dumps(line) + "\n" for line in read_metrics(workdir, step)]
      # A run that is killed here still has what was there.
      with new_file(self._path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
      folder.mkdir(exist_ok=True)
      self._events = EventFile(folder, step)
    except OSError as error:
      raise self._unwritable(error) from error

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *error) -> None:
    try:
      self._events.close()
    except OSError as error:
      raise self._unwritable(error) from error

  def write(self, step: int, figures: Mapping[str, float]) -> None:
    """Adds the figures of a step."""
    try:
      with open(self._path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **figures}) + "\n")
      self._events.write(step, figures)
    except OSError as error:
      raise self._unwritable(error) from error

  def _unwritable(self, error: OSError) -> InputError:
    return InputError(
        "workdir", str(self._workdir), f"a path that can be written ({error.strerror})"
    )


def read_metrics(
    workdir: str | os.PathLike, last_step: int | None = None
) -> list[dict[str, float]]:
  """The lines of a run's `metrics.jsonl`, up to a step; none where there is no file.

  A run that was killed may have left half a line at the end, which doesn't count.
  """
  path = Path(workdir) / JSONL_FILE
  if not path.is_file():
    return []
  lines = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      lines.append(json.loads(line))
    except ValueError:
      break
  return [line for line in lines if last_step is None or line["step"] <= last_step]


class Display:
  """The progress of a run on the console: a live line on a terminal, else a line a report.

  To be used as a context manager.
  """

  def __init__(self, num_steps: int, console: Console | None = None):
    self._console = console or plain_console()
    self._is_live = self._console.is_terminal
    self._progress = Progress(
        SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        description_column(), console=self._console, disable=not self._is_live,
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
    text = _in_words(figures)
    self._progress.update(self._task, description=text)
    if not self._is_live:
      left = _duration(seconds_left)
      self.say(f"step {step:,} of {self._num_steps:,}  {text}  {left} left")

  def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
    """Shows figures, those of an evaluation."""
    self.say(f"step {step:,}  " + _in_words(figures))

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self._progress.console.print(text, soft_wrap=True)


def shown(items: Sequence[Any], description: str, console: Console | None = None) -> Iterator[Any]:
  """Items behind a progress bar on a terminal, else with a line now and then."""
  console = console or plain_console()
  if console.is_terminal:
    yield from track(items, description, console)
    return
  began = last = time.monotonic()
  for number, item in enumerate(items, start=1):
    yield item
    now = time.monotonic()
    if now - last >= LINE_SECONDS or number == len(items):
      last, left = now, (now - began) / number * (len(items) - number)
      console.print(
          f"{description}  {number:,} of {len(items):,}  {_duration(left)} left",
          soft_wrap=True,
      )


def _in_words(figures: Mapping[str, float]) -> str:
  return "  ".join(f"{name} {value:,.4g}" for name, value in figures.items())


def _duration(seconds: float) -> str:
  return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds:.0f} s"
