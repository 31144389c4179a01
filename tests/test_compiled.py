"""What the compiler made of the decode loop: no copy of the cache, few programs, no traffic."""

from collections import Counter
import functools
import json
import os
from pathlib import Path
import re
import subprocess
import sys

from devices import device_flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpd_jax import programs
from bpd_jax.addons.heads import Heads
from bpd_jax.compilation_cache import SWITCH_VARIABLE
from bpd_jax.decoding.policies.goodput import Goodput
from bpd_jax.decoding.types import Prompt
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params, decode_view, EncoderDecoder, init_params
from bpd_jax.partitioning import single_device
from bpd_jax.programs import DecodeSettings
from bpd_jax.reader import ModelReader, prefill

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ModelConfig(
    vocab_size=512, d_model=32, d_ff=48, d_kv=16, num_heads=3, num_encoder_layers=2,
    num_decoder_layers=2,
)
HEADS = Heads(8, 32)
POLICY = Goodput((1, 2, 4, 8))
MAX_LENGTH = 41


@functools.cache
def compiled_loop(config, width, batch, widths=None):
  """The decode loop as `generate` runs it, with a policy's `widths`, from shapes alone."""
  place = single_device()
  model = EncoderDecoder(config, place, is_view=True)
  own = jax.eval_shape(HEADS.view, HEADS.abstract(config, place))
  drafting = HEADS.make(ModelReader(model), own, block_size=width).drafting
  policy = None if widths is None else Goodput(widths)
  settings = DecodeSettings(drafting.drafter, policy=policy)
  view = jax.eval_shape(functools.partial(decode_view, config), abstract_params(config, place))
  tokens = jax.ShapeDtypeStruct([batch, 64], jnp.int32)
  lengths = jax.ShapeDtypeStruct([batch], jnp.int32)
  context = jax.eval_shape(functools.partial(prefill, model), view, tokens, lengths)
  cache = jax.eval_shape(
      functools.partial(programs.decode_cache, model, settings, batch, MAX_LENGTH)
  )
  return programs.DECODE.lower(
      model, settings, programs.DecodeParams(
          view, drafting.params, policy=policy and policy.params((1.0,) * len(widths))
      ), context,
      Prompt(tokens, lengths, MAX_LENGTH), lengths, 0, lengths, cache,
  ).compile()


def count_ops(hlo, shape):
  """How often each instruction has a result of this shape, fusions included.

  The order of the axes doesn't count, so that a transposed cache is one too.
  """
  counts = Counter()
  for dims, name in re.findall(r"= \w+\[([0-9,]+)\]\S* ([\w-]+)\(", hlo):
    if sorted(map(int, dims.split(","))) == sorted(shape):
      counts[name] += 1
  return counts


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("batch", [1, 8])
def test_loop_copies_no_cache(width, batch):
  program = compiled_loop(CONFIG, width, batch)
  hlo = program.as_text()
  shape = (batch, CONFIG.num_heads, MAX_LENGTH + width, CONFIG.d_kv)
  caches = 2 * CONFIG.num_decoder_layers
  ops = count_ops(hlo, shape)
  assert " while(" in hlo
  # In and out of the loop, and one write of each cache. A write is a fusion or an
  # instruction on its own, and what else a fusion holds is counted as well.
  assert ops["parameter"] >= caches and ops["get-tuple-element"] >= 2 * caches, ops
  assert ops["scatter"] + ops["dynamic-update-slice"] == caches, ops
  known = {
      "parameter", "get-tuple-element", "bitcast", "fusion", "scatter", "dynamic-update-slice"
  }
  assert set(ops) <= known and ops["fusion"] <= caches, ops


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("batch", [1, 8])
def test_loops_of_several_widths_copy_no_cache(batch):
  widths = (1, 2, 8)
  hlo = compiled_loop(CONFIG, 8, batch, widths).as_text()
  ops = count_ops(hlo, (batch, CONFIG.num_heads, MAX_LENGTH + 8, CONFIG.d_kv))
  caches = 2 * CONFIG.num_decoder_layers
  # One write of each cache in the body of each width.
  assert ops["scatter"] + ops["dynamic-update-slice"] == len(widths) * caches, ops
  assert not {"copy", "copy-start", "select", "conditional", "transpose"} & set(ops), ops
  assert ops["fusion"] <= len(widths) * caches, ops


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("widths", [None, (1, 2, 8)])
def test_cache_is_donated(widths):
  program = compiled_loop(CONFIG, 8, 8, widths)
  cache = 8 * CONFIG.num_heads * (MAX_LENGTH + 8) * CONFIG.d_kv * 4
  caches = 2 * CONFIG.num_decoder_layers * cache
  assert program.memory_analysis().alias_size_in_bytes >= caches


def test_number_of_compilations():
  params = init_params(CONFIG, single_device(), jax.random.key(0))
  own = HEADS.begin(CONFIG, single_device(), jax.random.key(1))
  model = Generator(CONFIG, params, own_heads=(HEADS, own))
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 512, n).tolist() for n in (3, 30, 33, 60, 9, 64, 17)]
  options = {"max_length": 13, "batch_size": 3, "buckets": (32, 64)}
  for limits in ([13] * 7, [1, 13, 2, 5, 13, 9, 4]):
    for method in ("greedy", "blockwise"):
      model.generate(prompts, method, limits=limits, **options)
  # An encoder a bucket; an empty cache a method; a loop a method and bucket.
  assert model.num_compilations == 2 + 2 + 4
  params, own = jax.tree.map(lambda leaf: leaf + 1, (params, own))
  again = Generator(CONFIG, params, own_heads=(HEADS, own))
  again.generate(prompts[:2], "blockwise", **options)
  assert again.num_compilations == 0
  # All block sizes of a policy are one program a bucket, and measuring them runs just that.
  auto = model.generate(prompts, **options)
  assert model.num_compilations == 2 + 3 + 6
  model.generate(prompts, costs=auto.costs, **options)
  assert model.num_compilations == 2 + 3 + 6


ON_A_MESH = r"""
import functools, json, re
import jax
jax.config.update("jax_enable_x64", True)
import numpy as np
from bpd_jax.addons.heads import Heads
from bpd_jax.errors import InputError
from bpd_jax import programs
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.decoding.types import Policing, Prompt
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params, decode_view, init_params
from bpd_jax.partitioning import make_partitioning, single_device
import test_compiled as here

out = {}
mesh = make_partitioning(data=2, fsdp=2, model=2)
heads = here.HEADS
config = here.CONFIG.replace(num_heads=4)
wide = config.with_dtype("float64")
params = jax.device_get(init_params(wide, single_device(), jax.random.key(1)))
own = jax.device_get(heads.begin(wide, single_device(), jax.random.key(2)))
rng = np.random.default_rng(0)
own["w2"] = rng.standard_normal(own["w2"].shape) / 6
prompts = [rng.integers(2, 512, n).tolist() for n in (3, 30, 12, 9, 25, 1, 8, 31, 5)]
one = Generator(wide, params, own_heads=(heads, own))
place = lambda leaf, abstract: jax.device_put(leaf, abstract.sharding)
shards = jax.tree.map(place, params, abstract_params(wide, mesh))
own_shards = jax.tree.map(place, own, heads.abstract(wide, mesh))
many = Generator(wide, shards, mesh, own_heads=(heads, own_shards))
options = {"max_length": 21, "batch_size": 8}
greedy = one.generate(prompts, "greedy", **options)
out["same"] = {}
for name, method in (
    ("greedy", "greedy"), ("blockwise", "blockwise"), ("reference", ReferenceDrafter(7))):
  known = {"references": greedy.tokens} if name == "reference" else {}
  found = many.generate(prompts, method, **known, **options)
  alone = one.generate(prompts, method, **known, **options)
  out["same"][name] = (
      all(np.array_equal(a, b) for a, b in zip(found.tokens, greedy.tokens))
      and found.calls == alone.calls)
# Whatever one device would have taken, all of the mesh take the same block sizes.
for costs in ((1.0, 1.1, 1.2, 1.3), (1.0, 1.4, 2.0, 3.0)):
  policing = Policing(here.POLICY, here.POLICY.params(costs))
  found, alone = (
      x.generate(prompts, x.heads(), policing=policing, **options) for x in (many, one))
  out["same"][f"auto {costs[-1]}"] = (
      all(np.array_equal(a, b) for a, b in zip(found.tokens, greedy.tokens))
      and found.traces == alone.traces)
out["distinct"] = len({tuple(row) for row in greedy.tokens})

# The loop as it runs, from arguments that lie where `generate` puts them.
put = lambda x, *names: jax.device_put(x, mesh.sharding(names))
inputs = (put(np.ones([8, 32], np.int32), "batch", "length"),
          put(np.full([8], 32, np.int32), "batch"))
context = programs.PREFILL(many.model, many.view, *inputs)
limits = put(np.full([8], here.MAX_LENGTH, np.int32), "batch")
moves = r" (all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)(-start)?[(]"
for name, method, width in (
    ("greedy", "greedy", 1), ("blockwise", "blockwise", 8), ("auto", "blockwise", 8)):
  policing = None
  if name == "auto":
    policing = Policing(here.POLICY, here.POLICY.params((1.0, 1.1, 1.2, 1.3)))
  settings = many.settings(method, policing=policing)
  empty = programs.CACHE(many.model, settings, 8, here.MAX_LENGTH)
  cache = empty.values[0]
  hlo = programs.DECODE.lower(
      many.model, settings, many.decode_params(method, policing=policing), context,
      Prompt(*inputs, here.MAX_LENGTH), limits, 0, limits, empty)
  hlo = hlo.compile().as_text()
  lines = [line for line in hlo.splitlines() if re.search(moves, line)]
  # Slots are a number that no other axis has, so every form of a cache has it.
  shapes = dict(re.findall(r"(%[\w.-]+) = [a-z0-9]+\[([0-9,]*)\]", hlo))
  of_cache = lambda text: str(here.MAX_LENGTH + width) in text.split(",")
  out[name] = {
      "cache_shard": cache.sharding.shard_shape(cache.shape),
      "collectives": len(lines),
      "cache_values": sum(map(of_cache, shapes.values())),
      "of_cache": [
          line for line in lines
          if any(of_cache(shape) for shape in re.findall(r"\[([0-9,]+)\]", line))
          or any(of_cache(shapes.get(name, "")) for name in re.findall(r"%[\w.-]+", line))],
  }

base = ModelConfig(d_model=768, d_ff=2048, num_heads=12, num_encoder_layers=12,
                   num_decoder_layers=12)
heads = Heads(8, 2048)
stored = {"base": abstract_params(base, mesh), "own": heads.abstract(base, mesh)}

# As in `Generator.view`, whose shardings are the compiler's choice.
def in_view(turn, params):
  placed = jax.jit(turn).lower(params).compile().output_shardings
  return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(turn, params), placed)

view = {"base": in_view(functools.partial(decode_view, base), stored["base"]),
        "own": in_view(heads.view, stored["own"])}
for name, tree in (("stored", stored), ("view", view)):
  out[name] = {
      jax.tree_util.keystr(path): leaf.size // int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf.size * 4 > 1e6}
try:
  many.generate(prompts, "greedy", batch_size=6)
except InputError as error:
  out["batch"] = str(error)
print(json.dumps(out))
"""


# The fixture compiles for eight devices in a process of its own.
MESH = pytest.mark.slow


@pytest.fixture(scope="module")
def on_mesh():
  """What a process with 8 devices, 2 data × 2 fsdp × 2 model, finds."""
  environment = os.environ | {
      "XLA_FLAGS": device_flags(8), "JAX_PLATFORMS": "cpu", SWITCH_VARIABLE: "false",
      "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
  }
  done = subprocess.run(
      [sys.executable, "-c", ON_A_MESH], cwd=ROOT, env=environment,
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@MESH
@pytest.mark.parametrize("method, width", [("greedy", 1), ("blockwise", 8), ("auto", 8)])
def test_mesh_moves_no_cache(on_mesh, method, width):
  found = on_mesh[method]
  # The patterns find what there is: traffic, and caches split by batch and heads.
  assert found["collectives"] > 0 and found["cache_values"] > 0
  assert found["cache_shard"] == [2, 2, MAX_LENGTH + width, CONFIG.d_kv]
  assert found["of_cache"] == []


@MESH
def test_mesh_gives_the_same_tokens_and_calls(on_mesh):
  assert on_mesh["same"] == dict.fromkeys(
      ("greedy", "blockwise", "reference", "auto 1.3", "auto 3.0"), True
  )
  assert on_mesh["distinct"] > 5


@MESH
@pytest.mark.parametrize("form, least", [("stored", 15), ("view", 100)])
def test_mesh_splits_every_large_parameter(on_mesh, form, least):
  """T5 1.1 base with 8 heads: whatever is above 1 MB lies on 4 devices at least."""
  assert len(on_mesh[form]) > least
  assert min(on_mesh[form].values()) >= 4, on_mesh[form]


@MESH
def test_mesh_names_a_batch_that_does_not_divide(on_mesh):
  assert on_mesh["batch"] == (
      "batch_size = 6: allowed is a positive multiple of 4, the mesh axes ('data', 'fsdp')"
  )
