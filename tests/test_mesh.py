"""Commands on four devices, 2 fsdp × 2 model, do what they do on one."""

import json
import os
from pathlib import Path
import subprocess
import sys

from devices import device_flags
import numpy as np
import pytest
from train_runs import addon_params, model_params

from bpd_jax.data.token_cache import TokenCache
from bpd_jax.decode import read_mesh
from bpd_jax.errors import InputError
from bpd_jax.training.states import HiddenStates

ROOT = Path(__file__).resolve().parent.parent
ON_FOUR_DEVICES = r"""
import contextlib, io, sys
from pathlib import Path
import jax
from bpd_jax import decode, evaluate
from bpd_jax.addons.folder import load_addon, save_model_with
from bpd_jax.checkpoints import save_model
from bpd_jax.generation import load
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device
from train_runs import arguments, FILES, HEADS_FILES, run, write_rows

folder = Path(sys.argv[1])
write_rows(folder)
config = ModelConfig(
    vocab_size=260, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_encoder_layers=2,
    num_decoder_layers=1)
params = init_params(config, single_device(), jax.random.key(7))
params = jax.tree.map(lambda leaf: leaf * (3 if leaf.ndim > 1 else 1), params)
save_model(folder / "base", config, params, folder / "tokenizer_config.json")
mesh = {"DATA_PARALLEL": 1, "FSDP": -1, "MODEL_PARALLEL": 2}
steps = {"STEPS": 6, "SAVE_EVERY": 6, "LOG_EVERY": 2, "NUM_DECODED": 2, "BATCH_SIZE": 8}
assert run(arguments(
    folder, folder / "joint", FILES, **(steps | {"STEPS": 1, "NUM_DECODED": 0}), **mesh)) == 0
for name, places in (("one", {}), ("many", mesh)):
  assert run(arguments(
      folder, folder / name / "heads", HEADS_FILES, CHECKPOINT=str(folder / "base"),
      TEXTS="outputs", BLOCK_SIZE=3, **steps, **places)) == 0, name
  base, addon, model = (folder / x for x in ("base", "one/heads/addon", "model"))
  if name == "one":
    heads = load_addon(addon, load(base))
    save_model_with(model, config, params, folder / "tokenizer_config.json", *heads)
  macros = {"CHECKPOINT": str(base), "ADDON": str(addon), "REPEATS": 1, "MAX_DECODE_LENGTH": 12,
            "ROWS": str(folder / "validation.jsonl"), "OUTPUT": str(folder / name / "results"),
            **places}
  assert run(["--gin_file=gin/runs/evaluate_jsonl.gin", "--gin.evaluate.methods=[@heads/Method()]",
              *(f"--gin.{key}={value!r}" for key, value in macros.items())], evaluate.main) == 0
  options = ["--mesh", "1,-1,2"] if places else []
  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert run(["--checkpoint", str(model), "--max-length", "9", *options, "abc", "defg", "h"],
               decode.main) == 0
  (folder / name / "decoded.txt").write_text(out.getvalue())
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """The folder in which a process with four devices worked, and what it said on standard error."""
  folder = tmp_path_factory.mktemp("mesh")
  environment = os.environ | {
      "XLA_FLAGS": device_flags(4), "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
  }
  done = subprocess.run(
      [sys.executable, "-c", ON_FOUR_DEVICES, str(folder)], cwd=ROOT, env=environment,
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return folder, done.stderr


def test_base_and_heads_together(found):
  learned = model_params(found[0] / "joint")
  assert [learned[f"['own']['{name}']"].shape for name in ("w1", "w2")] == [(2, 16, 16)] * 2
  assert all(np.isfinite(leaf).all() and leaf.any() for leaf in learned.values())


def test_heads_behind_a_frozen_base(found):
  one, many = (found[0] / name / "heads" for name in ("one", "many"))
  losses = [
      [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
      for path in (one, many)
  ]
  assert len(losses[0]) == len(losses[1]) >= 3
  for line, again in zip(*losses):
    named = [key for key in line if "loss" in key or "accuracy" in key or "efficiency" in key]
    assert named and {key: line[key] for key in named} == pytest.approx(
        {key: again[key] for key in named}, rel=1e-4
    )
  states = [HiddenStates(path / "states/0") for path in (one, many)]
  assert states[0].lengths.tolist() == states[1].lengths.tolist()
  for i in range(len(states[0].lengths)):
    np.testing.assert_allclose(states[0].states(i), states[1].states(i), atol=1e-4)
    assert states[0][i][1].tolist() == states[1][i][1].tolist()
  expected, heads = (addon_params(path, found[0] / "base") for path in (one, many))
  assert set(expected) == set(heads) == {"['own']['w1']", "['own']['w2']"}
  for name in expected:
    np.testing.assert_allclose(heads[name], expected[name], atol=1e-4, err_msg=name)


def test_the_bases_own_outputs(found):
  parts = [TokenCache(found[0] / name / "heads/outputs/0/part_00000")
           for name in ("one", "many")]
  assert len(parts[0].lengths) == 40
  for i in range(40):
    for own, again in zip(parts[0][i], parts[1][i], strict=True):
      assert own.tolist() == again.tolist()


def test_an_evaluation(found):
  one, many = (
      json.loads((found[0] / name / "results/results.json").read_text())["tasks"]["rows"]
      for name in ("one", "many")
  )
  assert list(one["methods"]) == ["greedy", "blockwise"] == list(many["methods"])
  for name, entry in one["methods"].items():
    assert many["methods"][name]["decoder_calls"] == entry["decoder_calls"] > 0
    assert many["methods"][name]["identical_to_greedy"] == 1
    lines = [(found[0] / x / f"results/rows.{name}.jsonl").read_text() for x in ("one", "many")]
    assert lines[0] == lines[1]


def test_prompts_on_the_command_line(found):
  one, many = ((found[0] / name / "decoded.txt").read_text() for name in ("one", "many"))
  assert one == many and one.count("block efficiency") == 4


def test_a_look_up_sends_no_rows_around(found):
  """XLA says where it can't do better than to copy all of an array to every device."""
  assert "rematerialization" not in found[1]


@pytest.mark.parametrize("text", ["2,2", "a,b,c", "2;2;2"])
def test_meshes_that_are_none(text):
  with pytest.raises(InputError, match="mesh = .*: allowed is three whole numbers, as 2,1,4"):
    read_mesh(text)
  with pytest.raises(InputError, match=r"mesh = \(3, 1, 1\): allowed is sizes whose product is"):
    read_mesh("3,1,1")
