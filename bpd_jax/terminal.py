"""What people see of a command: texts as they are.

Rich takes brackets for markup and :words: for emoji, and paths, names and prompts have
both. Every command's console and progress come from here.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  Progress,
  TaskProgressColumn,
  TextColumn,
  TimeRemainingColumn,
)


def plain_console(**options: Any) -> Console:
  """A console that prints every text as it is; the options are those of `Console`."""
  return Console(markup=False, emoji=False, highlight=False, **options)


def description_column(width: int = 1) -> TextColumn:
  """A progress bar's column, so wide at least, for what its tasks are called."""
  return TextColumn(f"{{task.description:{width}}}", markup=False)


def track(
    items: Iterable[Any], description: str, console: Console | None = None, *,
    is_shown: bool = True,
) -> Iterator[Any]:
  """Items, behind a progress bar where asked for."""
  if not is_shown:
    yield from items
    return
  columns = (
      description_column(), BarColumn(), TaskProgressColumn(),
      TimeRemainingColumn(elapsed_when_finished=True),
  )
  with Progress(*columns, console=console or plain_console()) as progress:
    yield from progress.track(items, description=description)
