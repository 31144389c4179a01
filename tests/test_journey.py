"""docs/journey.md: from transformers over training and evaluation back to PyTorch."""

import importlib
import json
from pathlib import Path
import re
import shlex
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hf_models
from safetensors.numpy import load_file
from train_runs import run, write_rows

from bpd_jax.addons.folder import load_addon
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import load_model
from bpd_jax.generation import load
from bpd_jax.model.model import EncoderDecoder
from bpd_jax.partitioning import single_device

PAGE = Path(__file__).resolve().parent.parent / "docs/journey.md"
# What makes the page's commands tiny.
TINY = {
    "train": ["BATCH_SIZE=4", "INPUT_LENGTH=8", "TARGET_LENGTH=12", "WARMUP_STEPS=4", "STEPS=6",
              "BLOCK_SIZE=3", "NUM_DECODED=2"],
    "evaluate": ["BATCH_SIZE=4", "MAX_DECODE_LENGTH=12", "REPEATS=1"],
}
FILES = ("flan-t5-small", "models/flan-small", "runs/heads", "train.jsonl", "validation.jsonl",
         "test.jsonl", "flan-small-again")


def commands(folder):
  """The page's commands in order: (module, arguments), its files being in a folder."""
  for block in re.findall(r"^```\n(python .*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
    python, m, module, *argv = shlex.split(block.replace("\\\n", " "))
    assert (python, m) == ("python", "-m")
    pattern = re.compile("|".join(map(re.escape, FILES)))
    argv = [pattern.sub(lambda name: str(folder / name[0]), option) for option in argv]
    name = module.removeprefix("bpd_jax.")
    yield name, argv + [f"--gin.{binding}" for binding in TINY.get(name, ())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where all of the page's commands were run."""
  folder = tmp_path_factory.mktemp("journey")
  # The sizes of tests/test_train_modes.py, whose programs are compiled already.
  model = hf_models.make_t5(
      "t5_1_1", 3, vocab_size=260, d_model=16, d_ff=16, num_layers=2, num_decoder_layers=1,
      relative_attention_num_buckets=32, relative_attention_max_distance=128, eos_scale=2.0,
  )
  hf_models.save(model, folder / "flan-t5-small")
  write_rows(folder)
  (folder / "tokenizer_config.json").rename(folder / "flan-t5-small/tokenizer_config.json")
  (folder / "test.jsonl").write_text((folder / "validation.jsonl").read_text())
  ran = []
  for name, argv in commands(folder):
    main = importlib.import_module(f"bpd_jax.{name}").main
    assert run(argv, main) == 0, name
    ran.append(name)
  assert ran == ["import_checkpoint", "train", "evaluate", "decode", "export"]
  return folder


def test_the_base_model_comes_back_bit_for_bit(folder):
  before, after = (
      load_file(folder / name / "model.safetensors")
      for name in ("flan-t5-small", "flan-small-again")
  )
  assert {name: array.tobytes() for name, array in after.items()} == {
      name: array.tobytes() for name, array in before.items()
  }


def test_the_run_leaves_heads_that_the_model_can_have_as_its_own(folder, tmp_path):
  assert not (folder / "runs/heads/model").exists()
  base = load(folder / "models/flan-small")
  assert base.own_heads == (Heads(1), {})
  heads, own = load_addon(folder / "runs/heads/addon", base)
  assert heads == Heads(3)
  assert [leaf.shape[0] for leaf in jax.tree.leaves(own)] == [2, 2]
  assert own["w2"].any(axis=(1, 2)).all()
  shutil.copytree(folder / "models/flan-small", tmp_path / "model")
  shutil.copytree(folder / "runs/heads/addon", tmp_path / "model/addons/heads")
  model = load(tmp_path / "model")
  assert model.own_heads[0] == heads
  assert jax.tree.all(jax.tree.map(np.array_equal, model.own_heads[1], own))
  prompts = [json.loads(line)["inputs"] for line in (folder / "test.jsonl").open()]
  greedy, blockwise = (
      model.generate(prompts, method, max_length=12, batch_size=4)
      for method in ("greedy", "blockwise")
  )
  assert blockwise.texts == greedy.texts
  assert blockwise.block_efficiency > greedy.block_efficiency == 1


def test_pytorch_writes_what_was_measured(folder):
  loaded = transformers.T5ForConditionalGeneration.from_pretrained(folder / "flan-small-again")
  results = json.loads((folder / "runs/heads/results/results.json").read_text())
  methods = results["tasks"]["rows"]["methods"]
  assert methods["blockwise"]["identical_to_greedy"] == 1.0
  assert methods["greedy"]["block_efficiency"] == 1.0 and methods["perfect"]["nodes"] == 3
  texts = (folder / "runs/heads/results/rows.blockwise.jsonl").read_text().splitlines()
  lines = [json.loads(text) for text in texts]
  inputs = padded([[byte + 3 for byte in line["inputs"].encode()] + [1] for line in lines])
  mask = inputs > 0
  with torch.no_grad():
    tokens = loaded.generate(
        torch.from_numpy(inputs), attention_mask=torch.from_numpy(mask), max_new_tokens=12,
        do_sample=False, num_beams=1,
    )[:, 1:].tolist()
  lengths = [len(line["tokens"]) for line in lines]
  assert [line["tokens"] for line in lines] == [row[:n] for row, n in zip(tokens, lengths)]
  assert not any(any(row[n:]) for row, n in zip(tokens, lengths))
  assert len(set(lengths)) > 1 and max(lengths) == 12
  shifted = padded([[0, *line["tokens"][:-1]] for line in lines])
  with torch.no_grad():
    expected = loaded(
        input_ids=torch.from_numpy(inputs), attention_mask=torch.from_numpy(mask),
        decoder_input_ids=torch.from_numpy(shifted),
    ).logits.numpy()
  config, params = load_model(folder / "models/flan-small", single_device())
  model = EncoderDecoder(config, single_device())
  logits = jax.jit(model.apply)({"params": params}, inputs, mask, shifted)
  for i, n in enumerate(lengths):
    np.testing.assert_allclose(logits[i, :n], expected[i, :n], atol=1e-4, rtol=1e-4)


def padded(rows):
  longest = max(map(len, rows))
  return np.array([row + [0] * (longest - len(row)) for row in rows])
