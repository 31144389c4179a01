"""Evaluation of a model folder: figures recomputed by hand, files, and bad input."""

import json
import os
from pathlib import Path
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest

from bpd_jax.checkpoints import save_model
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.errors import InputError
from bpd_jax.evaluate import evaluate
from bpd_jax.evaluation.quality import is_looping, repeated_share
from bpd_jax.evaluation.run import describe_generation, efficiency_interval, Method
from bpd_jax.generation import Call, Generation, load
from bpd_jax.launch import read_gin_files
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ModelConfig(
    vocab_size=384, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2, block_size=4, head_d_ff=16,
)
TEXTS = ["one row", "another, longer row of text", "ü — é", "the last row"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  vocabulary = folder / "tokenizer_config.json"
  vocabulary.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
  params = init_params(CONFIG, single_device(), jax.random.key(3))
  save_model(folder / "model", CONFIG, params, vocabulary)
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
      [Method("blockwise"), Method("narrow", verify_width=2), Method("perfect", "reference")],
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
          [Call([], [5]), Call([6, 7, 5], [6, 7, 5, 6, 7, 5, 6]), Call([1, 2], [7])],
          [Call([], [3]), Call([4, 9], [4, 5, 6])],
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


def test_interval_narrows_with_rows_and_holds_the_estimate():
  rng = np.random.default_rng(1)
  calls = rng.integers(5, 20, 400)
  tokens = calls * 2 + rng.integers(-3, 4, 400)
  widths = []
  for rows in (25, 400):
    low, high = efficiency_interval(tokens[:rows], calls[:rows])
    assert low < tokens[:rows].sum() / calls[:rows].sum() < high
    widths.append(high - low)
  assert widths[1] < widths[0] / 2


def test_repetition():
  assert repeated_share([1, 2]) == 0.0
  assert repeated_share([1, 2, 3, 4]) == 0.0
  assert repeated_share([1, 1, 1, 1]) == 0.5
  assert is_looping([1, 2, 3, 1, 2, 3]) and not is_looping(list(range(50)))


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
  with pytest.raises(InputError, match="at least one row"):
    task.rows()
  with pytest.raises(InputError, match="a UTF-8 text file"):
    JsonlTask("qa", str(tmp_path / "absent")).rows()


@pytest.mark.parametrize(
    "methods, message",
    [
        ([Method("blockwise", block_size=5)], "block_size = 5: allowed is 1 … 4"),
        ([Method("wide", verify_width=5)], "verify_width = 5: allowed is 1 … 4"),
        ([Method("a"), Method("a", verify_width=2)], "methods = .*names that differ"),
        ([Method("greedy", verify_width=2)], "methods = .*names that differ"),
        ([Method("a", "sampling")], "method = 'sampling': allowed is one of"),
    ],
)
def test_methods_that_the_model_lacks(model_folder, rows_file, tmp_path, methods, message):
  with pytest.raises(InputError, match=message):
    evaluate(str(model_folder), [JsonlTask("rows", str(rows_file))], methods,
             str(tmp_path / "out"))
  assert not os.listdir(tmp_path)


def test_existing_output_is_refused(model_folder, rows_file, tmp_path):
  with pytest.raises(InputError, match="folder = .*a path where nothing is yet"):
    evaluate(str(model_folder), [JsonlTask("rows", str(rows_file))], [], str(tmp_path))


def test_run_file_says_what_it_runs(model_folder, rows_file, tmp_path):
  read_gin_files(["gin/runs/evaluate.gin"], [
      f"CHECKPOINT = '{model_folder}'", f"ROWS = '{rows_file}'",
      f"OUTPUT = '{tmp_path / 'out'}'", "MAX_DECODE_LENGTH = 8", "REPEATS = 1",
      "VERIFY_WIDTH = 3",
  ])
  try:
    results = gin.get_configurable("evaluate")()
  finally:
    gin.clear_config()
  methods = results["tasks"]["rows"]["methods"]
  assert {name: (x["block_size"], x["verify_width"]) for name, x in methods.items()} == {
      "greedy": (1, 1), "blockwise": (4, 3), "perfect": (4, 3)
  }


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
