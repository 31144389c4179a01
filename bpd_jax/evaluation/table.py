"""What `results.json` says, for a terminal: quality beside block efficiency beside time."""

from collections.abc import Iterator
import itertools
import statistics
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

FLOOR_NAMES = {"another_reference": "another reference", "input_start": "input's start"}


def means_over_learned(tasks: dict[str, Any]) -> dict[str, Any]:
  """Means over the tasks that are learned; of the others no mean would mean anything.

  Args:
    tasks: of `results.json`.

  Returns:
    `tasks`, the names, and for each of `methods` the arithmetic mean of its block
    efficiencies and the geometric mean of its speed-ups; no methods without tasks.
  """
  learned = {name: task["methods"] for name, task in tasks.items() if task["learned"]}
  means = {}
  for method in next(iter(learned.values()), {}):
    entries = [methods[method] for methods in learned.values()]
    means[method] = {
        "block_efficiency": statistics.fmean(x["block_efficiency"] for x in entries),
        "speedup_over_greedy": statistics.geometric_mean(
            x["speedup_over_greedy"] for x in entries
        ),
    }
  return {"tasks": list(learned), "methods": means}


def print_results(results: dict[str, Any], console: Console) -> None:
  """Prints the table, wider than the terminal where that would cut figures off."""
  table = results_table(results)
  width = console.measure(table, options=console.options.update(width=1000)).maximum
  console.width = max(console.width, width)
  console.print(table)


def results_table(results: dict[str, Any]) -> Table:
  """All tasks, a section each, with a method a line, and the means below."""
  table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_caption(results),
                caption_justify="left")
  for name in ("task", "method"):
    table.add_column(name, no_wrap=True)
  for name in ("nodes/h", "block\nefficiency", "95 %", "loop-\nfree", "iden-\ntical",
               "near\nties", "tokens/s", "speed-\nup", "range"):
    table.add_column(name, justify="right", no_wrap=True)
  for name, task in results["tasks"].items():
    methods = task["methods"].items()
    for words, method in itertools.zip_longest(_describe_task(name, task), methods):
      table.add_row(words or "", *(_describe_method(*method) if method else ()))
    table.add_section()
  means = results["means_over_learned_tasks"]
  if len(results["tasks"]) > 1:
    words = f"mean of {len(means['tasks'])} learned of {len(results['tasks'])}"
    for name, mean in means["methods"].items():
      table.add_row(
          words, name, "", f"{mean['block_efficiency']:.3f}", "", "", "", "", "",
          f"{mean['speedup_over_greedy']:.2f}×",
      )
      words = ""
    if not means["methods"]:
      table.add_row(words)
  return table


def _describe_task(name: str, task: dict[str, Any]) -> Iterator[str | Text]:
  """Lines of a task's cell."""
  yield Text(name, "bold")
  yield f"{task['examples']} rows of {task['split']}"
  looping = f"{task['repetition']['looping_rows']:.0%} loop"
  if task["quality"] is None:
    yield f"no references, {looping}"
    return
  metric = task["main_metric"]
  low, high = task["quality_interval"]
  yield f"{metric} {task['quality'][metric]:.3f} ({low:.2f}–{high:.2f})"
  for floor, value in task["quality_floors"].items():
    yield f"  {FLOOR_NAMES[floor]} {value:.3f}"
  yield f"{looping}, references {task['repetition']['reference_looping_rows']:.0%}"
  yield Text("learned", "green") if task["learned"] else Text("*not learned*", "red")


def _describe_method(name: str, entry: dict[str, Any]) -> Iterator[str]:
  """Cells of a method."""
  low, high = entry["block_efficiency_interval"]
  free = entry["block_efficiency_loop_free"]
  slowest, fastest = entry["speedup_range"]
  yield name
  yield f"{entry['nodes']}/{entry['block_size']}"
  yield f"{entry['block_efficiency']:.3f}"
  yield f"{low:.2f}–{high:.2f}"
  yield "–" if free is None else f"{free:.3f}"
  yield f"{entry['identical_to_greedy']:.1%}"
  yield str(entry["near_tie_rows"])
  yield f"{entry['tokens_per_second']:,.0f}"
  yield f"{entry['speedup_over_greedy']:.2f}×"
  yield f"{slowest:.2f}–{fastest:.2f}"


def _caption(results: dict[str, Any]) -> str:
  """What the figures were measured with, and what they aren't."""
  return (
      f"{results['device']}, {results['dtype']}, batch {results['batch_size']}, at most "
      f"{results['max_decode_length']} tokens. Block efficiency is tokens a decoder call and not "
      "a speed; tokens/s and speed-up are. They are medians, with the encoder and without "
      f"compilation; timed passes of each method: {results['repeats']}, alternating. "
      "docs/reading_results.md explains every column."
  )
