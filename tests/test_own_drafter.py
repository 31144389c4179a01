"""docs/own_drafter.md: its example drafts what it says, exactly, and is measured by name."""

import json
from pathlib import Path
import re
import sys

import jax
import numpy as np
import pytest

from bpd_jax.checkpoints import save_model
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.errors import InputError
from bpd_jax.evaluate import main
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device

PAGE = (Path(__file__).resolve().parent.parent / "docs/own_drafter.md").read_text()
EXAMPLE, REGISTRATION = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
GIN = re.search(r"^```\n(# copying.gin\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
# Few tokens, so that copies are right now and then.
CONFIG = ModelConfig(
    vocab_size=14, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1, block_size=2, head_d_ff=8,
)


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
  save_model(tmp_path / "model", config, params, vocabulary)
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
