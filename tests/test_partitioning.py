"""Logical axes: every activation lies where its names say, and no name is overlooked."""

import json
import os
from pathlib import Path
import subprocess
import sys

from devices import device_flags
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from bpd_jax.addons.heads import Heads
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params, EncoderDecoder, init_params
from bpd_jax.partitioning import DEFAULT_RULES, make_partitioning, Partitioning, single_device

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ModelConfig(
    vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2,
)
HEADS = Heads(4, 24)
# Of activations: the axes that each of them is split over.
SPLIT = {
    ("batch", "length"): ["data", "fsdp"],
    ("vocab", None): ["model"],
    ("batch", "length", "embed"): ["data", "fsdp"],
    ("batch", "length", "mlp"): ["data", "fsdp", "model"],
    ("batch", "length", "heads", "kv"): ["data", "fsdp", "model"],
    ("batch", "heads", "length", "kv"): ["data", "fsdp", "model"],
    ("batch", "heads", "kv", "length"): ["data", "fsdp", "model"],
}


def without(name):
  """The default rules, of which those of one logical axis are gone."""
  return tuple(rule for rule in DEFAULT_RULES if rule[0] != name)


ON_A_MESH = """
import json
import jax, jax.numpy as jnp, numpy as np
from bpd_jax.generation import Generator
from bpd_jax.model.model import abstract_params, EncoderDecoder, init_params
from bpd_jax.partitioning import make_partitioning, Partitioning
from test_partitioning import CONFIG, HEADS, without

seen = []

class Watching(Partitioning):
  # Notes where the compiler put each activation.
  def constrain(self, x, names):
    x = super().constrain(x, names)
    split = lambda axes: [axes] if isinstance(axes, str) else axes or []
    note = lambda found: seen.append(
        [names, found.shard_shape(x.shape), x.shape, sum(map(list, map(split, found.spec)), [])])
    jax.debug.inspect_array_sharding(x, callback=note)
    return x

mesh = make_partitioning(data=2, fsdp=2, model=2)
place = Watching(mesh.mesh, mesh.rules)
params = init_params(CONFIG, mesh, jax.random.key(0))
tokens = jax.device_put(np.ones([8, 6], np.int32), mesh.sharding(("batch", "length")))
forward = lambda params, tokens: EncoderDecoder(CONFIG, place).apply(
    {"params": params}, tokens, tokens > 0, tokens)
out = {}
logits = jax.jit(forward)(params, tokens)
out["train"], seen = seen, []
out["logits"] = logits.sharding.shard_shape(logits.shape)
heads = HEADS, HEADS.begin(CONFIG, mesh, jax.random.key(0))
Generator(CONFIG, params, place, own_heads=heads).generate([[5, 6]] * 8, "blockwise", max_length=5)
out["decode"] = seen
out["raised"] = []
for name in ("mlp", "heads", "length"):
  try:
    wrong = Partitioning(mesh.mesh, without(name))
    jax.eval_shape(lambda params: EncoderDecoder(CONFIG, wrong).apply(
        {"params": params}, tokens, tokens > 0, tokens), params)
  except ValueError as error:
    out["raised"].append(str(error))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_mesh():
  """What a process with 8 devices, 2 data × 2 fsdp × 2 model, finds."""
  environment = os.environ | {
      "XLA_FLAGS": device_flags(8), "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
  }
  done = subprocess.run(
      [sys.executable, "-c", ON_A_MESH], cwd=ROOT, env=environment,
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", ["train", "decode"])
def test_activations_lie_where_their_names_say(on_mesh, program):
  found = on_mesh[program]
  kinds = {tuple(names) for names, *_ in found}
  assert kinds == {names for names in SPLIT if program == "decode" or names[1] in ("length", None)}
  for names, shard, shape, axes in found:
    assert axes == SPLIT[tuple(names)], (names, axes)
    assert int(np.prod(shape)) == 2 ** len(axes) * int(np.prod(shard))


def test_logits_are_split_by_batch_and_vocabulary(on_mesh):
  assert on_mesh["logits"] == [2, 6, CONFIG.vocab_size // 2]


def test_a_misspelt_axis_of_an_activation_raises_on_a_mesh(on_mesh):
  assert [error.split(" in (")[0] for error in on_mesh["raised"]] == [
      f"logical axis '{name}'" for name in ("mlp", "heads", "length")
  ]


def test_a_misspelt_axis_of_an_activation_raises_on_one_device():
  place = single_device()
  with pytest.raises(ValueError, match="'lenght'.*known axes are.*'length'"):
    place.constrain(jnp.zeros([2, 3]), ("batch", "lenght"))
  wrong = Partitioning(place.mesh, without("heads"))
  tokens = jnp.ones([2, 3], jnp.int32)
  with pytest.raises(ValueError, match="^logical axis 'heads'"):
    jax.eval_shape(lambda key: EncoderDecoder(CONFIG, wrong).init(key, tokens, tokens > 0, tokens),
                   jax.random.key(0))


class Noting(Partitioning):
  """Notes what is constrained, and calls back from the program that does it."""

  noted = []

  def constrain(self, x, names):
    self.noted.append(names)
    jax.debug.callback(lambda: None)
    return super().constrain(x, names)


def test_a_stack_traces_its_layer_once_and_lets_it_call_back():
  place = Noting(single_device().mesh)
  tokens = jnp.ones([2, 3], jnp.int32)
  params = init_params(CONFIG, single_device(), jax.random.key(0))
  jax.eval_shape(lambda params: EncoderDecoder(CONFIG, place).apply(
      {"params": params}, tokens, tokens > 0, tokens), params)
  # Two stacks of two layers each.
  assert place.noted.count(("batch", "length", "mlp")) == 2


@pytest.mark.parametrize("name", ["vocab", "joined_kv", "layers", "relpos_buckets", "block"])
def test_a_parameter_whose_axis_no_rule_knows_raises(name):
  place = Partitioning(single_device().mesh, without(name))
  abstract, init = (HEADS.abstract, HEADS.begin) if name == "block" else (
      abstract_params, init_params
  )
  for make in (abstract, lambda *inputs: init(*inputs, jax.random.key(0))):
    with pytest.raises(ValueError, match=f"^logical axis '{name}' in .*known axes are"):
      make(CONFIG, place)


def test_a_mesh_axis_serves_one_axis_of_an_array():
  place = single_device()
  assert place.spec(("batch", "length", "embed")) == PartitionSpec(("data", "fsdp"), None, None)
  assert place.spec(("vocab", "embed")) == PartitionSpec("model", "fsdp")
  assert place.spec((None, "mlp")) == PartitionSpec(None, "model")


def test_mesh_takes_what_is_left():
  place = make_partitioning(data=-1, fsdp=2, model=2, devices=[jax.devices()[0]] * 8)
  assert dict(place.mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}
