"""Block sizes side by side, from evaluations at several batch sizes.

  python experiments/blocks/tables.py runs/blocks/batch_1 runs/blocks/batch_8 runs/blocks/batch_25

Prints Markdown, and writes it beside this file as `tables.md`, with what it was made from,
`results.json`.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpd_jax.folders import read_object, write_object
from bpd_jax.launch import run

HERE = Path(__file__).resolve().parent
KEPT = (
    "block_size", "block_efficiency", "nodes_per_call", "wasted_tokens", "tokens", "seconds",
    "seconds_range", "speedup_over_greedy", "speedup_range", "identical_to_greedy", "costs",
)


def short(results: Mapping[str, Any]) -> dict[str, Any]:
  """What the tables are made of."""
  own = {name: results[name] for name in ("device", "versions", "batch_size", "dtype")}
  return own | {"tasks": {
      name: {
          method: {key: found[key] for key in KEPT if key in found}
          for method, found in task["methods"].items()
      }
      for name, task in results["tasks"].items()
  }}


def tables(results: Mapping[str, Any]) -> Iterator[str]:
  """The tables of one batch size."""
  tasks = results["tasks"]
  methods = [*next(iter(tasks.values()))]
  fixed = [method for method in methods if method != "auto"]
  yield f"**Batch {results['batch_size']}: times greedy's speed, least and largest in brackets**\n"
  yield f"| task | {' | '.join(methods)} | auto over the best fixed |"
  yield "|---" * (len(methods) + 2) + "|"
  for name, task in tasks.items():
    cells = [
        f"{own['speedup_over_greedy']:.2f} ({own['speedup_range'][0]:.2f}–"
        f"{own['speedup_range'][1]:.2f})" for own in task.values()
    ]
    best = min(task[method]["seconds"] for method in fixed)
    yield f"| `{name}` | {' | '.join(cells)} | {best / task['auto']['seconds']:.2f} |"
  sums = {method: sum(task[method]["seconds"] for task in tasks.values()) for method in methods}
  cells = [f"{seconds:.1f} s" for seconds in sums.values()]
  best = min(sums[method] for method in fixed)
  yield f"| all | {' | '.join(cells)} | {best / sums['auto']:.2f} |"
  yield f"\n**Batch {results['batch_size']}: block efficiency, and nodes a call**\n"
  yield f"| task | {' | '.join(methods)} | wasted by auto |"
  yield "|---" * (len(methods) + 2) + "|"
  for name, task in tasks.items():
    cells = [f"{own['block_efficiency']:.2f}, {own['nodes_per_call']:.1f}" for own in task.values()]
    auto = task["auto"]
    wasted = auto["wasted_tokens"] / max(auto["tokens"], 1)
    yield f"| `{name}` | {' | '.join(cells)} | {wasted:.2f} a token |"
  costs = next(iter(tasks.values()))["auto"]["costs"]
  cells = [
      f"{width}: {1e3 * seconds:.1f} ({1e3 * low:.1f}–{1e3 * high:.1f})"
      for width, seconds, (low, high) in zip(costs["widths"], costs["seconds"], costs["ranges"])
  ]
  yield f"\nBy this table auto chose, ms a call of so many nodes: {'; '.join(cells)}.\n"


def means(every: Sequence[Mapping[str, Any]]) -> str:
  """Over all tasks and batch sizes: auto's speed over greedy's, the geometric mean."""
  ratios = [
      task["auto"]["speedup_over_greedy"] for found in every for task in found["tasks"].values()
  ]
  return (
      f"Auto over greedy, geometric mean of {len(ratios)} tasks and batch sizes: "
      f"{np.exp(np.mean(np.log(ratios))):.2f}; the least is {min(ratios):.2f}."
  )


def main(argv: Sequence[str]) -> None:
  """Reads the folders and writes both files."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folders", nargs="+", metavar="DIR", help="of evaluate")
  args = parser.parse_args(argv)
  every = [short(read_object(Path(folder) / "results.json")) for folder in args.folders]
  lines = [line for found in every for line in tables(found)]
  text = "\n".join([*lines, means(every)]) + "\n"
  print(text)
  (HERE / "tables.md").write_text(text, encoding="utf-8")
  write_object(HERE / "results.json", {str(found["batch_size"]): found for found in every})


if __name__ == "__main__":
  run(main)
