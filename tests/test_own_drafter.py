"""docs/own_drafter.md: its example drafts what it says, exactly, and is measured by name."""

import json
from pathlib import Path
import re
import sys

import jax
import numpy as np
import pytest
from train_runs import run, write_rows

from bpd_jax.addons.folder import save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import save_model
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.errors import InputError
from bpd_jax.evaluate import main
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device

PAGE = (Path(__file__).resolve().parent.parent / "docs/own_drafter.md").read_text()
EXAMPLE, REGISTRATION, LEARNING = re.findall(
    r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL
)
GIN, LEARNING_GIN = (
    re.search(rf"^```\n(# {name}.gin\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
    for name in ("copying", "turning")
)
# Few tokens, so that copies are right now and then.
CONFIG = ModelConfig(
    vocab_size=14, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1,
)
HEADS = Heads(2, 8)


@pytest.fixture(scope="module")
def copying(tmp_path_factory):
  """The page's classes, in a module `copying`."""
  folder = tmp_path_factory.mktemp("copying")
  classes = EXAMPLE[: EXAMPLE.index("model = bpd_jax.load")]
  (folder / "copying.py").write_text(classes + REGISTRATION)
  sys.path.insert(0, str(folder))
  import copying

  yield copying
  sys.path.remove(str(folder))
  del sys.modules["copying"]


def test_the_example_drafts_by_its_rule_and_changes_no_token(copying):
  params = init_params(CONFIG, single_device(), jax.random.key(5))
  model = Generator(CONFIG, params)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 14, rng.integers(3, 30)).tolist() for _ in range(12)]
  options = {"max_length": 24, "batch_size": 4}
  greedy = model.generate(prompts, "greedy", **options)
  out = model.generate(prompts, copying.CopyDrafter(depth=3), **options)
  assert [row.tolist() for row in out.tokens] == [row.tolist() for row in greedy.tokens]
  for prompt, trace in zip(prompts, out.traces):
    assert trace[0].draft == []
    for before, call in zip(trace, trace[1:]):
      newest = before.emitted[-1]
      places = [i for i, token in enumerate(prompt[:-1]) if token == newest]
      assert call.draft == (prompt[places[-1] + 1 :][:3] if places else [])
  assert sum(out.calls) < sum(greedy.calls)


def test_what_doesnt_fit_a_drafter_is_named(copying):
  model = Generator(CONFIG, params=None)
  drafter = copying.CopyDrafter(depth=3)
  for options, message in (
      ({"method": copying.CopyDrafter(depth=-1)}, "drafter.depth = -1: allowed is an integer of"),
      ({"method": 7}, "method = 7: allowed is one of .* a Drafter or a Drafting"),
      ({"method": drafter, "search": SearchSettings("p_best", 9)}, "num_paths"),
  ):
    with pytest.raises(InputError, match=message):
      model.generate([[5]], **options)


def test_the_example_is_evaluated_by_name(copying, tmp_path, capsys):
  config = CONFIG.replace(vocab_size=384)
  vocabulary = tmp_path / "tokenizer_config.json"
  vocabulary.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
  params = init_params(config, single_device(), jax.random.key(5))
  own = HEADS.begin(config, single_device(), jax.random.key(6))
  save_model_with(tmp_path / "model", config, params, vocabulary, HEADS, own)
  (tmp_path / "rows.jsonl").write_text(json.dumps({"inputs": "one row"}) + "\n")
  # On a row of one's own instead of the shipped ones.
  (tmp_path / "copying.gin").write_text(GIN.replace("evaluate.gin", "evaluate_jsonl.gin"))
  main([
      f"--gin_file={tmp_path}/copying.gin", f"--gin.CHECKPOINT='{tmp_path}/model'",
      f"--gin.ROWS='{tmp_path}/rows.jsonl'", f"--gin.OUTPUT='{tmp_path}/out'",
      "--gin.BATCH_SIZE=1", "--gin.MAX_DECODE_LENGTH=9", "--gin.REPEATS=1",
  ])
  methods = json.loads((tmp_path / "out/results.json").read_text())["tasks"]["rows"]["methods"]
  assert list(methods) == ["greedy", "blockwise", "copy"]
  assert (methods["copy"]["nodes"], methods["copy"]["identical_to_greedy"]) == (8, 1.0)
  assert "copy" in capsys.readouterr().out


def test_the_one_that_learns_is_trained_and_evaluated(tmp_path, monkeypatch, capsys):
  write_rows(tmp_path)
  config = CONFIG.replace(vocab_size=384)
  params = init_params(config, single_device(), jax.random.key(5))
  save_model(tmp_path / "model", config, params, tmp_path / "tokenizer_config.json")
  (tmp_path / "turning.py").write_text(LEARNING)
  (tmp_path / "turning.gin").write_text(LEARNING_GIN)
  monkeypatch.syspath_prepend(tmp_path)
  macros = {
      "CHECKPOINT": f"{tmp_path}/model", "WORKDIR": f"{tmp_path}/run",
      "ROWS": f"{tmp_path}/train.jsonl", "VALIDATION_ROWS": f"{tmp_path}/validation.jsonl",
      "STEPS": 30, "WARMUP_STEPS": 2, "LOG_EVERY": 10, "BATCH_SIZE": 8, "INPUT_LENGTH": 32,
      "TARGET_LENGTH": 16, "NUM_DECODED": 4,
  }
  argv = [f"--gin_file={tmp_path}/turning.gin",
          *(f"--gin.{name}={value!r}" for name, value in macros.items())]
  assert run(argv) == 0
  figures = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  losses = [line["train/loss"] for line in figures if "train/loss" in line]
  assert len(losses) == 3 and losses[-1] < losses[0]
  # It is done, and says so again.
  assert run(argv) == 0 and "goes on in" in capsys.readouterr().out
  assert run([*argv, "--gin.SEED=1"]) == 2
  assert "seed = 0: allowed is" in capsys.readouterr().err.replace("seed = 1", "seed = 0")
  main([
      "--gin_file=gin/runs/evaluate_jsonl.gin", f"--gin.CHECKPOINT='{tmp_path}/model'",
      f"--gin.ROWS='{tmp_path}/validation.jsonl'", f"--gin.OUTPUT='{tmp_path}/out'",
      "--gin.BATCH_SIZE=4", "--gin.MAX_DECODE_LENGTH=9", "--gin.REPEATS=1",
      f"--gin.ADDON='{tmp_path}/run/addon'", "--gin.evaluate.methods=[@heads/Method()]",
  ])
  methods = json.loads((tmp_path / "out/results.json").read_text())["tasks"]["rows"]["methods"]
  assert methods["blockwise"]["nodes"] == 4 and methods["blockwise"]["identical_to_greedy"] == 1
  assert methods["blockwise"]["decoder_calls"] <= methods["greedy"]["decoder_calls"]
  del sys.modules["turning"]
