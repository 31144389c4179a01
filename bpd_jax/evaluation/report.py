"""One HTML file of an evaluation: tables, plots, and decodes to watch.

Everything is in the file; it opens from disk without a network. `analyse_task` gathers
what `results.json` doesn't have, `make_report` writes both down.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import html
import io
import json
from typing import Any

import numpy as np

from bpd_jax.decoding.drafters.heads import HeadsDrafter
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.scorers.neural import NeuralScorer
from bpd_jax.evaluation.analysis import (
  closed_distance,
  compare_drafts,
  describe_repetition,
  drafts_everywhere,
  efficiency_by_position,
  head_statistics,
  lattice_statistics,
  RECALLS,
  rising_heads,
)
from bpd_jax.evaluation.cost import token_cost
from bpd_jax.evaluation.drafting import describe_draft, Draft
from bpd_jax.evaluation.quality import is_looping
from bpd_jax.evaluation.replay import Recording, replay
from bpd_jax.evaluation.run import Method
from bpd_jax.evaluation.scoring import is_oracle
from bpd_jax.evaluation.watch import watch
from bpd_jax.generation import Generation, Generator
from bpd_jax.programs import DecodeSettings
from bpd_jax.vocabulary import Vocabulary

# Candidates of a step that a decode shows, besides the one that was chosen.
SHOWN = 4


def analyse_task(
    generator: Generator, recording: Recording, methods: Sequence[Method],
    scoring: Mapping[str, Sequence[Scoring]], live: Mapping[str, Generation],
    num_decodes: int = 2,
) -> dict[str, Any]:
  """What a task's recording says of the heads and of every method that drafts.

  Args:
    generator: the recorded model.
    recording: of the reported rows.
    methods: those that draft nothing are left out, and those with a policy, as their drafts
      are another method's.
    scoring: of each method by name.
    live: what each method decoded of the same rows, by name.
    num_decodes: rows to watch with plain drafts and with the re-scored ones of the
      highest block efficiency; of other methods the first row is.

  Returns:
    Ready for JSON: `heads`, see `head_statistics`, with `rising_heads`, None where the model
    has none; `lattices`, see `lattice_statistics`, one for all `methods` that draft alike;
    `methods`, for each `block_efficiency`, `replay_equals_live`, the share of the rows of
    which every call emits what it did live, `repetition`, `by_position`, `cost` (see `_cost`),
    `against_plain` (see `compare_drafts`; absent without a plain method),
    `closed_distance` with its `_interval` (see there; absent without an oracle, None where
    that saves no call), and the same of rows that don't loop, `closed_distance_loop_free`;
    `decodes`, each `method`, `row` and `calls`.
  """
  options = {
      x.name: {**x.options(generator), "scoring": scoring[x.name]} for x in methods
  }
  settings = {name: generator.settings(**own) for name, own in options.items()}
  methods = [x for x in methods if settings[x.name].drafter.depth and x.policy is None]
  # Methods that re-score the same heads are compared with these as they are.
  drafter = lambda x: settings[x.name].drafter
  has_heads = lambda x: isinstance(drafter(x), HeadsDrafter)
  drafts = [x.draft for x in methods if has_heads(x) and isinstance(x.draft, Draft)]
  everything = generator.heads()
  if drafts:  # Of an add-on, say.
    everything = dataclasses.replace(drafts[0], block_size=None, top_k=1).make(generator)
  heads = None
  if everything.drafter.depth:
    heads = head_statistics(generator, recording, everything)
    heads["rising_heads"] = rising_heads(heads["entropy"])
  plain = next(
      (x for x in methods
       if has_heads(x) and drafter(x).num_candidates == 1 and not x.scorers), None
  )
  oracles = [x for x in methods if has_heads(x) and is_oracle(x.scorers)]
  drafts_before = None
  if plain is not None:
    drafts_before = drafts_everywhere(generator, recording, **options[plain.name])
  found, calls = {}, {}
  for method in methods:
    decoded = replay(generator, recording, **options[method.name])
    entry = {
        "block_efficiency": decoded.block_efficiency,
        "replay_equals_live": float(np.mean([
            [call.emitted for call in again] == [call.emitted for call in trace]
            for again, trace in zip(decoded.traces, live[method.name].traces, strict=True)
        ])),
        "repetition": describe_repetition(decoded),
        "by_position": efficiency_by_position(decoded),
        "cost": _cost(
            generator, recording, settings[method.name],
            options[method.name]["method"].params["w1_2"].shape[0] if has_heads(method) else None,
            scoring[method.name], decoded,
        ),
    }
    if plain is not None and method is not plain:
      after = drafts_everywhere(generator, recording, **options[method.name])
      entry["against_plain"] = compare_drafts(recording, drafts_before, after)
    found[method.name], calls[method.name] = entry, np.array(decoded.calls)
  if plain is not None and oracles:
    best = max(oracles, key=lambda x: drafter(x).num_candidates)
    is_free = np.array([
        not is_looping(tokens[:length].tolist())
        for tokens, length in zip(recording.tokens, recording.lengths)
    ])
    for name, entry in ((x.name, found[x.name]) for x in methods if has_heads(x)):
      for suffix, rows in (("", np.ones_like(is_free)), ("_loop_free", is_free)):
        closed = closed_distance(*(calls[x][rows] for x in (plain.name, name, best.name)))
        entry["closed_distance" + suffix], entry[f"closed_distance{suffix}_interval"] = (
            (None, None) if closed is None else closed
        )
  refined = [x for x in methods if x.scorers and not is_oracle(x.scorers)]
  best_refined = max(refined, key=lambda x: found[x.name]["block_efficiency"], default=None)
  decodes = [
      {
          "method": method.name, "row": row,
          "scorers": [type(source).__name__.removesuffix("Source") for source in method.scorers],
          "calls": [dataclasses.asdict(call) for call in watch(
              generator, recording, row, **options[method.name])],
      }
      for method in methods
      for row in range(min(
          num_decodes if method in (plain, best_refined) else 1, len(recording)
      ))
  ]
  return {
      "heads": heads, "lattices": _lattices(generator, recording, methods, options),
      "methods": found, "decodes": decodes,
  }


def _lattices(
    generator: Generator, recording: Recording, methods: Sequence[Method],
    options: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
  """`lattice_statistics` of everything that drafts, with the methods that draft so."""
  found: dict[str, dict[str, Any]] = {}
  for method in methods:
    # However many candidates a method has of a step, the statistics are of all.
    draft = {key: x for key, x in describe_draft(method.draft).items() if key != "top_k"}
    key = json.dumps(draft, sort_keys=True)
    if key not in found:
      own = lattice_statistics(generator, recording, options[method.name]["method"])
      found[key] = {"draft": draft, "methods": [], **own}
    found[key]["methods"].append(method.name)
  return [*found.values()]


def _cost(
    generator: Generator, recording: Recording, settings: DecodeSettings,
    head_d_ff: int | None, scoring: Sequence[Scoring], decoded: Generation,
) -> dict[str, float]:
  """`Cost` of a token at batch 1, with an input and a prefix of mean length.

  What a drafter reads that has no heads, of width `head_d_ff`, isn't counted.
  """
  cost = token_cost(
      generator.config, settings.num_nodes, settings.drafter.depth, decoded.block_efficiency,
      head_d_ff=head_d_ff,
      output_length=int(recording.lengths.mean() // 2),
      input_length=int(recording.prompt_lengths.mean()),
      scorers=[
          part.scorer.model.model.config for part in scoring
          if isinstance(part.scorer, NeuralScorer)
      ],
      num_prefixes=settings.search.num_prefixes,
  )
  return dataclasses.asdict(cost)


def make_report(
    results: Mapping[str, Any], analysis: Mapping[str, Any], vocabulary: Vocabulary
) -> str:
  """The page.

  Args:
    results: what `results.json` holds.
    analysis: of each task by name, from `analyse_task`.
    vocabulary: names the tokens of the decodes.
  """
  parts = [
      "<h1>Block efficiency and what is behind it</h1>",
      f"<p>{_text(results['checkpoint'])}: {_text(results['device'])}, "
      f"{_text(results['dtype'])}, batch {results['batch_size']}, at most "
      f"{results['max_decode_length']} tokens. Rows {_text(results['rows_fingerprint'])}, "
      f"source {_text(str(results['git_revision']))}. Block efficiency is tokens a decoder "
      "call and not a speed; the speed-up stands beside it.</p>",
      _plot_efficiency(results),
  ]
  for name, task in results["tasks"].items():
    verdict = {True: "learned", False: "<b>not learned</b>", None: "no references"}
    parts.append(f"<h2>{_text(name)} <small>{verdict[task['learned']]}</small></h2>")
    parts.append(_task_line(task))
    own = analysis.get(name, {"methods": {}, "decodes": [], "heads": None, "lattices": []})
    parts.append(_plot_speed(task["methods"]))
    parts.append(_method_table(task["methods"], own["methods"]))
    if own["heads"]:
      parts += [_head_table(own["heads"]), _plot_heads(own)]
    parts += [_lattice_table(lattice) for lattice in own["lattices"]]
    parts += [_decode(decode, vocabulary) for decode in own["decodes"]]
  body = "\n".join(parts)
  return (
      "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
      f"<title>Block efficiency</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
  )


def _text(value: Any) -> str:
  return html.escape(str(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  head = "".join(f"<th>{cell}</th>" for cell in header)
  body = "".join(
      "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
  )
  table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
  return f"<div class='wide'>{table}</div>"


def _task_line(task: Mapping[str, Any]) -> str:
  """Rows and quality in words."""
  line = f"{task['examples']} rows of {_text(task['split'])}"
  if task["tuning_examples"]:
    line += f", weights tuned on {task['tuning_examples']} others"
  if task["quality"] is not None:
    metric = task["main_metric"]
    floors = ", ".join(
        f"{_text(name.replace('_', ' '))} {value:.3f}"
        for name, value in task["quality_floors"].items()
    )
    line += f"; {_text(metric)} {task['quality'][metric]:.3f}, floors: {floors}"
  return f"<p>{line}; {task['repetition']['looping_rows']:.0%} of the outputs loop.</p>"


def _method_table(methods: Mapping[str, Any], analysis: Mapping[str, Any]) -> str:
  percent = lambda value: "" if value is None else f"{value:.1%}"
  rows = []
  for name, entry in methods.items():
    own = analysis.get(name, {})
    low, high = entry["block_efficiency_interval"]
    free = entry["block_efficiency_loop_free"]
    repeats, against = own.get("repetition"), own.get("against_plain", {})
    cost = own.get("cost", {})
    weights = ", ".join(
        f"{_text(scorer['scorer'])} {_weight(scorer['weight'])}"
        for scorer in entry.get("scorers", []) if "weight" in scorer
    )
    rows.append([
        _text(name), str(entry["nodes"]), f"{entry['block_efficiency']:.3f}",
        f"{low:.2f}–{high:.2f}", "" if free is None else f"{free:.3f}",
        *(closed_text(own, suffix) for suffix in ("", "_loop_free")),
        f"{entry['speedup_over_greedy']:.2f}×",
        f"{1e3 / entry['tokens_per_second']:.2f}",
        *(f"{cost[key] / 1e6:,.1f}" if cost else ""
          for key in ("parameter_bytes", "cache_bytes", "flops")),
        percent(repeats and repeats["consecutive"]),
        f"{repeats['longest_run']:.2f}" if repeats else "",
        *(percent(against.get(key)) for key in ("wins", "losses", "repairs", "regressions")),
        percent(entry["proved_searches"]), percent(own.get("replay_equals_live")), weights,
    ])
  return _table([
      "method", "nodes", "block efficiency", "95 %", "loop-free", "of the way to the oracle",
      "loop-free", "speed-up", "ms a token", "weights, MB a token", "cache, MB a token",
      "MFLOP a token", "repeated pairs", "longest run", "wins", "losses", "repairs", "regressions",
      "proved", "replay is live", "weights",
  ], rows)


def closed_text(entry: Mapping[str, Any], suffix: str) -> str:
  """The closed distance of a method, with its interval; empty where there is none.

  Args:
    entry: of a method, from `analyse_task`.
    suffix: "" for all rows, "_loop_free" for those that don't loop.
  """
  value = entry.get("closed_distance" + suffix)
  if value is None:
    return ""
  low, high = entry[f"closed_distance{suffix}_interval"]
  return f"{value:.1%} ({low:.0%} to {high:.0%})"


def _weight(weight: float | Sequence[float]) -> str:
  if isinstance(weight, int | float):
    return f"{weight:g}"
  return "[" + " ".join(f"{value:g}" for value in weight) + "]"


def _head_table(heads: Mapping[str, Any]) -> str:
  rows = [
      [
          str(i + 1), f"{heads['positions'][i]:,}", f"{heads['entropy'][i]:.2f}",
          *(f"{value:.1%}" for value in heads["recall"][i]),
      ]
      for i in range(len(heads["positions"]))
  ]
  note = f"<p>Entropy doesn't fall up to head {heads['rising_heads']}.</p>"
  names = ["head", "positions", "entropy, nats", "accuracy"]
  return _table([*names, *(f"among {k}" for k in RECALLS[1:])], rows) + note


def _lattice_table(lattice: Mapping[str, Any]) -> str:
  """What the steps of a drafter's lattices know, a row a step."""
  percent = lambda value: "" if value is None else f"{value:.1%}"
  number = lambda value: "" if value is None else f"{value:.2f}"
  rows = [
      [
          str(i + 1), f"{lattice['positions'][i]:,}", percent(lattice["drafted"][i]),
          number(lattice["entropy"][i]), *map(percent, lattice["recall"][i]),
          *map(number, lattice["oracle"][i]),
      ]
      for i in range(len(lattice["positions"]))
  ]
  names = ["step", "positions", "drafted", "entropy, nats"]
  names += [f"among {k}" for k in RECALLS] + [f"oracle of {k}" for k in RECALLS]
  draft = ", ".join(f"{key} {x}" for key, x in lattice["draft"].items() if x is not None)
  title = f"<p>Drafted by {_text(draft)}: {_text(', '.join(lattice['methods']))}</p>"
  return title + _table(names, rows)


def _plot_speed(methods: Mapping[str, Any]) -> str:
  """Speed-up over greedy against block efficiency, a point a method."""
  figure, (axes,) = _figure(7, 3.6)
  for name, entry in methods.items():
    x, y = entry["block_efficiency"], entry["speedup_over_greedy"]
    spans = [
        [[max(value - low, 0)], [max(high - value, 0)]]
        for value, (low, high) in (
            (x, entry["block_efficiency_interval"]), (y, entry["speedup_range"])
        )
    ]
    axes.errorbar([x], [y], xerr=spans[0], yerr=spans[1], fmt="o", markersize=4, linewidth=0.7)
    axes.annotate(name, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
  axes.axhline(1, color="grey", linewidth=0.7)
  axes.set(xlabel="block efficiency", ylabel="speed-up over greedy", title="a point a method")
  axes.grid(alpha=0.3)
  return _svg(figure)


def _svg(figure: Any) -> str:
  """A matplotlib figure as an inline drawing."""
  out = io.StringIO()
  figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
  text = out.getvalue()
  return f"<figure>{text[text.index('<svg'):]}</figure>"


def _figure(width: float, height: float, columns: int = 1):
  from matplotlib.figure import Figure

  figure = Figure((width, height))
  return figure, figure.subplots(1, columns, squeeze=False)[0]


def _plot_efficiency(results: Mapping[str, Any]) -> str:
  """Block efficiency of every method on every task, with its interval, a column a task."""
  tasks = results["tasks"]
  names = [name for name in next(iter(tasks.values()))["methods"] if name != "greedy"]
  figure, columns = _figure(2 + 3 * len(tasks), 1 + 0.18 * len(names), len(tasks))
  place = np.arange(len(names))[::-1]
  for axes, (task, own) in zip(columns, tasks.items()):
    entries = [own["methods"][name] for name in names]
    values = np.array([entry["block_efficiency"] for entry in entries])
    bounds = np.array([entry["block_efficiency_interval"] for entry in entries])
    axes.errorbar(
        values, place, xerr=np.maximum(np.abs(bounds.T - values), 0), fmt="o", markersize=4,
        linewidth=1,
    )
    axes.set(title=task, xlabel="block efficiency", yticks=[])
    axes.grid(axis="x", alpha=0.3)
  columns[0].set_yticks(place, names, fontsize=8)
  return _svg(figure)


def _plot_heads(analysis: Mapping[str, Any]) -> str:
  """Recall, entropy and oracle by head; by position the first method and the best."""
  heads = analysis["heads"]
  number = np.arange(1, len(heads["positions"]) + 1)
  figure, (left, middle, oracle, right) = _figure(14, 2.6, 4)
  for axes, values in ((left, heads["recall"]), (oracle, heads["oracle"])):
    for k, column in zip(RECALLS, np.array(values).T):
      axes.plot(number, column, marker=".", label=f"among {k}")
    axes.legend(fontsize=7)
  left.set(xlabel="head", title="recall", ylim=(0, 1.02))
  oracle.set(xlabel="heads", title="block efficiency of the best choice")
  middle.plot(number, heads["entropy"], marker=".")
  middle.set(xlabel="head", title="entropy, nats")
  methods = analysis["methods"]
  ranked = sorted(methods, key=lambda name: -methods[name]["block_efficiency"])
  for name in dict.fromkeys([*list(methods)[:1], *ranked[:1]]):
    places = methods[name]["by_position"]
    right.plot(
        [place["start"] for place in places], [place["block_efficiency"] for place in places],
        marker=".", label=name,
    )
  right.set(xlabel="position in the output", title="block efficiency")
  right.legend(fontsize=7)
  return _svg(figure)


def _decode(decode: Mapping[str, Any], vocabulary: Vocabulary) -> str:
  """A decoding, closed until it is clicked on."""
  calls = [_call(n, call, vocabulary)
           for n, call in enumerate(decode["calls"], start=1)]
  title = f"row {decode['row'] + 1} decoded with {_text(decode['method'])}: {len(calls)} calls"
  legend = (
      "<p>Each column is a step of the lattice, its best candidates from above; the chosen one "
      "is framed, green where it was accepted and red where not. Under each stand the drafter's "
      "log-probability and what each scorer adds"
      + (f" ({_text(', '.join(decode['scorers']))})" if decode["scorers"] else "")
      + ". Blue is the base model's own token.</p>"
  )
  return f"<details><summary>{title}</summary>{legend}{''.join(calls)}</details>"


def _call(number: int, watched: Mapping[str, Any], vocabulary: Vocabulary) -> str:
  call = watched["call"]
  accepted = call["emitted"][: len(call["accepted"])]
  free = call["emitted"][len(accepted) :]
  piece = lambda token: _text(vocabulary.piece(token)).replace("\n", "⏎")
  columns, on_path = [], True
  for i, step in enumerate(watched["steps"]):
    shown = list(range(min(SHOWN, len(step["tokens"]))))
    if step["chosen"] is not None and step["chosen"] not in shown:
      shown.append(step["chosen"])
    on_path &= (
        step["chosen"] is not None and i < len(accepted)
        and accepted[i] == step["tokens"][step["chosen"]]
    )
    cells = []
    for c in shown:
      kind = "candidate"
      if c == step["chosen"]:
        kind += " accepted" if on_path else " rejected"
      added = "".join(f" {part[c]:+.1f}" for part in step["scorers"])
      cells.append(
          f"<div class='{kind}'>{piece(step['tokens'][c])}"
          f"<small>{step['scores'][c]:.1f}{added}</small></div>"
      )
    columns.append(f"<div class='step'>{''.join(cells)}</div>")
  emitted = "".join(f"<span class='ok'>{piece(token)}</span>" for token in accepted)
  emitted += "".join(f"<span class='free'>{piece(token)}</span>" for token in free)
  return (
      f"<div class='call'><b>{number}</b> {emitted}"
      f"<div class='lattice'><div class='step'><div class='candidate root'>"
      f"{piece(watched['root'])}</div></div>{''.join(columns)}</div></div>"
  )


STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; font-size: 12px }
th, td { border-bottom: 1px solid #ddd; padding: 2px 8px; text-align: right }
th { vertical-align: bottom } td:first-child, th:first-child { text-align: left }
td { white-space: nowrap }
.wide { overflow-x: auto }
figure { margin: 1em 0; overflow-x: auto } figure svg { max-width: 100%; height: auto }
summary { cursor: pointer; margin: .5em 0 }
.call { border-top: 1px solid #ddd; padding: .4em 0; overflow-x: auto; white-space: pre }
.lattice { display: flex; gap: 4px; margin: .3em 0 }
.candidate { border: 1px solid #eee; padding: 1px 4px; font-family: monospace; color: #777 }
.candidate small { display: block; font-size: 9px }
.accepted { border: 2px solid #2a2; color: #000 } .rejected { border: 2px solid #c33; color: #000 }
.root { color: #000 } .ok { background: #cfc } .free { background: #cdf }
.ok, .free { font-family: monospace; margin-right: 1px }
"""
