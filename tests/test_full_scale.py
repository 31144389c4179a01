"""The paper's experiment at its own size: files parse, sizes are the paper's, shapes fit."""

from pathlib import Path

import gin
import jax
import pytest

from bpd_jax import evaluate, train  # noqa: F401  evaluate's names for gin.
from bpd_jax.addons.heads import Heads
from bpd_jax.generation import Generator
from bpd_jax.launch import read_gin_files
from bpd_jax.model.model import abstract_params
from bpd_jax.partitioning import single_device

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "experiments/refined_drafts/full_scale"
DATA = ["CACHES = 'caches'", "VOCABULARY = 'words.model'"]
TASK = ["TRAIN_CACHE = 'squad.train'", "HELD_OUT_CACHE = 'squad.validation'", "WORKDIR = 'x'"]
# Totals in millions, from the paper.
TRAINED = {"pretrain": 1500, "rescorer_32m": 32, "rescorer_61m": 61, "rescorer_94m": 94}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def made(owner, *names):
  """What a function is going to be called with."""
  return [
      gin.query_parameter(f"{owner}.{name}").scoped_configurable_fn() for name in names
  ]


def check_step(config, addon, optimizer, objective, lengths):
  """A step's shapes, at 2 rows: the state comes back as it went in, base and heads."""
  assert objective.trains_base
  step = train.Step(config, single_device(), optimizer, objective, addon)
  batch = {
      f"{side}_{what}": jax.ShapeDtypeStruct((2, length), jax.numpy.int32)
      for side, length, whats in zip(
          ("encoder", "decoder"), lengths,
          (("input_tokens", "segment_ids"), ("input_tokens", "target_tokens", "segment_ids")),
      )
      for what in whats
  }
  key = jax.eval_shape(jax.random.key, 0)
  state, metrics = jax.eval_shape(step._run, step.abstract_state, batch, key, None)
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert shapes(state) == shapes(step.abstract_state)
  assert metrics["count"].shape == (addon.block_size,)


def test_every_file_is_looked_at():
  names = {path.stem for path in (ROOT / FOLDER).glob("*.gin")}
  assert names == {*TRAINED, "finetune", "evaluate"}


@pytest.mark.parametrize("name", TRAINED)
def test_what_starts_from_scratch(name):
  read_gin_files([f"{FOLDER}/{name}.gin"], DATA)
  config, addon, optimizer, objective, schedule = made(
      "train", "config", "addon", "optimizer", "objective", "schedule"
  )
  params = [abstract_params(config, single_device()), addon.abstract(config, single_device())]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count / 1e6 == pytest.approx(TRAINED[name], rel=0.01)
  assert addon == Heads(9 if name == "pretrain" else 1, 4096)
  assert (schedule.num_steps, schedule.best_metric) == (200_000, "validation/loss")
  check_step(config, addon, optimizer, objective, (512, 256))


def test_finetuning_goes_on_with_all_of_the_model():
  read_gin_files([f"{FOLDER}/pretrain.gin"], DATA)
  config, heads = made("train", "config", "addon")
  gin.clear_config()
  read_gin_files([f"{FOLDER}/finetune.gin"], [DATA[0], *TASK])
  addon, optimizer, objective, schedule = made(
      "train", "addon", "optimizer", "objective", "schedule"
  )
  assert gin.query_parameter("train.config") is None
  assert gin.query_parameter("%CHECKPOINT") == "runs/full_scale/pretrain/model"
  # Others than the checkpoint's own would be refused.
  assert addon == heads
  assert (optimizer.learning_rate, optimizer.schedule) == (1e-4, "cosine")
  assert (schedule.num_steps, schedule.best_metric) == (100_000, "validation/loss")
  check_step(config, addon, optimizer, objective, (2048, 512))


def test_every_method_can_be_compiled_for_the_model():
  read_gin_files([f"{FOLDER}/pretrain.gin"], DATA)
  config, heads = made("train", "config", "addon")
  gin.clear_config()
  names = {"CHECKPOINT": "m", "OUTPUT": "o", "NGRAM": "n", "NEURAL": "s", "ROWS": "r"}
  read_gin_files([f"{FOLDER}/evaluate.gin"], [f"{k} = '{v}'" for k, v in names.items()])
  methods = [part.scoped_configurable_fn() for part in gin.query_parameter("evaluate.methods")]
  model = Generator(config, params=None, own_heads=(heads, {}))
  found = {}
  for method in methods:
    settings = model.settings(**method.options(model))
    drafter = settings.drafter
    found[method.name] = (drafter.depth + 1, drafter.num_candidates, settings.num_nodes)
  assert found["best16_4gram"][:2] == found["local_neural"][:2] == (9, 16)
  assert found["blockwise"] == (9, 1, 9)
  assert {"ngram2", "neural_ngram", "no_repeat", "oracle_k2", "oracle_k16"} <= set(found)
  (task,) = (part.scoped_configurable_fn() for part in gin.query_parameter("%TASKS"))
  assert task.targets == "targets"
