"""Choice of weights by replay, and evaluation of methods that re-score."""

from collections import Counter
import dataclasses
import json
from pathlib import Path
import re
import runpy

import jax
import numpy as np
import pytest
from test_rescored_model import (  # noqa: F401
  arrays,
  base,
  CONFIG,
  greedy,
  HEADS,
  MAX_LENGTH,
  prompts,
  SMALL,
)

from bpd_jax.addons.folder import save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import save_model
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.scorers.ngram import NgramScorer
from bpd_jax.errors import InputError
from bpd_jax.evaluate import evaluate
from bpd_jax.evaluation.analysis import RECALLS
from bpd_jax.evaluation.drafting import Draft
from bpd_jax.evaluation.replay import count_calls, record
from bpd_jax.evaluation.run import Method
from bpd_jax.evaluation.scoring import CacheSource, load_scoring, NeuralSource, NgramSource
from bpd_jax.evaluation.tuning import split_rows, tune, Tuned, Tuning
from bpd_jax.generation import load
from bpd_jax.launch import read_gin_files
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.ngram_lm.arpa import write_arpa
from bpd_jax.ngram_lm.backoff import join_sequences
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.smoothing import kneser_ney
from bpd_jax.partitioning import single_device

GRID = (0.0, 0.3, 1.0, 4.0)


def test_rows_are_chosen_by_what_they_are():
  texts = [f"row {i}" for i in range(50)]
  tuning, reported = split_rows(texts, 12)
  assert len(tuning) == 12 and sorted(tuning + reported) == list(range(50))
  other = list(reversed(texts))
  again, _ = split_rows(other, 12)
  assert {other[i] for i in again} == {texts[i] for i in tuning}
  assert tuning != list(range(12))
  assert split_rows(texts, 0) == ([], list(range(50)))
  with pytest.raises(InputError, match="Tuning.num_rows = 50: allowed is fewer than the task's 50"):
    split_rows(texts, 50)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_rows": 0}, "num_rows = 0"), ({"grid": ()}, "grid"), ({"grid": (-1.0,)}, "grid"),
        ({"grid": (float("nan"),)}, "grid"), ({"entropy_powers": ()}, "entropy_powers"),
        ({"rounds": 0}, "rounds = 0"),
    ],
)
def test_tunings_that_are_none(options, message):
  with pytest.raises(InputError, match=f"Tuning.{message}"):
    Tuning(**options)


def test_the_weight_with_the_fewest_calls_wins(base, arrays, prompts, greedy):  # noqa: F811
  method = Method("both", Draft(top_k=4), search="p_best", scorers=(CacheSource(), CacheSource()))
  scoring = [
      Scoring(NgramScorer(2), arrays),
      *load_scoring((CacheSource(order=2),), base),
  ]
  with jax.enable_x64(True):
    recording = record(base, prompts, greedy, MAX_LENGTH)

    def efficiency(*weights):
      parts = [dataclasses.replace(x, weight=w) for x, w in zip(scoring, weights)]
      tokens, calls = count_calls(base, recording, scoring=parts, **method.options(base))
      return tokens.sum() / calls.sum()

    chosen, best = tune(
        base, recording, method, scoring, Tuning(grid=GRID, rounds=1)
    )
    first = [efficiency(w, 1.0) for w in GRID]
    second = [efficiency(GRID[int(np.argmax(first))], w) for w in GRID]
    assert len(set(first)) > 2  # otherwise any choice would be right
    assert [x.weight for x in chosen] == [
        GRID[int(np.argmax(first))], GRID[int(np.argmax(second))]
    ]
    assert best == max(second)
    by_step, better = tune(
        base, recording, method, scoring, Tuning(grid=GRID, rounds=1, by_step=True)
    )
    assert better > best and len(set(by_step[0].weight)) > 1
    assert better == efficiency(by_step[0].weight, by_step[1].weight)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A model with heads, a smaller one, 4-grams, and rows, over bytes."""
  root = tmp_path_factory.mktemp("refine")
  vocabulary = root / "tokenizer_config.json"
  vocabulary.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
  rng = np.random.default_rng(0)
  for name, config, heads in (("base", CONFIG, HEADS), ("small", SMALL, Heads(1))):
    config = dataclasses.replace(
        config, vocab_size=384, dtype="float32", param_dtype="float32", accum_dtype="float32"
    )
    params = init_params(config, single_device(), jax.random.key(3))
    own = heads.begin(config, single_device(), jax.random.key(4))
    if heads.block_size > 1:
      own["w2"] = 0.3 * jax.random.normal(jax.random.key(1), own["w2"].shape)
    save_model_with(root / name, config, params, vocabulary, heads, own)
  rows = [rng.integers(3, 200, 20) for _ in range(50)]
  model = kneser_ney(count_grams(join_sequences(rows, 384), 4, 384), (1,) * 4)
  write_arpa(root / "four.arpa", model, {})
  with open(root / "rows.jsonl", "w") as file:
    for i in range(14):
      file.write(json.dumps({"inputs": f"row number {i}"}) + "\n")
  return root


FEW = ("blockwise", "best16_4gram", "neural_ngram", "oracle_k4")
ALL = (
    *FEW, "local_neural", "ngram2", "ngram4", "best16_0gram", "first_0gram", "first_4gram", "cache",
    "first_cache", "no_repeat", "oracle_k2", "oracle_k8", "oracle_k16",
)


# All of them compile 32 loops, two minutes; the few, of every kind, are always run.
@pytest.mark.parametrize("names", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_run_file_refines_drafts_and_reports_rows_that_it_did_not_tune_on(
    folders, tmp_path, names
):
  read_gin_files(["gin/runs/evaluate_refined.gin"], [
      f"CHECKPOINT = '{folders / 'base'}'", f"OUTPUT = '{tmp_path / 'out'}'",
      f"NGRAM = '{folders / 'four.arpa'}'", f"NEURAL = '{folders / 'small'}'",
      "TASKS = [@mine/JsonlTask()]", "mine/JsonlTask.name = 'rows'",
      f"mine/JsonlTask.path = '{folders / 'rows.jsonl'}'", "MAX_DECODE_LENGTH = 12",
      "REPEATS = 1", "BATCH_SIZE = 8", "TUNING_ROWS = 6", "TOP_K = 4", "NUM_PATHS = 5",
      "Tuning.grid = [0.5, 2.0]", "Tuning.rounds = 1",
      *([] if names == ALL else [
          f"evaluate.methods = [{', '.join(f'@{name}/Method()' for name in names)}]"
      ]),
  ])
  results = evaluate()
  task = results["tasks"]["rows"]
  assert (task["examples"], task["tuning_examples"]) == (8, 6)
  methods = task["methods"]
  assert set(methods) == {"greedy", *names}
  texts = [json.loads(line)["inputs"] for line in open(folders / "rows.jsonl")]
  tuning, reported = split_rows(texts, 6)
  lines = (tmp_path / "out/rows.best16_4gram.jsonl").read_text().splitlines()
  assert [json.loads(line)["inputs"] for line in lines] == [texts[i] for i in reported]
  for name, entry in methods.items():
    assert entry["tokens"] == methods["greedy"]["tokens"], name
    assert entry["identical_to_greedy"] == 1
    for scorer in entry.get("scorers", []):
      if scorer["scorer"] in ("Ngram", "Neural", "Cache"):
        assert scorer["weight"] in (0.5, 2.0)
    assert ("tuning_block_efficiency" in entry) == bool(entry.get("scorers"))
  assert 1 <= methods["best16_4gram"]["tuning_block_efficiency"] < 4
  assert methods["best16_4gram"]["nodes"] == 1 + 5 * 4
  assert methods["best16_4gram"]["scorers"][0]["scorer"] == "Ngram"
  explained = Path("docs/reading_results.md").read_text()
  assert not [key for key in methods["best16_4gram"] if f"`{key}`" not in explained]
  assert 0 < methods["best16_4gram"]["proved_searches"] <= 1
  calls = {name: entry["decoder_calls"] for name, entry in methods.items()}
  if names == FEW:
    check_report(tmp_path / "out", "rows", methods)
    check_taken_over(folders, tmp_path, methods)
  else:
    check_tables(tmp_path / "out", "rows", methods)
  oracles = [calls[f"oracle_k{k}"] for k in (2, 4, 8, 16) if f"oracle_k{k}" in calls]
  assert oracles == sorted(oracles, reverse=True) and oracles[-1] < calls["greedy"]


def check_tables(folder, task, methods):
  """The paper's tables hold what the evaluation measured, here as its own other batch size."""
  module = runpy.run_path("experiments/refined_drafts/tables.py")
  module["main"]([str(folder), "--single", str(folder)])
  assert "<svg" in (folder / "figures.svg").read_text()
  lines = (folder / "tables.md").read_text().splitlines()
  plain = methods["blockwise"]["block_efficiency"]
  (start,) = (i for i, line in enumerate(lines) if line.startswith("**Is a gain in block"))
  timed = lines[start:]
  for name, entry in methods.items():
    (line,) = (line for line in timed if line.startswith(f"| {task} | {name} | "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3] == f"{entry['block_efficiency'] / plain - 1:+.1%}"
    assert cells[4] == cells[7] == f"{1e3 / entry['tokens_per_second']:.2f}"
    # One pass has no spread: each method is on one side of plain drafts.
    seconds, plain_seconds = entry["seconds"], methods["blockwise"]["seconds"]
    word = "" if name == "blockwise" else ", faster" if seconds < plain_seconds else ", slower"
    assert cells[6] == cells[9] and cells[6].endswith(word)
  usable = {
      name: entry["tuning_block_efficiency"] for name, entry in methods.items()
      if entry.get("scorers") and entry["nodes"] <= 16 and "oracle" not in name
  }
  best = module["chosen_method"]({"methods": methods})
  assert usable[best] == max(usable.values()) and len(usable) > 5
  assert any(line.startswith(f"| {task} | {best} | {methods[best]['nodes']} | ") for line in lines)
  analysis = json.loads((folder / "analysis.json").read_text())[task]
  (line,) = (line for line in lines if line.startswith(f"| {task} | 16 | 1.00 | "))
  oracle = [row[RECALLS.index(16)] for row in analysis["heads"]["oracle"]]
  assert line.split(" | ")[2:] == [f"{x:.2f}" for x in oracle[:-1]] + [f"{oracle[-1]:.2f} |"]
  own = analysis["methods"]["best16_4gram"]
  low, high = own["closed_distance_interval"]
  assert low <= own["closed_distance"] <= high
  assert any(
      line.startswith("| best16_4gram | ")
      and f"{own['closed_distance']:.1%} ({low:.0%} to {high:.0%})" in line for line in lines
  )


def check_taken_over(folders, folder, methods):
  """An evaluation under other conditions has the weights of the first, on its reported rows."""
  method = Method(
      "best16_4gram", Draft(top_k=4), search="p_best", num_paths=5,
      scorers=(NgramSource(str(folders / "four.arpa"), 4),),
  )
  tuned = Tuned(str(folder / "out"))
  task = JsonlTask("rows", str(folders / "rows.jsonl"), max_examples=9)
  again = lambda tasks, methods, tuning=tuned: evaluate(
      str(folders / "base"), tasks, methods, str(folder / "again"), batch_size=1,
      max_decode_length=12, repeats=1, tuning=tuning, has_report=False,
  )
  unlike = dataclasses.replace(method, scorers=(NgramSource(str(folders / "four.arpa"), 2),))
  for tasks, methods_given, message in (
      ([dataclasses.replace(task, name="other")], [method],
       r"tasks = 'other': allowed is .*\['rows'\]"),
      ([task], [unlike], "best16_4gram = .*'order': 2.* allowed is as in .*'order': 4"),
      ([task], [dataclasses.replace(method, name="mine")],
       "methods = 'mine': allowed is .*'best16_4gram'"),
  ):
    with pytest.raises(InputError, match=message):
      again(tasks, methods_given)
  with pytest.raises(InputError, match="file = .*nowhere/results.json"):
    again([task], [method], Tuned(str(folder / "nowhere")))
  # Another start, so that the weight can come from nowhere else.
  start = dataclasses.replace(method.scorers[0], weight=7.0)
  found = again([task], [dataclasses.replace(method, scorers=(start,))])["tasks"]["rows"]
  texts = [json.loads(line)["inputs"] for line in open(folders / "rows.jsonl")]
  _, reported = split_rows(texts, 6)
  lines = (folder / "again/rows.best16_4gram.jsonl").read_text().splitlines()
  assert [json.loads(x)["inputs"] for x in lines] == [texts[i] for i in reported if i < 9]
  assert 0 < found["examples"] == len(lines) < 8 and found["tuning_examples"] == 6
  entry, first = found["methods"]["best16_4gram"], methods["best16_4gram"]
  assert entry["scorers"] == first["scorers"]
  assert entry["tuning_block_efficiency"] == first["tuning_block_efficiency"]


def check_report(folder, task, methods):
  """The page holds every method, needs nothing from outside, and shows what was decoded."""
  analysis = json.loads((folder / "analysis.json").read_text())
  page = (folder / "report.html").read_text()
  own = analysis[task]
  assert set(own["methods"]) == set(methods) - {"greedy"}
  for name, entry in own["methods"].items():
    # Replay in another batch and program counts what live decoding counted.
    assert entry["block_efficiency"] == pytest.approx(methods[name]["block_efficiency"], rel=0.02)
    assert entry["replay_equals_live"] >= 7 / 8
    if entry["replay_equals_live"] == 1:
      assert entry["block_efficiency"] == methods[name]["block_efficiency"]
    assert f"<td>{name}</td>" in page
  oracle = own["methods"]["oracle_k4"]
  assert oracle["block_efficiency"] == own["heads"]["oracle"][-1][RECALLS.index(4)]
  assert oracle["closed_distance"] == 1
  assert own["methods"]["blockwise"]["closed_distance"] == 0
  cost = {name: entry["cost"] for name, entry in own["methods"].items()}
  # A small model has weights of its own; n-grams only make calls fewer.
  plain, ngram, neural = (
      cost[name]["parameter_bytes"] * own["methods"][name]["block_efficiency"]
      for name in ("blockwise", "best16_4gram", "neural_ngram")
  )
  assert neural > ngram == pytest.approx(plain)
  assert f"<td>{cost['blockwise']['flops'] / 1e6:,.1f}</td>" in page
  links = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"'\s>)]+)", page)
  assert all(link.startswith("#") for link in links), links
  assert page.count("<svg") == 3 and "<script" not in page
  decodes = own["decodes"]
  refined = ("best16_4gram", "neural_ngram")
  best = max(refined, key=lambda name: own["methods"][name]["block_efficiency"])
  rows = Counter(decode["method"] for decode in decodes)
  assert rows == {name: 2 if name in ("blockwise", best) else 1 for name in own["methods"]}
  # One lattice for all: the same heads draft.
  (lattice,) = own["lattices"]
  assert lattice["methods"] == [*own["methods"]]
  assert lattice["oracle"][-1][RECALLS.index(4)] == oracle["block_efficiency"]
  assert f"<p>Drafted by drafter Draft: {', '.join(own['methods'])}</p>" in page
  for decode in decodes:
    assert f"decoded with {decode['method']}: {len(decode['calls'])} calls" in page


def test_files_that_are_not_this_models(folders, tmp_path):
  model = load(folders / "base")
  with pytest.raises(InputError, match="NgramSource.order = 5: allowed is 1 … 4"):
    load_scoring((NgramSource(str(folders / "four.arpa"), 5),), model)
  config = ModelConfig(
      vocab_size=400, d_model=8, d_ff=8, d_kv=8, num_heads=1, num_encoder_layers=1,
      num_decoder_layers=1,
  )
  save_model(
      tmp_path / "other", config, init_params(config, single_device(), jax.random.key(0)),
      folders / "tokenizer_config.json",
  )
  with pytest.raises(InputError, match="NeuralSource.checkpoint = .* allowed is one of the model"):
    load_scoring((NeuralSource(str(tmp_path / "other")),), model)
