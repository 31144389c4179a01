"""Evaluation of a model folder: figures recomputed by hand, files, and bad input."""

import copy
import importlib
import io
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest
from rich.console import Console

from bpd_jax.addons.folder import save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.rows import rows_fingerprint, RowsTask, TASKS
from bpd_jax.decoding.drafters.empty import EmptyDrafter
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.errors import InputError
from bpd_jax.evaluate import evaluate, main
from bpd_jax.evaluation.drafting import describe_draft, Draft, Reference
from bpd_jax.evaluation.quality import edit_similarity, exact_match, rouge_l
from bpd_jax.evaluation.run import (
    describe_generation,
    describe_method,
    measure_methods,
    Method,
    method_identity,
)
from bpd_jax.evaluation.scoring import NeuralSource, NgramSource
from bpd_jax.evaluation.table import means_over_learned, print_results
from bpd_jax.evaluation.tuning import Tuning
from bpd_jax.generation import Call, Generation, load
from bpd_jax.launch import read_gin_files, run
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.ngram_lm.arpa import write_arpa
from bpd_jax.ngram_lm.backoff import join_sequences
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.smoothing import kneser_ney
from bpd_jax.partitioning import single_device
from bpd_jax.programs import num_compilations

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ModelConfig(
    vocab_size=384, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2,
)
HEADS = Heads(4, 16)
TEXTS = ["one row", "another, longer row of text", "ü — é", "the last row"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  vocabulary = folder / "tokenizer_config.json"
  vocabulary.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
  params = init_params(CONFIG, single_device(), jax.random.key(3))
  own = HEADS.begin(CONFIG, single_device(), jax.random.key(4))
  save_model_with(folder / "model", CONFIG, params, vocabulary, HEADS, own)
  return folder / "model"


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
  path.write_text("".join(json.dumps({"inputs": text}) + "\n\n" for text in TEXTS))
  return path


@pytest.fixture(scope="module")
def evaluated(model_folder, rows_file, tmp_path_factory):
  output = tmp_path_factory.mktemp("out") / "results"
  results = evaluate(
      str(model_folder), [JsonlTask("rows", str(rows_file))],
      [Method("blockwise"), Method("narrow", Draft(2)), Method("perfect", Reference())],
      str(output), max_decode_length=20, batch_size=3, repeats=2,
  )
  return results, output


def test_results_are_those_of_the_outputs(evaluated, model_folder):
  results, output = evaluated
  assert json.loads((output / "results.json").read_text()) == results
  task = results["tasks"]["rows"]
  assert task["examples"] == len(TEXTS) and task["split"] == "test"
  assert list(task["methods"]) == ["greedy", "blockwise", "narrow", "perfect"]
  model = load(model_folder)
  greedy = model.generate(TEXTS, "greedy", max_length=20, batch_size=3)
  for name, entry in task["methods"].items():
    lines = [json.loads(x) for x in (output / f"rows.{name}.jsonl").read_text().splitlines()]
    assert [line["inputs"] for line in lines] == TEXTS
    assert [line["tokens"] for line in lines] == [row.tolist() for row in greedy.tokens]
    assert [line["output"] for line in lines] == greedy.texts
    tokens = sum(len(line["tokens"]) for line in lines)
    calls = sum(line["decoder_calls"] for line in lines)
    assert (entry["tokens"], entry["decoder_calls"]) == (tokens, calls)
    assert entry["block_efficiency"] == tokens / calls
    assert entry["tokens_per_second"] == pytest.approx(tokens / entry["seconds"])
    assert (entry["identical_to_greedy"], entry["near_tie_rows"]) == (1.0, 0)
    # Every call emits its accepted tokens and one more, but where a row ends.
    histogram = entry["accepted_length_histogram"]
    assert sum(histogram) == calls
    accepted = sum(i * n for i, n in enumerate(histogram))
    assert tokens - len(TEXTS) <= accepted + calls <= tokens + len(TEXTS)
  assert task["methods"]["greedy"]["block_efficiency"] == 1.0
  assert task["methods"]["greedy"]["accepted_length_histogram"] == [
      task["methods"]["greedy"]["tokens"]
  ]
  perfect = sum(1 + -(-(len(row) - 1) // 4) for row in greedy.tokens)
  assert task["methods"]["perfect"]["decoder_calls"] == perfect
  assert [task["methods"][name]["nodes"] for name in task["methods"]] == [1, 4, 2, 4]


def test_counts_of_a_hand_made_generation():
  looping, free = np.array([5, 6, 7] * 5), np.array([3, 4, 5, 6])
  generation = Generation(
      tokens=[looping, free], calls=[3, 2],
      traces=[
          [Call([], [5]), Call([6, 7, 5], [6, 7, 5, 6, 7, 5, 6], accepted=[0, 1, 2]),
           Call([1, 2], [7])],
          [Call([], [3]), Call([4, 9], [4, 5, 6], accepted=[0])],
      ],
      texts=None, seconds=[1.0], is_warm=[True],
  )
  found = describe_generation(generation)
  assert found["tokens"] == 19 and found["decoder_calls"] == 5
  assert found["block_efficiency"] == 19 / 5
  assert found["block_efficiency_loop_free"] == 2.0
  assert found["accepted_length_histogram"] == [3, 1, 0, 1]
  low, high = found["block_efficiency_interval"]
  assert low == 2.0 and high == 5.0


def test_jsonl_rows_and_their_errors(tmp_path):
  path = tmp_path / "some.jsonl"
  path.write_text('{"q": "a", "a": "b"}\n\n{"q": "c", "a": "d"}\n')
  task = JsonlTask("qa", str(path), inputs="q", targets="a")
  assert task.rows() == [{"inputs": "a", "targets": "b"}, {"inputs": "c", "targets": "d"}]
  assert JsonlTask("qa", str(path), inputs="q", max_examples=1).rows() == [{"inputs": "a"}]
  path.write_text('{"q": "a"}\n{"q": \n')
  with pytest.raises(InputError, match=r"some\.jsonl:2 = '\{\"q\": ': allowed is JSON"):
    JsonlTask("qa", str(path), inputs="q").rows()
  path.write_text('{"q": "a"}\n[1]\n')
  with pytest.raises(InputError, match=r"some\.jsonl:2 q = None: allowed is a text"):
    JsonlTask("qa", str(path), inputs="q").rows()
  with pytest.raises(InputError, match=r"some\.jsonl:1 a = None"):
    task.rows()
  path.write_text("\n")
  with pytest.raises(InputError, match=r"file = .*some\.jsonl': allowed is at least one row"):
    task.rows()
  # JSON allows line separators inside texts.
  path.write_text('{"q": "a\u2028b"}\n')
  assert JsonlTask("qa", str(path), inputs="q").rows() == [{"inputs": "a\u2028b"}]
  with pytest.raises(InputError, match=r"qa path = .*absent': allowed is a UTF-8 text file \(No"):
    JsonlTask("qa", str(tmp_path / "absent")).rows()
  path.write_bytes(b'{"q": "a"}\n{"q": "\xe9"}\n')
  with pytest.raises(InputError, match=r"some\.jsonl:2 = b'\\xe9': allowed is text in UTF-8"):
    JsonlTask("qa", str(path), inputs="q").rows()
  # Half of a character, in a field that is read. The pair is one.
  path.write_text(r'{"q": "\ud83d\ude00", "a": "x"}' + "\n" + r'{"q": "c", "a": "\ude00"}' + "\n")
  assert JsonlTask("qa", str(path), inputs="q").rows()[0] == {"inputs": "\U0001f600"}
  with pytest.raises(InputError, match=r"some\.jsonl:2 a = '\\ude00': allowed is text in UTF-8"):
    task.rows()


@pytest.mark.parametrize(
    "methods, message",
    [
        ([Method("blockwise", Draft(5))], "block_size = 5: allowed is 1 … 4"),
        ([Method("blockwise", Draft(0))], "block_size = 0: allowed is 1 … 4"),
        ([Method("perfect", Reference(0))], "Reference.block_size = 0: allowed is a positive"),
        ([Method("a"), Method("a", Draft(2))], "methods = .*names that differ"),
        ([Method("greedy", Draft(2))], "methods = .*names that differ"),
        ([Method("a", "sampling")], "method = 'sampling': allowed is one of"),
    ],
)
def test_methods_that_the_model_lacks(model_folder, rows_file, tmp_path, methods, message):
  with pytest.raises(InputError, match=message):
    evaluate(str(model_folder), [JsonlTask("rows", str(rows_file))], methods,
             str(tmp_path / "out"))
  assert not os.listdir(tmp_path)


KEYS = {
    "device", "dtype", "mesh", "git_revision", "versions", "rows_fingerprint", "checkpoint",
    "batch_size", "max_decode_length", "repeats", "tasks", "means_over_learned_tasks",
}
TASK_KEYS = {
    "split", "examples", "cut_rows", "left_out_rows", "tuning_examples", "rows_fingerprint",
    "learned", "main_metric", "quality", "quality_interval", "quality_floors", "repetition",
    "unfinished_rows", "methods",
}
METHOD_KEYS = {
    "block_size", "draft", "nodes", "tokens", "decoder_calls", "block_efficiency",
    "block_efficiency_interval", "block_efficiency_loop_free", "identical_to_greedy",
    "near_tie_rows", "seconds", "seconds_range", "tokens_per_second", "speedup_over_greedy",
    "speedup_range", "accepted_length_histogram", "proved_searches",
    "nodes_per_call", "wasted_tokens",
}


def test_every_key_is_there_and_explained(evaluated):
  results, _ = evaluated
  explained = (ROOT / "docs/reading_results.md").read_text()
  task = results["tasks"]["rows"]
  found = [results, task, *task["methods"].values()]
  for keys, entry in zip([KEYS, TASK_KEYS] + [METHOD_KEYS] * 4, found, strict=True):
    assert set(entry) == keys
    assert not [key for key in keys if f"`{key}`" not in explained]
  for key in ("quality", "quality_interval", "quality_floors", "learned", "main_metric"):
    assert task[key] is None
  assert results["means_over_learned_tasks"] == {"tasks": [], "methods": {}}
  assert results["rows_fingerprint"] == task["rows_fingerprint"] == rows_fingerprint(
      [{"inputs": text} for text in TEXTS]
  )


CHOSEN = ("docstring_lm", "code_format", "grammar")


@pytest.fixture(scope="module")
def evaluated_rows(model_folder, tmp_path_factory):
  """The run file's tiny variant, on one task of each metric."""
  output = tmp_path_factory.mktemp("out") / "results"
  read_gin_files(["gin/runs/evaluate_tiny.gin"], [
      f"CHECKPOINT = '{model_folder}'", f"OUTPUT = '{output}'", "SPLIT = 'validation'",
      "MAX_EXAMPLES = 2",
      "TASKS = [@docstring_lm/RowsTask(), @code_format/RowsTask(), @grammar/RowsTask()]",
  ])
  try:
    return gin.get_configurable("evaluate")(), output
  finally:
    gin.clear_config()


def test_quality_is_that_of_the_outputs(evaluated_rows):
  results, output = evaluated_rows
  assert tuple(results["tasks"]) == CHOSEN
  for name, task in results["tasks"].items():
    rows = RowsTask(name, "validation", 2).rows()
    lines = [json.loads(x) for x in (output / f"{name}.greedy.jsonl").read_text().splitlines()]
    assert [(x["inputs"], x["targets"]) for x in lines] == [
        (x["inputs"], x["targets"]) for x in rows
    ]
    for metric in (rouge_l, exact_match, edit_similarity):
      scores = [metric(line["targets"], line["output"]) for line in lines]
      assert task["quality"][metric.__name__] == pytest.approx(np.mean(scores))
    main = task["quality"][task["main_metric"]]
    low, high = task["quality_interval"]
    assert low <= main <= high
    assert set(task["quality_floors"]) == {"another_reference", "input_start"}
    # Nobody trained it.
    assert task["learned"] is False
    assert task["examples"] == 2 and task["rows_fingerprint"] == rows_fingerprint(rows)
  every = [row for name in CHOSEN for row in RowsTask(name, "validation", 2).rows()]
  assert results["rows_fingerprint"] == rows_fingerprint(every)
  assert results["means_over_learned_tasks"] == {"tasks": [], "methods": {}}


def printed(results):
  console = Console(file=io.StringIO(), width=60)
  print_results(results, console)
  return console.file.getvalue()


def test_table_says_quality_beside_efficiency(evaluated_rows):
  results, _ = copy.deepcopy(evaluated_rows)
  assert "mean of 0 learned of 3" in printed(results)
  tasks = results["tasks"]
  for name, efficiency, speedup in (("docstring_lm", 2.0, 0.5), ("grammar", 3.0, 2.0)):
    tasks[name]["learned"] = True
    tasks[name]["methods"]["blockwise"] |= {
        "block_efficiency": efficiency, "speedup_over_greedy": speedup
    }
  tasks["code_format"]["methods"]["blockwise"] |= {"block_efficiency": 7.77}
  tasks["mine"] = tasks["grammar"] | {"quality": None, "learned": None}
  results["means_over_learned_tasks"] = means_over_learned(tasks)
  found = printed(results)
  lines = found.splitlines()
  # A method's line ends with its figures, however narrow the terminal.
  assert any(re.search(r"7\.770 .* 100\.0% +0 .*×", line) for line in lines)
  assert found.count("*not learned*") == 1
  assert sum(line.split()[:1] == ["learned"] for line in lines) == 2
  assert found.count("no references, ") == 1
  code_format = found[found.index(" code_format"):found.index(" grammar")]
  floors = tasks["code_format"]["quality_floors"]
  assert f"another reference {floors['another_reference']:.3f}" in code_format
  assert f"input's start {floors['input_start']:.3f}" in code_format
  assert f"edit_similarity {tasks['code_format']['quality']['edit_similarity']:.3f}" in code_format
  mean = found[found.index("mean of 2 learned of 4"):]
  # 2 and 3, and the geometric mean of 1/2 and 2; nothing of the 7.77.
  assert re.search(r"blockwise +2\.500 +1\.00×", mean)


def test_names_whose_files_would_be_one_are_refused(model_folder, rows_file, tmp_path):
  tasks = [JsonlTask(name, str(rows_file)) for name in ("a", "a.b")]
  with pytest.raises(InputError, match=r"^names = \[.*'a\.b\.c', 'a\.b\.c', .*TASK\.METHOD that"):
    evaluate(str(model_folder), tasks, [Method("b.c"), Method("c")], str(tmp_path / "out"))


def test_a_task_may_have_any_name(model_folder, rows_file, tmp_path):
  """That of what the folder keeps for itself as well."""
  results = evaluate(
      str(model_folder), [JsonlTask("identity", str(rows_file))], [], str(tmp_path / "out"),
      max_decode_length=4, repeats=1,
  )
  assert list(results["tasks"]) == ["identity"]


class Plain(EmptyDrafter):
  """A drafter that says nothing of itself."""


def test_a_drafter_is_the_same_in_another_process():
  one, other = (method_identity(Method("mine", Plain())) for _ in range(2))
  assert one == other and one["draft"]["drafter"] == "Plain"
  # How a drafter's own lattice is searched is told as of any.
  searched = Method("mine", Plain(), "p_best", num_paths=8)
  assert describe_method(searched, ())["search"] == "p_best"
  assert describe_draft(ReferenceDrafter(3)) == {"drafter": "ReferenceDrafter", "depth": 3}


def test_existing_output_is_refused(model_folder, rows_file, tmp_path):
  with pytest.raises(InputError, match="folder = .*a path where nothing is yet"):
    evaluate(str(model_folder), [JsonlTask("rows", str(rows_file))], [], str(tmp_path))


def test_output_that_cannot_be_written_is_refused_before_the_model_is_read(
    model_folder, rows_file, tmp_path
):
  (tmp_path / "file").write_text("")
  (tmp_path / "model").mkdir()
  shutil.copy(model_folder / "model.json", tmp_path / "model")  # No parameters.
  with pytest.raises(InputError, match="folder = .*file/out': allowed is a path that can be writt"):
    evaluate(
        str(tmp_path / "model"), [JsonlTask("rows", str(rows_file))], [], str(tmp_path / "file/out")
    )


def test_an_evaluation_that_was_cut_off_goes_on(
    model_folder, rows_file, tmp_path, monkeypatch, capsys
):
  measured = []

  def measure(*args, label, **options):
    if label == "second" and len(measured) == 1:
      measured.append("cut")
      raise KeyboardInterrupt
    measured.append(label)
    return measure_methods(*args, label=label, **options)

  monkeypatch.setattr("bpd_jax.evaluation.task.measure_methods", measure)
  first, second = (JsonlTask(name, str(rows_file)) for name in ("first", "second"))
  run_it = lambda tasks, **options: evaluate(
      str(model_folder), tasks, [Method("blockwise")], str(tmp_path / "out"),
      max_decode_length=8, repeats=1, **options,
  )
  with pytest.raises(KeyboardInterrupt):
    run_it([first, second])
  assert not (tmp_path / "out").exists()
  results = run_it([first, second])
  assert measured == ["first", "cut", "second"]
  assert "first: evaluated before" in capsys.readouterr().out
  assert list(results["tasks"]) == ["first", "second"]
  names = sorted(os.listdir(tmp_path / "out"))
  assert names == sorted(
      ["results.json"] + [f"{task}.{method}.jsonl" for task in ("first", "second")
                          for method in ("greedy", "blockwise")]
  )


DRAFTER = '''
import dataclasses
from bpd_jax.decoding.drafters.empty import EmptyDrafter

@dataclasses.dataclass(frozen=True)
class Mine(EmptyDrafter):
  depth: int = 0
'''


def test_an_evaluation_that_was_cut_off_goes_on_with_the_same_contents_alone(
    model_folder, tmp_path, monkeypatch
):
  """Files that moved are the same; one that was edited under its name is named."""
  here = tmp_path / "here"
  shutil.copytree(model_folder, here / "model")
  shutil.copytree(model_folder, here / "small")
  (here / "model/spare.json").write_text("spare")
  (here / "rows.jsonl").write_text('{"inputs": "one row"}\n')
  sequences = [np.array([3, 4, 5]), np.array([4, 5])]
  counts = count_grams(join_sequences(sequences, CONFIG.vocab_size), 2, CONFIG.vocab_size)
  ngrams = kneser_ney(counts, (1, 1))
  write_arpa(here / "two.arpa", ngrams, {})
  (here / "mine.py").write_text(DRAFTER)
  monkeypatch.syspath_prepend(here)
  mine = importlib.import_module("mine")

  def measure(*args, label, **options):
    if label == "second":
      raise KeyboardInterrupt
    return measure_methods(*args, label=label, **options)

  monkeypatch.setattr("bpd_jax.evaluation.task.measure_methods", measure)

  def run_it(folder, **options):
    tasks = [JsonlTask(name, str(folder / "rows.jsonl")) for name in ("first", "second")]
    methods = [
        Method("ngrams", Draft(top_k=2), scorers=(NgramSource(str(folder / "two.arpa")),)),
        Method("neural", Draft(top_k=2), scorers=(NeuralSource(str(folder / "small")),)),
        Method("mine", mine.Mine()),
    ]
    evaluate(f"{folder / 'model'}/", tasks, methods, str(tmp_path / "out"),
             max_decode_length=4, **({"repeats": 1} | options))

  with pytest.raises(KeyboardInterrupt):
    run_it(here)
  there = tmp_path / "there"
  shutil.copytree(here, there)
  with pytest.raises(KeyboardInterrupt):  # It goes on, and is cut off again.
    run_it(there)
  with pytest.raises(InputError, match="^repeats = 2: allowed is 1, as when .*/out was begun; to"):
    run_it(there, repeats=2)

  def refuses(name, field):
    """Changes a file, its size and times as they were."""
    path = there / name
    data, times = path.read_bytes(), path.stat()
    path.write_bytes(data.replace(b"e", b"f"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=f"^{field} = .*: allowed is .*, as when .*/out was begun"):
      run_it(there)
    path.write_bytes(data)

  refuses("model/spare.json", "checkpoint")
  refuses("small/model.json", r"methods\.neural\.scorers")
  refuses("two.arpa", r"methods\.ngrams\.scorers")
  refuses("two.json", r"methods\.ngrams\.scorers")
  (there / "rows.jsonl").write_text('{"inputs": "no row"}\n')
  with pytest.raises(InputError, match=r"^tasks\.first\.rows = .*, as when .*/out was begun"):
    run_it(there)
  (here / "mine.py").write_text(DRAFTER + "# another\n")
  with pytest.raises(InputError, match=r"^methods\.mine\.draft\.module = '\w{16}': allowed is"):
    run_it(there)


def test_tasks_that_are_only_measured_share_programs(
    model_folder, rows_file, tmp_path, monkeypatch
):
  compiled = []

  def measure(*args, **options):
    before = num_compilations()
    measured = measure_methods(*args, **options)
    compiled.append(num_compilations() - before)
    return measured

  monkeypatch.setattr("bpd_jax.evaluation.task.measure_methods", measure)
  evaluate(
      str(model_folder), [JsonlTask(name, str(rows_file)) for name in ("first", "second")],
      [Method("blockwise")], str(tmp_path / "out"), max_decode_length=9, repeats=1,
  )
  assert compiled[0] > 0 and compiled[1] == 0


def test_missing_checkpoint_leaves_no_output(rows_file, tmp_path):
  with pytest.raises(InputError, match="^model folder = 'absent': allowed is a folder that exis"):
    evaluate("absent", [JsonlTask("rows", str(rows_file))], [], str(tmp_path / "new/out"))
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("line, message", [
    ('{"inputs": "  "}', r" = '  ': allowed is a text that isn't empty"),
    (json.dumps({"inputs": "x" * 2048}), " length = 2049: allowed is 1 … 2048"),
    (r'{"inputs": "caf\ud83d bar"}', r" inputs = 'caf\\ud83d bar': allowed is text in UTF-8"),
])
def test_bad_row_of_the_last_task_is_named_before_any_decoding(
    model_folder, rows_file, tmp_path, line, message
):
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"inputs": "fine"}\n\n' + line + "\n")
  before = num_compilations()
  with pytest.raises(InputError, match=rf"^{bad}:3{message}"):
    evaluate(str(model_folder), [JsonlTask("rows", str(rows_file)), JsonlTask("last", str(bad))],
             [], str(tmp_path / "out"), max_decode_length=19)
  assert num_compilations() == before
  assert os.listdir(tmp_path) == ["bad.jsonl"]


UNFIT = ["", "x" * 3000, "  \n"]


@pytest.fixture(scope="module")
def unfit_file(tmp_path_factory):
  """Rows that fit, with others among them."""
  path = tmp_path_factory.mktemp("rows") / "unfit.jsonl"
  texts = [UNFIT[0], *TEXTS[:2], UNFIT[1], *TEXTS[2:], UNFIT[2]]
  path.write_text("".join(json.dumps({"inputs": text}) + "\n" for text in texts))
  return path


def outputs_of(folder):
  return [json.loads(x) for x in (folder / "rows.greedy.jsonl").read_text().splitlines()]


def test_rows_that_do_not_fit_are_left_out_where_asked(
    evaluated, model_folder, unfit_file, tmp_path, capsys
):
  # Nor are brackets in a path what rich takes them for.
  output = tmp_path / "ev[x]" / "[" / "b]"
  results = evaluate(
      str(model_folder), [JsonlTask("rows", str(unfit_file))], [Method("blockwise")], str(output),
      max_decode_length=20, batch_size=3, repeats=1, unfit_rows="leave_out",
  )
  whole, folder = evaluated
  task = results["tasks"]["rows"]
  assert (task["examples"], task["cut_rows"], task["left_out_rows"]) == (len(TEXTS), 0, 3)
  assert results["rows_fingerprint"] == whole["rows_fingerprint"] == task["rows_fingerprint"]
  assert outputs_of(output) == outputs_of(folder)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "rows: 3 rows left out" and lines[-1] == f"written to {output}"


def test_inputs_that_are_too_long_are_cut_where_asked(
    model_folder, unfit_file, tmp_path, capsys
):
  results = evaluate(
      str(model_folder), [JsonlTask("rows", str(unfit_file))], [], str(tmp_path / "out"),
      max_decode_length=4, batch_size=2, repeats=1, unfit_rows="cut", tuning=Tuning(num_rows=2),
  )
  task = results["tasks"]["rows"]
  assert "rows: 1 row cut to 2,048 tokens, 2 rows left out\n" in capsys.readouterr().out
  assert (task["cut_rows"], task["left_out_rows"]) == (1, 2)
  # The rows to tune on are chosen first, so that they are the same for every model.
  texts = [row["inputs"] for row in JsonlTask("rows", str(unfit_file)).rows()]
  to_tune, to_report = Tuning(num_rows=2).split("rows", texts)
  fitting = lambda part: [texts[i] for i in part if texts[i].strip()]
  assert task["tuning_examples"] == len(fitting(to_tune))
  assert task["examples"] == len(fitting(to_report))
  lines = outputs_of(tmp_path / "out")
  assert [line["inputs"] for line in lines] == fitting(to_report) and UNFIT[1] in fitting(to_report)
  model = load(model_folder)
  prompts = [
      [*model.vocabulary.encode(text)[:2047], 1] for text in fitting(to_report)
  ]
  greedy = model.generate(prompts, "greedy", max_length=4, batch_size=2)
  assert [line["tokens"] for line in lines] == [row.tolist() for row in greedy.tokens]


@pytest.mark.parametrize("texts, options, message", [
    (UNFIT, {"unfit_rows": "leave_out"}, "^rows rows to report = 'none that fits': allowed is at"),
    (TEXTS, {"unfit_rows": "drop"}, "^unfit_rows = 'drop': allowed is one of"),
])
def test_where_no_row_is_left_nothing_is(model_folder, tmp_path, texts, options, message):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps({"inputs": text}) + "\n" for text in texts))
  with pytest.raises(InputError, match=message):
    evaluate(str(model_folder), [JsonlTask("rows", str(path))], [], str(tmp_path / "out"),
             **options)
  assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("make, message", [
    (lambda path: [], r"tasks = \[\]: allowed is at least one"),
    (lambda path: [JsonlTask("a", path), JsonlTask("a", path)], "tasks = .*names that differ"),
    (lambda path: [JsonlTask("a/b", path)], "name = 'a/b': allowed is letters, digits"),
    (lambda path: [JsonlTask(".a", path)], r"name = '\.a': allowed is letters, digits"),
    (lambda path: [JsonlTask("a", path, main_metric="bleu")], "a main_metric = 'bleu'"),
    (lambda path: [JsonlTask("a", path, instruction="(")], r"a instruction = '\(': allowed is a r"),
    (lambda path: [JsonlTask("a", path, max_examples=0)], "a max_examples = 0: allowed is a posi"),
    (lambda path: [RowsTask("grammar", max_examples=1.5)], r"grammar max_examples = 1\.5"),
    (lambda path: [RowsTask("sonnets")], r"task = 'sonnets': allowed is one of \('docstring_summ"),
    (lambda path: [RowsTask("grammar", "train")], "split = 'train': allowed is one of"),
])
def test_bad_tasks(rows_file, tmp_path, make, message):
  with pytest.raises(InputError, match=message):
    evaluate("absent", make(str(rows_file)), [], str(tmp_path / "out"))


def test_method_with_a_name_that_no_file_can_have(rows_file, tmp_path):
  with pytest.raises(InputError, match="name = 'a/b'"):
    evaluate("absent", [JsonlTask("rows", str(rows_file))], [Method("a/b")], str(tmp_path / "out"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_that_are_not_greedys_end_with_status_1(
    model_folder, rows_file, tmp_path, monkeypatch, dtype
):
  # No method is wrong, so the verdict has to be.
  monkeypatch.setattr("bpd_jax.evaluation.run.check_differences", lambda *args: False)
  arguments = (str(model_folder), [JsonlTask("rows", str(rows_file))], [], str(tmp_path / "out"))
  options = {"max_decode_length": 20, "batch_size": 3, "repeats": 1, "dtype": dtype}
  if dtype == "float32":
    with pytest.raises(SystemExit, match="^error: tokens that aren't greedy's: rows greedy$"):
      evaluate(*arguments, **options)
  else:
    # There the share that is identical is a measurement.
    evaluate(*arguments, **options)
  assert json.loads((tmp_path / "out/results.json").read_text())["dtype"] == dtype


def test_run_file_says_what_it_runs(model_folder, rows_file, tmp_path):
  read_gin_files(["gin/runs/evaluate_jsonl.gin"], [
      f"CHECKPOINT = '{model_folder}'", f"ROWS = '{rows_file}'",
      f"OUTPUT = '{tmp_path / 'out'}'", "MAX_DECODE_LENGTH = 20", "REPEATS = 1",
      "BATCH_SIZE = 3", "BLOCK_SIZE = 2",
  ])
  results = gin.get_configurable("evaluate")()
  methods = results["tasks"]["rows"]["methods"]
  assert {name: (x["block_size"], x["draft"]) for name, x in methods.items()} == {
      "greedy": (1, {"drafter": "greedy"}),
      "blockwise": (2, {"drafter": "Draft", "block_size": 2, "top_k": 1, "addon": None}),
      "auto": (2, {"drafter": "Draft", "block_size": 2, "top_k": 1, "addon": None}),
      "perfect": (2, {"drafter": "Reference", "block_size": 2, "addon": None}),
  }
  assert methods["auto"]["policy"] == "goodput" and "policy" not in methods["blockwise"]
  assert methods["auto"]["costs"]["of"]["batch_size"] == 3


@gin.configurable(module="test_evaluate")
def tasks_of_a_file(tasks):
  return tasks


@pytest.mark.parametrize("bindings, expected", [
    ([], [RowsTask(name) for name in TASKS]),
    (["TASKS = [@grammar/RowsTask()]", "MAX_EXAMPLES = 2", "SPLIT = 'validation'"],
     [RowsTask("grammar", "validation", 2)]),
])
def test_shipped_tasks_of_the_run_file(bindings, expected):
  read_gin_files(["gin/runs/evaluate.gin"], [
      "CHECKPOINT = 'x'", "OUTPUT = 'y'", *bindings, "tasks_of_a_file.tasks = %TASKS"
  ])
  assert tasks_of_a_file() == expected


@pytest.mark.parametrize("options, message", [
    (["--gin.RowsTask.split='train'"], "error: split = 'train': allowed is one of ('validation', "),
    (["--gin.TASKS=[@mine/RowsTask()]", "--gin.mine/RowsTask.name='mine'"],
     "error: task = 'mine': allowed is one of ('docstring_summary', "),
    ([], "error: model folder = 'absent': allowed is a folder that exists"),
])
def test_bad_input_is_one_line_and_status_2(options, message, tmp_path, capsys):
  with pytest.raises(SystemExit) as ended:
    run(main, ["--gin_file=gin/runs/evaluate.gin", "--gin.CHECKPOINT='absent'",
               f"--gin.OUTPUT='{tmp_path / 'out'}'", *options])
  assert ended.value.code == 2
  out, err = capsys.readouterr()
  assert out == "" and len(err.splitlines()) == 1 and err.startswith(message)
  assert os.listdir(tmp_path) == []


def test_command_says_a_required_macro_in_one_line():
  done = subprocess.run(
      [sys.executable, "-m", "bpd_jax.evaluate", "--gin_file=gin/runs/evaluate.gin"],
      cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
      check=False,
  )
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr == (
      "error: gin macro CHECKPOINT = 'required': allowed is a value: --gin.CHECKPOINT=…\n"
  )
