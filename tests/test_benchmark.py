"""The benchmark's figures are consistent; nothing here looks at how fast anything is."""

import json
import subprocess
import sys

import numpy as np
import pytest
from rich.progress import Progress

from bpd_jax.benchmark import decode as benchmark
from bpd_jax.benchmark.decode import add_heads, measure, Options, summarise
from bpd_jax.benchmark.engines import Spread
from bpd_jax.benchmark.train import measure_training, TrainOptions
from bpd_jax.errors import InputError
from bpd_jax.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=160, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2,
)
OPTIONS = Options(
    batch_sizes=(1, 3), widths=(1, 4, 12), repeats=2, input_length=9, output_length=17, threads=1
)


# Each engine starts in a process of its own, and PyTorch in most.
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def records():
  pytest.importorskip("torch")
  pytest.importorskip("ctranslate2")
  said = []
  with Progress(disable=True) as progress:
    records = measure(CONFIG, OPTIONS, progress, said.append)
  assert not said
  return records


@SLOW
def test_every_engine_makes_every_token(records):
  assert [record["batch_size"] for record in records] == [1, 3]
  for record in records:
    assert list(record["engines"]) == [
        "greedy", "perfect drafts", "fresh heads", "transformers", "ctranslate2 float32",
        "ctranslate2 int8",
    ]
    for name, engine in record["engines"].items():
      assert engine["num_tokens"] == record["batch_size"] * 17
      assert len(engine["seconds"]) == 2 and min(engine["seconds"]) > 0
      if not name.endswith("int8"):
        assert engine["differences"] == [], name
    assert record["engines"]["greedy"]["num_calls"] == 17
    assert record["engines"]["perfect drafts"]["num_calls"] == 1 + 16 // 8
  json.dumps(records)


@SLOW
def test_calls_cover_the_widths_and_heads(records):
  for record in records:
    assert [call["width"] for call in record["calls"]] == [1, 4, 8, 12]
    assert [call["num_heads"] for call in record["calls"]] == [0, 3, 7, 7]
    for call in record["calls"]:
      assert len(call["milliseconds"]) == len(call["blockwise_milliseconds"]) == 2


@SLOW
def test_floor_counts_the_bytes_that_a_call_reads(records):
  d, ff, joined = 32, 48, 32
  layer = 3 * d * joined + joined * d + 2 * d * joined + 3 * d * ff + 3 * d
  bytes_ = 4 * (2 * layer + d + 32 * 4 + 160 * d)
  for record in records:
    assert record["floor"]["weights"]["bytes"] == bytes_
    cross = 4 * 2 * 2 * record["batch_size"] * 9 * joined
    assert record["floor"]["all"]["bytes"] == bytes_ + cross


def test_summary_of_hand_made_figures():
  engine = lambda seconds, **more: {
      "seconds": seconds, "num_tokens": 20, "num_calls": None, "differences": [], **more
  }
  calls = [
      {"width": 1, "milliseconds": [2.0, 4.0, 3.0]},
      {"width": 8, "milliseconds": [4.0, 4.0, 4.0], "blockwise_milliseconds": [5.0, 6.0, 5.0]},
      {"width": 16, "milliseconds": [7.0, 8.0, 9.0]},
  ]
  add_heads(calls)
  assert calls[0]["blockwise_milliseconds"] == [2.0, 4.0, 3.0]
  assert calls[2]["blockwise_milliseconds"] == [8.0, 10.0, 10.0]
  found = summarise({
      "batch_size": 2,
      "engines": {
          "greedy": engine([1.0, 2.0, 4.0], num_calls=10),
          "transformers": engine([2.0, 2.0, 6.0], differences=[[1, 5]]),
      },
      "calls": calls,
      "floor": {"weights": {"bytes": 8, "milliseconds": [1.0, 2.0, 2.0]}},
  })
  greedy, peer = found["engines"]["greedy"], found["engines"]["transformers"]
  # Ratios are taken repeat by repeat, then their median.
  assert greedy["over_transformers"] == Spread(1.5, 1.0, 2.0)
  assert peer["over_greedy"] == Spread(2 / 3, 0.5, 1.0)
  assert greedy["tokens_per_second"] == Spread(10.0, 5.0, 20.0)
  assert (greedy["block_efficiency"], peer["block_efficiency"]) == (1.0, None)
  assert peer["identical_rows"] == 0.5
  assert found["calls"][1]["break_even"] == Spread(5 / 3, 1.5, 2.5)
  assert found["floor"]["weights"] == Spread(2.0, 1.5, 2.0)


def test_eos_is_never_the_best_token():
  params = benchmark.random_params(CONFIG)
  hidden = np.random.default_rng(0).standard_normal([500, 32])
  logits = hidden @ np.asarray(params["logits_kernel"])
  assert not (logits.argmax(-1) == CONFIG.eos_id).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"repeats": 0}, "repeats = 0: allowed is a positive integer"),
        ({"widths": (1, 1)}, r"widths = \[1, 1\]: allowed is different positive integers"),
        ({"batch_sizes": ()}, r"batch_sizes = \[\]"),
        ({"output_length": 4}, "output_length = 4: allowed is at least 8"),
        ({"widths": (200,)}, "widths = 200: allowed is 1 … 128"),
    ],
)
def test_options_name_what_is_wrong(changes, message):
  with pytest.raises(InputError, match=message):
    Options(**changes)


def test_bad_input_ends_with_status_2():
  for options, message in (
      (["--threads", "4096"], "error: threads = 4096: allowed is 1 … "),
      (["--json", "absent/figures.json"], "error: json = 'absent/figures.json': allowed is"),
  ):
    done = subprocess.run(
        [sys.executable, "-m", "bpd_jax.benchmark", "decode", *options], capture_output=True,
        text=True, check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(message)


@SLOW
def test_training_engines_begin_with_the_same_loss():
  pytest.importorskip("torch")
  options = TrainOptions(
      batch_size=2, input_length=9, output_length=5, block_size=3, repeats=2, threads=1
  )
  with Progress(disable=True) as progress:
    engines = measure_training(CONFIG, options, progress)["engines"]
  assert list(engines) == ["bpd_jax", "bpd_jax, 3 heads", "transformers"]
  losses = [engine["loss"] for engine in engines.values()]
  assert max(losses) - min(losses) < 1e-4 and losses[0] > 3
  assert all(len(engine["seconds"]) == 2 for engine in engines.values())
