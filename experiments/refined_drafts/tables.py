"""Tables 1, 3, 4, 5 and 9 to 13 of Kim et al. 2024, row for row, and two of its figures.

  python experiments/refined_drafts/tables.py runs/refined_drafts/results \\
      --single runs/refined_drafts/single

Reads what an evaluation left (`results.json`, `analysis.json`), prints Markdown, and
writes it beside them as `tables.md`, with `figures.svg` (extra `report`); `--single` is
the same methods' evaluation at batch 1.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpd_jax.checkpoints import load_config
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.evaluation.analysis import RECALLS
from bpd_jax.evaluation.cost import token_cost
from bpd_jax.evaluation.report import closed_text
from bpd_jax.folders import read_object
from bpd_jax.generation import load
from bpd_jax.launch import run
from bpd_jax.model.config import ModelConfig

KV_LENGTHS = (128, 512, 1024, 2048)
INPUT_LENGTH = 256
# Table 3: plain drafts, and those that 2-grams re-scored.
PAIR = ("blockwise", "ngram2")
MOST_NODES = 16
UNTUNED = ("NoRepeat", "Oracle")
Row = Sequence[str]


def markdown(title: str, header: Row, rows: Sequence[Row]) -> str:
  """A table with its title."""
  lines = [f"**{title}**", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
  return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def efficiency(task: Mapping[str, Any], method: str) -> str:
  """Block efficiency of a method, with its gain over plain drafts."""
  value = task["methods"][method]["block_efficiency"]
  plain = task["methods"]["blockwise"]["block_efficiency"]
  return f"{value:.3f} ({value / plain - 1:+.1%})"


def by_method(tasks: Mapping[str, Any], methods: Sequence[str], cell: Callable) -> list[Row]:
  """A row a task, a cell a method."""
  return [[name, *(cell(task, method) for method in methods)] for name, task in tasks.items()]


def tables(
    tasks: Mapping[str, Any], analysis: Mapping[str, Any], config: ModelConfig,
    head_d_ff: int, batch_size: int,
) -> Iterator[str]:
  """The tables, of tasks by name from `results.json` and `analysis.json`.

  Args:
    tasks: entries of `results.json`.
    analysis: those of `analysis.json`.
    config: the base's.
    head_d_ff: width of its heads.
    batch_size: at which the tasks were measured.
  """
  methods = list(next(iter(tasks.values()))["methods"])
  has = lambda *names: [name for name in names if name in methods]
  yield markdown(
      "Table 1: quality, and block efficiency with 9 heads",
      ["task", "quality", "learned", "block efficiency", "95 %", "speed-up"],
      [[
          name, _quality(task),
          "yes" if task["learned"] else "no", f"{plain['block_efficiency']:.3f}",
          "{:.2f}–{:.2f}".format(*plain["block_efficiency_interval"]),
          f"{plain['speedup_over_greedy']:.2f}×",
      ] for name, task in tasks.items() for plain in [task["methods"]["blockwise"]]],
  )
  repeats = lambda name, method: analysis[name]["methods"][method]["repetition"]
  yield markdown(
      "Table 3: repeats in drafts, plain and re-scored by 2-grams",
      ["task", "repeated pairs", "with 2-grams", "longest run", "with 2-grams"],
      [[
          name, *(f"{repeats(name, method)['consecutive']:.1%}" for method in PAIR),
          *(f"{repeats(name, method)['longest_run']:.2f}" for method in PAIR),
      ] for name in tasks],
  )
  named = has("blockwise", "local_neural", "ngram4", "best16_0gram", "best16_4gram", "no_repeat")
  yield markdown("Table 4: block efficiency, k = 16", ["task", *named],
                 by_method(tasks, named, efficiency))
  against = lambda name: analysis[name]["methods"]["local_neural"]["against_plain"]
  words = ("wins", "ties", "losses", "repairs", "regressions")
  yield markdown("Table 5: drafts re-scored by the small model, against plain ones",
                 ["task", *words],
                 [[name, *(f"{against(name)[word]:.1%}" for word in words)] for name in tasks])
  named = has("ngram2_general", "ngram2", "ngram4_general", "ngram4", "ngram4_own")
  yield markdown("Table 9: general, in-domain, and the base's own text", ["task", *named],
                 by_method(tasks, named, efficiency))
  weighted = [name for name in methods if any(
      part["scorer"] not in UNTUNED for task in tasks.values()
      for part in task["methods"][name].get("scorers", []))]
  weights = lambda task, method: ", ".join(
      f"{part['weight']:g}" if isinstance(part["weight"], int | float) else str(part["weight"])
      for part in task["methods"][method]["scorers"]
  )
  yield markdown("Table 10: weights that tuning chose", ["task", *weighted],
                 by_method(tasks, weighted, weights))
  named = has("local_neural", "local_neural_blind", "ngram2", "ngram4", "neural_ngram", "cache",
              "oracle_k2", "oracle_k4", "oracle_k8", "oracle_k16")
  yield markdown("Table 11: one draft a call, and the oracle", ["task", *named],
                 by_method(tasks, named, efficiency))
  named = has("blockwise_h3", "blockwise_h6", "blockwise")
  plain = lambda task, method: f"{task['methods'][method]['block_efficiency']:.3f}"
  yield markdown("Table 12: 3, 6 and 9 heads", ["task", *named], by_method(tasks, named, plain))
  rows = []
  for method in methods:
    entries = [task["methods"][method] for task in tasks.values()]
    mean = float(np.mean([entry["block_efficiency"] for entry in entries]))
    scorers = [load_config(part["checkpoint"]) for part in entries[0].get("scorers", [])
               if part["scorer"] == "Neural"]
    heads, nodes = entries[0]["block_size"] - 1, entries[0]["nodes"]
    search = SearchSettings(
        entries[0].get("search", "chain"), entries[0].get("num_paths", 1), nodes
    )
    cost = lambda length, mean=mean, heads=heads, scorers=scorers, search=search: token_cost(
        config, search.num_nodes, heads, mean, output_length=length, input_length=INPUT_LENGTH,
        scorers=scorers, num_prefixes=search.num_prefixes, head_d_ff=head_d_ff,
    )
    rows.append([
        method, f"{mean:.3f}", f"{cost(KV_LENGTHS[0]).parameter_bytes / 1e6:.2f}",
        *(f"{cost(length).cache_bytes / 1e6:.2f}" for length in KV_LENGTHS),
        f"{cost(KV_LENGTHS[0]).flops / 1e6:.1f}",
        f"{np.mean([1e3 / entry['tokens_per_second'] for entry in entries]):.2f}",
    ])
  yield markdown(
      f"Table 13: what a token costs by counting (batch 1, input of {INPUT_LENGTH}), and measured "
      f"(batch {batch_size})",
      ["method", "mean block efficiency", "weights, MB",
       *(f"cache at {length}, MB" for length in KV_LENGTHS), "MFLOP", "ms a token, measured"],
      rows,
  )
  yield markdown(
      f"The method to choose: best on the rows for tuning, at most {MOST_NODES} nodes",
      ["task", "method", "nodes", "block efficiency", "of the way to the oracle", "loop-free"],
      [[
          name, best, str(task["methods"][best]["nodes"]), efficiency(task, best),
          *(closed_text(analysis[name]["methods"][best], suffix) or "–"
            for suffix in ("", "_loop_free")),
      ] for name, task in tasks.items() for best in [chosen_method(task)]],
  )
  distances = [name for name in methods if name != "greedy"]
  yield markdown(
      "Of the way from plain drafts to the oracle with k = 16, and 95 % intervals",
      ["method", "nodes", *(f"{name}{rows}" for name in tasks for rows in ("", ", loop-free"))],
      [[
          method, str(next(iter(tasks.values()))["methods"][method]["nodes"]),
          *(closed_text(analysis[name]["methods"][method], suffix) or "–"
            for name in tasks for suffix in ("", "_loop_free")),
      ] for method in distances],
  )
  heads = [
      [name, str(own["rising_heads"]), *(f"{value:.2f}" for value in own["entropy"])]
      for name in tasks for own in [analysis[name]["heads"]]
  ]
  num_heads = len(next(iter(analysis.values()))["heads"]["entropy"])
  yield markdown("Entropy by head, nats; up to which head it rises",
                 ["task", "h_max", *map(str, range(1, num_heads + 1))], heads)
  yield _regression(tasks, analysis)
  yield markdown(
      "Oracle by number of heads: block efficiency of the best choice among k candidates",
      ["task", "k", *map(str, range(1, num_heads + 1))],
      [[name, str(k), *(f"{heads[column]:.2f}" for heads in analysis[name]["heads"]["oracle"])]
       for name in tasks for column, k in enumerate(RECALLS)],
  )


def chosen_method(task: Mapping[str, Any]) -> str:
  """The method that was best on rows that aren't reported, of those that can be used."""
  usable = {
      name: entry["tuning_block_efficiency"] for name, entry in task["methods"].items()
      if entry["nodes"] <= MOST_NODES and entry.get("scorers")
      and all(part["scorer"] != "Oracle" for part in entry["scorers"])
  }
  return max(usable, key=usable.get)


def _quality(task: Mapping[str, Any]) -> str:
  if task["quality"] is None:
    return "no references"
  return f"{task['main_metric']} {task['quality'][task['main_metric']]:.3f}"


def time_table(tasks: Mapping[str, Any], single: Mapping[str, Any], batch_size: int) -> str:
  """Block efficiency beside time, both over plain drafts, at batch 1 and another.

  Args:
    tasks: by name, of `results.json`.
    single: the same of an evaluation at batch 1.
    batch_size: of the first.
  """
  rows = []
  for name, task in tasks.items():
    for method, entry in task["methods"].items():
      plain = task["methods"]["blockwise"]
      cells = []
      for measured in (task, single[name]):
        own, base = measured["methods"][method], measured["methods"]["blockwise"]
        low, high = own["speedup_range"]
        speed = own["tokens_per_second"] / base["tokens_per_second"] - 1
        cells += [f"{1e3 / own['tokens_per_second']:.2f}",
                  f"{own['speedup_over_greedy']:.2f}× ({low:.2f}–{high:.2f})",
                  f"{speed:+.1%}, {compare_times(own, base)}" if own is not base else ""]
      gain = entry["block_efficiency"] / plain["block_efficiency"] - 1
      rows.append([name, method, str(entry["nodes"]), f"{gain:+.1%}", *cells])
  sizes = [word for size in (batch_size, 1) for word in (
      f"ms a token, batch {size}", "over greedy", "tokens a second over plain")]
  return markdown(
      "Is a gain in block efficiency one in time? Faster or slower: every pass than every one "
      "of plain drafts", ["task", "method", "nodes", "block efficiency over plain", *sizes], rows,
  )


def compare_times(own: Mapping[str, Any], base: Mapping[str, Any]) -> str:
  """Whether all timed passes of a method were on one side of all of another's."""
  if own["seconds_range"][1] < base["seconds_range"][0]:
    return "faster"
  return "slower" if own["seconds_range"][0] > base["seconds_range"][1] else "no difference seen"


def _regression(tasks: Mapping[str, Any], analysis: Mapping[str, Any]) -> str:
  """Block efficiency on h_max over the tasks, in a sentence."""
  x = np.array([analysis[name]["heads"]["rising_heads"] for name in tasks], float)
  y = np.array([task["methods"]["blockwise"]["block_efficiency"] for task in tasks.values()])
  if len(x) < 3 or not x.std() or not y.std():
    return f"h_max is {sorted(set(x.astype(int).tolist()))} on {len(x)} tasks: no line to fit.\n"
  slope, start = np.polyfit(x, y, 1)
  return (f"Block efficiency ≈ {start:.2f} + {slope:.2f} · h_max over {len(x)} tasks, "
          f"R = {np.corrcoef(x, y)[0, 1]:.2f} (the paper's 7 tasks: 0.77).\n")


def draw_figures(tasks: Mapping[str, Any], analysis: Mapping[str, Any], path: Path) -> None:
  """Entropy and oracle by heads: a column a task, both as in the paper's Figures 2 and 5."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  figure = Figure((3.6 * len(tasks), 5))
  axes = figure.subplots(2, len(tasks), squeeze=False, sharex=True, sharey="row")
  for column, name in enumerate(tasks):
    heads = analysis[name]["heads"]
    number = range(1, len(heads["entropy"]) + 1)
    axes[0, column].plot(number, heads["entropy"], marker=".", color="black")
    axes[0, column].set_title(name)
    for k, efficiencies in zip(RECALLS, zip(*heads["oracle"])):
      label = "plain" if k == 1 else f"k = {k}"
      axes[1, column].plot(number, efficiencies, marker=".", label=label)
    axes[1, column].set_xlabel("head; number of heads")
  axes[0, 0].set_ylabel("entropy, nats")
  axes[1, 0].set_ylabel("block efficiency of the oracle")
  axes[1, 0].legend(fontsize=8)
  with rc_context({"svg.fonttype": "none", "svg.hashsalt": "heads"}):
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main(argv: Sequence[str]) -> None:
  """Prints and writes the tables; learned tasks alone unless there are none."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("results", type=Path, help="folder of an evaluation")
  parser.add_argument("--single", type=Path, help="folder of an evaluation at batch 1")
  args = parser.parse_args(argv)
  results = read_object(args.results / "results.json")
  analysis = read_object(args.results / "analysis.json")
  model = load(results["checkpoint"])
  learned = {name: task for name, task in results["tasks"].items() if task["learned"]}
  tasks = learned or results["tasks"]
  head_d_ff = model.own_heads[0].d_ff or model.config.d_ff
  text = "\n".join(tables(tasks, analysis, model.config, head_d_ff, results["batch_size"]))
  if args.single:
    single = read_object(args.single / "results.json")["tasks"]
    text += "\n" + time_table(tasks, single, results["batch_size"])
  if not learned:
    text = "No task is learned; these are all of them, and say nothing.\n\n" + text
  print(text)
  (args.results / "tables.md").write_text(text, encoding="utf-8")
  draw_figures(tasks, analysis, args.results / "figures.svg")


if __name__ == "__main__":
  run(main)
