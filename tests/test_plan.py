"""The plan: its arithmetic by hand, its bad input, and base on a TPU v5e 4x4."""

import json
from pathlib import Path
import re
import subprocess
import sys

import jax
from jax.extend import core
import jax.numpy as jnp
from jax.sharding import AbstractMesh
import numpy as np
import pytest

from bpd_jax import plan as planning
from bpd_jax.addons.heads import Heads, HeadsReader
from bpd_jax.decoding.types import Params
from bpd_jax.errors import InputError
from bpd_jax.evaluation.cost import call_cost
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import decode_view, EncoderDecoder, init_params
from bpd_jax.partitioning import MESH_AXES, Partitioning, single_device

CONFIG = ModelConfig(
    vocab_size=10, d_model=4, d_ff=6, d_kv=2, num_heads=3, num_encoder_layers=1,
    num_decoder_layers=2, dtype="bfloat16",
)
HEADS = Heads(3, 5)
BASE = ModelConfig(
    d_model=768, d_ff=2048, num_heads=12, num_encoder_layers=12, num_decoder_layers=12
)
ROOT = Path(__file__).resolve().parent.parent
# 2 data x 2 fsdp x 2 model, without devices.
MESH = Partitioning(AbstractMesh((2, 2, 2), MESH_AXES))


def dot_operations(jaxpr) -> int:
  """Operations of every matrix product of a jaxpr, its inner ones included."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      inner = np.prod([shape[axis] for axis in contracted])
      total += 2 * int(inner * np.prod(equation.outvars[0].aval.shape))
    for inner in jax.tree.leaves(
        equation.params, is_leaf=lambda leaf: isinstance(leaf, (core.Jaxpr, core.ClosedJaxpr))
    ):
      if isinstance(inner, core.ClosedJaxpr):
        total += dot_operations(inner.jaxpr)
      elif isinstance(inner, core.Jaxpr):
        total += dot_operations(inner)
  return total


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
def test_operations_are_those_of_the_model(nodes, is_gated):
  config = CONFIG.replace(is_gated=is_gated)
  rows, output_length, input_length = 2, 7, 5
  model = EncoderDecoder(config, single_device(), is_view=True)
  view = jax.eval_shape(
      lambda: decode_view(config, init_params(config, single_device(), jax.random.key(0)))
  )
  own = jax.eval_shape(HEADS.view, HEADS.abstract(config, single_device()))
  reader = HeadsReader(model)
  num_heads = min(nodes, HEADS.block_size) - 1
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
  keys = lambda length: tuple(
      (shape(rows, 3, 2, length), shape(rows, 3, length, 2))
      for _ in range(config.num_decoder_layers)
  )

  def call(view, own, past, cross):
    apply = lambda *args, **kwargs: model.apply({"params": view}, *args, **kwargs)
    hidden, *_ = apply(
        jnp.zeros([rows, nodes], int), jnp.arange(nodes)[None],
        jnp.tri(nodes, dtype=bool)[None], past, jnp.zeros([rows], int), cross,
        jnp.ones([rows, input_length], bool), method="decode_block",
    )
    drafted = None
    if num_heads:
      states = reader.head_states(Params(view, own), hidden[:, 0], num_heads)
      drafted = reader.logits(view, states)
    return apply(hidden, method="logits"), drafted

  jaxpr = jax.make_jaxpr(call)(view, own, keys(output_length + num_heads + 1), keys(input_length))
  cost = call_cost(
      config, nodes, rows, output_length, input_length, num_heads=num_heads, head_d_ff=5
  )
  assert dot_operations(jaxpr.jaxpr) == cost.flops


def test_roofline_time_is_the_longer_of_two():
  # (3 nodes, 2 rows) take 11,488 operations and 2,912 bytes.
  busy = planning.Chip(flops=1e4, bandwidth=1e4, memory=1)
  call = planning.plan_call(busy, None, CONFIG, HEADS, 3, 2, 7, 5)
  assert call == planning.Call(11488, 2912, 1.1488)
  waiting = planning.Chip(flops=1e5, bandwidth=1e4, memory=1)
  assert planning.plan_call(waiting, None, CONFIG, HEADS, 3, 2, 7, 5).seconds == 0.2912


@pytest.mark.parametrize("heads, nodes, num_heads, width", [
    (HEADS, 1, 0, 5), (HEADS, 2, 1, 5), (HEADS, 8, 2, 5), (Heads(3), 8, 2, 6), (Heads(1), 8, 0, 6),
])
def test_a_call_reads_the_heads_that_a_chain_has_use_for(heads, nodes, num_heads, width):
  chip = planning.Chip(flops=1e4, bandwidth=1e4, memory=1)
  call = planning.plan_call(chip, None, CONFIG, heads, nodes, 1, 7, 5)
  cost = call_cost(CONFIG, nodes, 1, 7, 5, num_heads=num_heads, head_d_ff=width)
  assert (call.flops, call.bytes) == (cost.flops, cost.bytes)


def test_mesh_shares_rows_and_heads():
  # 5 rows on 4 devices leave 2 on the fullest; `model` halves the rest.
  chip = planning.Chip(flops=1e4, bandwidth=1e4, memory=1)
  call = planning.plan_call(chip, MESH, CONFIG, HEADS, 3, 5, 7, 5)
  assert (call.flops, call.bytes) == (11488 // 2, 2912 // 2)


def test_peaks_are_the_published_ones():
  assert {
      name: (chip.flops / 1e12, chip.bandwidth / 1e9, chip.memory / 1e9)
      for name, chip in planning.CHIPS.items()
  } == {
      "v4": (275, 1200, 32), "v5e": (197, 819, 16), "v5p": (459, 2765, 95),
      "v6e": (918, 1638, 32),
  }


def test_collectives_count_once_a_channel():
  hlo = """
  %a.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
  %a.2 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
  %b = (f32[2]{0}, f32[8]{0}) all-gather-start(%q), channel_id=8, dimensions={0}
  %c = f32[8]{0} all-gather-done(%b)
  %d = pred[3,5]{1,0} all-reduce(%r), channel_id=9, to_apply=%or
  %e = (s32[], f8e4m3fn[6]{0}) all-reduce(%s, %t), channel_id=10, to_apply=%add
  %all-reduce.5 = f32[100]{0} fusion(%d), kind=kLoop
  """
  assert planning.collectives(hlo) == {"all-gather": (2, 64 + 32), "all-reduce": (2, 15 + 6)}


@pytest.mark.parametrize("field, value, size", [
    ("vocab_size", 9, 2), ("d_model", 5, 2), ("d_ff", 7, 2), ("num_heads", 3, 2),
])
def test_model_must_divide_over_the_mesh(field, value, size):
  even = CONFIG.replace(num_heads=4)
  for heads in (Heads(1), Heads(3, 6), Heads(3)):
    planning.check_model(even, heads, MESH)
    with pytest.raises(InputError, match=f"^ModelConfig.{field} = {value}: .* multiple of {size},"):
      planning.check_model(even.replace(**{field: value}), heads, MESH)


def test_heads_must_divide_over_the_mesh():
  with pytest.raises(InputError, match="^Heads.d_ff = 5: allowed is a multiple of 2,"):
    planning.check_model(CONFIG.replace(num_heads=4), HEADS, MESH)


@pytest.mark.parametrize("arguments, message", [
    ({"topology": "v9:2x2"}, r"topology = 'v9:2x2': allowed is a chip of \['v4',"),
    ({"topology": 5}, "topology = 5: "),
    ({"batch_size": "x"}, "batch_size = 'x': allowed is a positive integer"),
    ({"output_length": 0}, "output_length = 0: allowed is a positive integer"),
    ({"data": 1.5}, "data = 1.5: allowed is -1 or a positive integer"),
    ({"node_counts": (1, -2)}, r"node_counts = \(1, -2\): allowed is positive integers"),
    ({"batch_sizes": ()}, r"batch_sizes = \(\): allowed is positive integers"),
    ({"dtype": "float64"}, "dtype = 'float64': allowed is bfloat16 or float32"),
])
def test_bad_arguments(arguments, message):
  with pytest.raises(InputError, match="^" + message):
    planning.plan(CONFIG, **arguments)


# libtpu is loaded in other processes only: it stays in one until that ends.
BAD_TOPOLOGIES = """
import sys
from bpd_jax import plan
from bpd_jax.errors import InputError
plan.compile_abstract = None  # Nothing may compile.
for bindings in sys.argv[1:]:
  try:
    plan.main(["--gin_file=gin/models/base.gin", *bindings.split()])
  except InputError as error:
    print(error)
"""


def test_bad_input_that_takes_the_topology():
  cases = {
      "--gin.plan.topology='v5e:3x3'": "topology = 'v5e:3x3': allowed is what libtpu knows",
      "--gin.plan.data=3": "mesh = (3, 2, 2): allowed is sizes whose product is 16",
      "--gin.plan.batch_size=12": "batch_size = 12: allowed is a positive multiple of 8",
      "--gin.plan.model=8": "ModelConfig.num_heads = 12: allowed is a multiple of 8",
      "--gin.ModelConfig.vocab_size=32127":
          "ModelConfig.vocab_size = 32127: allowed is a multiple of 2",
      "--gin.Heads.d_ff=2047": "Heads.d_ff = 2047: allowed is a multiple of 2",
  }
  done = subprocess.run(
      [sys.executable, "-c", BAD_TOPOLOGIES, *cases], cwd=ROOT, capture_output=True, text=True,
      check=True,
  )
  lines = done.stdout.splitlines()
  assert len(lines) == len(cases)
  for line, expected in zip(lines, cases.values()):
    assert line.startswith(expected)


def test_bad_input_exits_with_one_line():
  done = subprocess.run(
      [sys.executable, "-m", "bpd_jax.plan", "--gin_file=gin/models/base.gin",
       "--gin.plan.topology='v9:2x2'"],
      cwd=ROOT, capture_output=True, text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: topology = 'v9:2x2': ")
  assert done.stderr.count("\n") == 1 and not done.stdout


COMPILE = """
import dataclasses, json, sys
from pathlib import Path
import jax
from bpd_jax import plan
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)
folder = Path(sys.argv[1])
config = plan.ModelConfig.from_dict(json.loads(sys.argv[2]))
found = plan.plan(config, plan.Heads(8, 2048))
programs = {}
for name, program in found.programs.items():
  (folder / f"{name}.hlo").write_text(program.compiled.as_text())
  fields = {field.name for field in dataclasses.fields(program)} - {"compiled"}
  programs[name] = {field: getattr(program, field) for field in fields}
  programs[name]["memory"] = program.memory
chips = {
    name: len(plan.topology_devices(name + (":2x2x1" if chip in ("v4", "v5p") else ":2x2"))[1])
    for chip in plan.CHIPS for name in [chip]
}
(folder / "programs.json").write_text(json.dumps([programs, chips]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """The folder of what base compiled to, and the figures beside."""
  folder = tmp_path_factory.mktemp("plan")
  done = subprocess.run(
      [sys.executable, "-c", COMPILE, str(folder), json.dumps(BASE.to_dict())], cwd=ROOT,
      capture_output=True, text=True, check=True,
  )
  assert "v5e:4x4, mesh data 4, fsdp 2, model 2" in done.stdout
  return folder, *json.loads((folder / "programs.json").read_text())


# Half a minute of the TPU's compiler on two idle cores.
@pytest.mark.slow
def test_base_fits_a_v5e(base):
  _, programs, chips = base
  assert list(programs) == ["greedy", "blockwise", "forward-backward"]
  for program in programs.values():
    assert 0 < program["memory"] < 16e9
  # Of each chip the devices are chips.
  assert chips == dict.fromkeys(planning.CHIPS, 4)

  # What decoding reads, in bfloat16: weights over fsdp 2 x model 2; keys and
  # values of 4 rows, 6 heads. TPUs pad the cache's length to 256 slots.
  layers = 12 * (6 * 768 * 768 + 3 * 768 * 2048)
  heads = 7 * 2 * 768 * 2048
  vocabulary = 2 * 32128 * 768
  stored = 12 * 2 * (4 * 6 * (512 + 256) * 64)
  expected = {
      "greedy": 2 * ((layers + vocabulary) / 4 + stored),
      "blockwise": 2 * ((layers + vocabulary + heads) / 4 + stored),
      # All parameters, in float32: the layers above, keys and values of
      # cross-attention, and the encoder.
      "forward-backward": 4 * (
          layers + heads + vocabulary + 12 * (2 * 768 * 768 + 4 * 768 * 768 + 3 * 768 * 2048)
      ) / 4,
  }
  for name, size in expected.items():
    assert programs[name]["arguments"] == pytest.approx(size, rel=0.01)
  # The state is donated and gradients lie as parameters do; what the loop records is new.
  assert programs["greedy"]["outputs"] < 1e5
  assert programs["blockwise"]["outputs"] < 5e5
  assert programs["forward-backward"]["outputs"] == pytest.approx(
      expected["forward-backward"], rel=0.01
  )
  # Before the loop caches are laid out anew, and each layer's `wi`; in it nothing
  # moves a cache, see below.
  cache = 2 * 12 * 2 * 4 * 6 * 256 * 64
  assert programs["blockwise"]["temporaries"] < 2 * cache
  assert programs["greedy"]["temporaries"] < 2 * cache
  # The logits of one head at a time, not of 8: 32 / 8 rows, half of the vocabulary.
  one_head = 4 * 4 * 128 * 32128 / 2
  assert programs["forward-backward"]["temporaries"] < 2.2e9 + 3 * one_head


def read_hlo(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation, and the name of the entry."""
  computations, entry = {}, None
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
      name = head[2]
      computations[name] = []
      entry = name if head[1] else entry
    elif line.startswith("  "):
      computations[name].append(line.strip())
  return computations, entry


def loop_lines(text: str) -> list[str]:
  """Every instruction of the decode loop, what it calls included."""
  computations, entry = read_hlo(text)
  (loop,) = [line for line in computations[entry] if " while(" in line]
  seen, new = set(), [re.search(r"body=%?([\w.-]+)", loop)[1]]
  while new:
    name = new.pop()
    seen.add(name)
    for line in computations[name]:
      called = re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)", line)
      new += [other for other in called if other not in seen]
  return [line for name in seen for line in computations[name]]


# The compiler of the fixture above.
@pytest.mark.slow
@pytest.mark.parametrize("name, slots", [("greedy", 129), ("blockwise", 136)])
def test_base_moves_no_cache(base, name, slots):
  """No collective has an operand of cache shape, and nothing copies a cache.

  A cache that fits the chip's own memory is brought there to be read or
  written, and the ones that are written there go back: `copy-start` from one
  memory to the other, S(1) being the chip's. A copy within a memory is none.
  """
  lines = loop_lines((base[0] / f"{name}.hlo").read_text())
  cache = re.compile(rf"\[\d+,\d+,(?:{slots},64|64,{slots})\]")
  shapes = {}
  for line in lines:
    if found := re.match(r"(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z-]*)\(", line):
      shapes[found[1]] = (found[2], found[3], line)
  writes = [
      line for shape, kind, line in shapes.values()
      if kind == "dynamic-update-slice" and cache.search(shape)
  ]
  assert len(writes) == 24  # Keys and values of 12 layers.
  num_collectives = 0
  for shape, kind, line in shapes.values():
    if kind.removesuffix("-start") in planning.COLLECTIVES:
      num_collectives += 1
      operands = re.findall(r"%([\w.-]+)", line.partition(f" {kind}(")[2].partition(")")[0])
      for one in (shape, *(shapes[operand][0] for operand in operands)):
        assert not cache.search(one), line
    if cache.search(shape):
      assert kind not in ("copy", "transpose", "concatenate", "pad", "select"), line
      if kind == "copy-start":
        target, source = re.findall(r"\w+\[[\d,]+\]\{[^}]*\}", shape)
        assert ("S(1)" in target) != ("S(1)" in source), line
  assert num_collectives >= 100
