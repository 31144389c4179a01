"""What the compiler made of the decode loop: no copy of the cache, few programs, no traffic."""

from collections import Counter
import functools
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpd_jax import generation
from bpd_jax.generation import DecodeSettings, Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params, decode_view, EncoderDecoder, init_params
from bpd_jax.partitioning import single_device

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ModelConfig(
    vocab_size=512, d_model=32, d_ff=48, d_kv=16, num_heads=3, num_encoder_layers=2,
    num_decoder_layers=3, block_size=8, head_d_ff=32,
)
MAX_LENGTH = 41


def compiled_loop(config, partitioning, width, batch):
  """HLO of the decode loop, compiled from shapes alone."""
  model = EncoderDecoder(config, partitioning, is_view=True)
  settings = DecodeSettings(
      "greedy" if width == 1 else "blockwise", max(width, 1), width, MAX_LENGTH
  )
  view = jax.eval_shape(
      functools.partial(decode_view, config), abstract_params(config, partitioning)
  )
  tokens = jax.ShapeDtypeStruct([batch, 64], jnp.int32)
  lengths = jax.ShapeDtypeStruct([batch], jnp.int32)
  context = jax.eval_shape(functools.partial(generation.prefill, model), view, tokens, lengths)
  state = jax.eval_shape(
      functools.partial(generation.start_state, model, settings), lengths, None,
      jax.random.key(0),
  )
  program = jax.jit(
      functools.partial(generation.decode_batch, model), static_argnums=0, donate_argnums=3
  )
  return program.lower(settings, view, context, state).compile().as_text()


def count_ops(hlo, shape):
  """How often each instruction has a result of this shape, fusions included."""
  pattern = re.compile(rf"= f32\[{','.join(map(str, shape))}\]\S* ([\w-]+)\(")
  return Counter(match.group(1) for match in pattern.finditer(hlo))


@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("batch", [1, 8])
def test_loop_copies_no_cache(width, batch):
  hlo = compiled_loop(CONFIG, single_device(), width, batch)
  assert " while(" in hlo
  shape = (batch, CONFIG.num_heads, MAX_LENGTH + width, CONFIG.d_kv)
  ops = count_ops(hlo, shape)
  # The shape is the right one: the state comes in and goes out with 6 of them.
  assert ops["parameter"] >= 2 * CONFIG.num_decoder_layers, ops
  moved = {
      name: n for name, n in ops.items()
      if name in ("copy", "copy-start", "select", "transpose")
  }
  assert not moved


def test_number_of_compilations():
  params = init_params(CONFIG, single_device(), jax.random.key(0))
  model = Generator(CONFIG, params)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 512, n).tolist() for n in (3, 30, 33, 60, 9, 64, 17)]
  options = {"max_length": 13, "batch_size": 3, "buckets": (32, 64)}
  for limits in ([13] * 7, [1, 13, 2, 5, 13, 9, 4]):
    for method in ("greedy", "blockwise"):
      model.generate(prompts, method, limits=limits, **options)
  # An encoder a bucket; a start a method; a loop a method and bucket.
  assert model.num_compilations == 2 + 2 + 4
  again = Generator(CONFIG, jax.tree.map(lambda leaf: leaf + 1, params))
  again.generate(prompts[:2], "blockwise", **options)
  assert again.num_compilations == 0


ON_A_MESH = r"""
import json, re
import jax
jax.config.update("jax_enable_x64", True)
import numpy as np
from bpd_jax.errors import InputError
from bpd_jax import generation
from bpd_jax.generation import DecodeSettings, Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params, init_params
from bpd_jax.partitioning import make_partitioning, single_device
import test_compiled as here

out = {}
mesh = make_partitioning(data=2, fsdp=2, model=2)
config = here.CONFIG.replace(num_heads=4)
wide = config.with_dtype("float64")
params = jax.device_get(init_params(wide, single_device(), jax.random.key(1)))
rng = np.random.default_rng(0)
params["heads"]["w2"] = rng.standard_normal(params["heads"]["w2"].shape) / 6
prompts = [rng.integers(2, 512, n).tolist() for n in (3, 30, 12, 9, 25, 1, 8, 31, 5)]
one = Generator(wide, params)
place = lambda leaf, abstract: jax.device_put(leaf, abstract.sharding)
shards = jax.tree.map(place, params, abstract_params(wide, mesh))
many = Generator(wide, shards, mesh)
options = {"max_length": 21, "batch_size": 8}
greedy = one.generate(prompts, "greedy", **options)
out["same"] = {}
for method in ("greedy", "blockwise", "reference"):
  known = {"references": greedy.tokens} if method == "reference" else {}
  found = many.generate(prompts, method, **known, **options)
  alone = one.generate(prompts, method, **known, **options)
  out["same"][method] = (
      all(np.array_equal(a, b) for a, b in zip(found.tokens, greedy.tokens))
      and found.calls == alone.calls)
out["distinct"] = len({tuple(row) for row in greedy.tokens})

# The loop as it runs, from arguments that lie where `generate` puts them.
put = lambda x, *names: jax.device_put(x, mesh.sharding(names))
context = generation._PREFILL(
    many.model, many.view, put(np.ones([8, 32], np.int32), "batch", "length"),
    put(np.full([8], 32, np.int32), "batch"))
settings = DecodeSettings("blockwise", 8, 8, here.MAX_LENGTH)
state = generation._START(many.model, settings, put(np.full([8], here.MAX_LENGTH, np.int32),
                          "batch"), None, jax.random.key(0))
out["cache_shard"] = state.cache.keys[0].sharding.shard_shape(state.cache.keys[0].shape)
hlo = generation._DECODE.lower(many.model, settings, many.view, context, state)
hlo = hlo.compile().as_text()
moves = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?[(]"
lines = [line for line in hlo.splitlines() if re.search(moves, line)]
out["collectives"] = len(lines)
# Slots are a number that no other axis has, so every form of a cache has it.
shapes = {name: shape for name, shape in re.findall(r"(%[\w.-]+) = [a-z0-9]+\[([0-9,]*)\]", hlo)}
of_cache = lambda text: str(here.MAX_LENGTH + 8) in text.split(",")
out["of_cache"] = [
    line for line in lines
    if any(of_cache(shape) for shape in re.findall(r"\[([0-9,]+)\]", line))
    or any(of_cache(shapes.get(name, "")) for name in re.findall(r"%[\w.-]+", line))]
out["cache_values"] = sum(map(of_cache, shapes.values()))

base = ModelConfig(d_model=768, d_ff=2048, num_heads=12, num_encoder_layers=12,
                   num_decoder_layers=12, block_size=8, head_d_ff=2048)
out["large"] = {}
for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(base, mesh)):
  if leaf.size * 4 > 1e6:
    part = np.prod(leaf.sharding.shard_shape(leaf.shape))
    out["large"][jax.tree_util.keystr(path)] = int(leaf.size // part)
out["view"] = {}
for path, leaf in jax.tree_util.tree_leaves_with_path(many.view):
  if leaf.ndim >= 2 and leaf.size >= 4096:
    out["view"][jax.tree_util.keystr(path)] = leaf.size // leaf.addressable_shards[0].data.size
try:
  many.generate(prompts, "greedy", batch_size=6)
except InputError as error:
  out["batch"] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_mesh():
  """What a process with 8 devices, 2 data × 2 fsdp × 2 model, finds."""
  environment = os.environ | {
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
  }
  done = subprocess.run(
      [sys.executable, "-c", ON_A_MESH], cwd=ROOT, env=environment,
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_mesh_moves_no_cache(on_mesh):
  # The patterns find what there is: traffic, and caches split by batch and heads.
  assert on_mesh["collectives"] > 0 and on_mesh["cache_values"] > 0
  assert on_mesh["cache_shard"] == [2, 2, MAX_LENGTH + 8, CONFIG.d_kv]
  assert on_mesh["of_cache"] == []


def test_mesh_gives_the_same_tokens_and_calls(on_mesh):
  assert on_mesh["same"] == {"greedy": True, "blockwise": True, "reference": True}
  assert on_mesh["distinct"] > 5


def test_mesh_splits_every_large_parameter(on_mesh):
  assert len(on_mesh["large"]) > 15
  assert min(on_mesh["large"].values()) >= 4, on_mesh["large"]


def test_mesh_splits_the_decode_view(on_mesh):
  assert on_mesh["view"] and min(on_mesh["view"].values()) >= 2, on_mesh["view"]


def test_mesh_names_a_batch_that_does_not_divide(on_mesh):
  assert on_mesh["batch"] == (
      "batch_size = 6: allowed is a positive multiple of 4, the mesh axes ('data', 'fsdp')"
  )


def test_a_misspelt_axis_raises_on_any_mesh():
  place = single_device()
  with pytest.raises(ValueError, match="'lenght'.*known axes are"):
    place.constrain(jnp.zeros([2, 3]), ("batch", "lenght"))
  with pytest.raises(ValueError, match="'embedd'"):
    place.sharding(("vocab", "embedd"))
