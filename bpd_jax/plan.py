"""What decoding and training need of TPUs, found on a machine that has none.

  python -m bpd_jax.plan --gin_file=gin/models/base.gin --gin.BLOCK_SIZE=8
  python -m bpd_jax.plan --gin_file=gin/models/xl.gin --gin.BLOCK_SIZE=8 \\
      --gin.plan.topology="'v5e:8x16'" --gin.plan.batch_size=64

The TPU's own compiler compiles the greedy loop, the blockwise loop and a
forward-backward pass for a topology and says what memory and which collectives
they take. Times are not the compiler's: a decoder call's come from its
arithmetic and its traffic against the chip's published peaks.
"""

from collections.abc import Sequence
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from typing import Any

import gin
import jax
import jax.numpy as jnp
from rich.table import Table

from bpd_jax.addons.heads import Heads
from bpd_jax.decoding.types import Prompt
from bpd_jax.environment import LIBTPU_WITHOUT_TPU
from bpd_jax.errors import InputError
from bpd_jax.evaluation.cost import call_cost
from bpd_jax.launch import read_gin, run
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params, decode_view, EncoderDecoder
from bpd_jax.partitioning import make_partitioning, Partitioning
from bpd_jax.programs import decode_batch, decode_cache, DecodeParams, DecodeSettings
from bpd_jax.reader import ModelReader, prefill
from bpd_jax.terminal import plain_console
from bpd_jax.training.loss import Loss
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.step import Step


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of one chip, https://cloud.google.com/tpu/docs.

  Attributes:
    flops: bfloat16 operations a second.
    bandwidth: bytes a second between the chip and its memory.
    memory: bytes.
    options: what libtpu needs so that one device is one chip.
  """

  flops: float
  bandwidth: float
  memory: float
  options: tuple[tuple[str, str], ...] = ()


CHIPS = {
    "v4": Chip(275e12, 1200e9, 32e9, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 819e9, 16e9),
    "v5p": Chip(459e12, 2765e9, 95e9),
    "v6e": Chip(918e12, 1638e9, 32e9),
}

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(.*?channel_id=(\d+)")
# "bf16[4,8]": bits of an element, none for "pred", and the dimensions.
_ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program; bytes are of one device.

  Attributes:
    name: "greedy", "blockwise" or "forward-backward".
    seconds: wall time of lowering and compiling.
    arguments: bytes of the arguments as they lie in memory, padding included.
    outputs: bytes of the outputs that don't take a donated argument's place.
    temporaries: bytes of everything in between.
    code: bytes of the program.
    collectives: by kind, how many and the bytes of their results. What is in a
      loop counts once: a decode loop's are those of one call, a stack's in
      training those of one layer.
    compiled: jax's own object, for its HLO.
  """

  name: str
  seconds: float
  arguments: int
  outputs: int
  temporaries: int
  code: int
  collectives: dict[str, tuple[int, int]]
  compiled: Any = dataclasses.field(repr=False)

  @property
  def memory(self) -> int:
    """Bytes in all."""
    return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Call:
  """The work of one decoder call on one device, and its time at the peaks.

  Attributes:
    flops: operations, a multiply-add being two.
    bytes: read from memory or written to it.
    seconds: the longer of the two at the chip's peaks.
  """

  flops: int
  bytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `plan` found.

  Attributes:
    chip: of the topology.
    partitioning: the mesh of the topology's devices.
    programs: what was compiled, by name.
    calls: by ("mesh" or "chip", batch size, nodes).
  """

  chip: Chip
  partitioning: Partitioning
  programs: dict[str, Program]
  calls: dict[tuple[str, int, int], Call]


def topology_devices(topology: str) -> tuple[Chip, Sequence[Any]]:
  """The chip and the devices of a topology such as "v5e:4x4".

  Raises:
    InputError: for a chip that isn't in `CHIPS`, or a shape that libtpu refuses.
  """
  from jax.experimental import topologies

  name = str(topology).partition(":")[0]
  if name not in CHIPS:
    raise InputError(
        "topology", topology, f"a chip of {list(CHIPS)}, a colon and a shape, as in 'v5e:4x4'"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise InputError("libtpu", "not installed", "pip install 'bpd_jax[plan-tpu]'")
  for variable, value in LIBTPU_WITHOUT_TPU.items():
    os.environ.setdefault(variable, value)
  try:
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **dict(CHIPS[name].options)
    )
  except jax.errors.JaxRuntimeError as error:
    raise InputError("topology", topology, f"what libtpu knows ({error})") from error
  return CHIPS[name], description.devices


def check_model(config: ModelConfig, heads: Heads, partitioning: Partitioning) -> None:
  """Raises InputError where a size of the model doesn't divide over its mesh axis."""
  sizes = {"vocab_size": "vocab", "d_model": "embed", "d_ff": "mlp", "num_heads": "heads"}
  sizes = {f"ModelConfig.{field}": (getattr(config, field), x) for field, x in sizes.items()}
  if heads.d_ff is not None:
    sizes["Heads.d_ff"] = heads.d_ff, "mlp"
  for field, (size, name) in sizes.items():
    axis = partitioning.spec((name,))[0]
    split = partitioning.mesh.shape[axis] if axis else 1
    if size % split:
      raise InputError(field, size, f"a multiple of {split}, the mesh axis {axis!r}")


def plan_call(
    chip: Chip, partitioning: Partitioning | None, config: ModelConfig, heads: Heads,
    nodes: int, batch_size: int, output_length: int, input_length: int,
) -> Call:
  """The call on a device of the mesh that has rows, or on one chip for None.

  On a mesh the collectives' own time is not counted, and weights split over
  `fsdp` count as if they were whole: a device reads all of them, gathered.
  """
  rows, split = batch_size, 1
  if partitioning is not None:
    mesh = partitioning.mesh.shape
    # Rows are padded to a multiple, so the fullest device has this many.
    rows, split = math.ceil(batch_size / (mesh["data"] * mesh["fsdp"])), mesh["model"]
  # As many heads as a chain of the nodes has use for.
  cost = call_cost(
      config, nodes, rows, output_length, input_length, split,
      num_heads=min(nodes, heads.block_size) - 1, head_d_ff=heads.d_ff or config.d_ff,
  )
  seconds = max(cost.flops / chip.flops, cost.bytes / chip.bandwidth)
  return Call(cost.flops, cost.bytes, seconds)


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
  """Counts the collectives of a compiled program by kind.

  Args:
    hlo: its text. One collective can be there several times, cut into steps
      that run beside other work; they share a channel and count once.

  Returns:
    By kind, how many and the bytes of their results on a device.
  """
  found = {}
  for shape, kind, channel in _COLLECTIVE.findall(hlo):
    # What starts an asynchronous one returns its operand as well.
    size = max(
        int(bits or 8) * math.prod(map(int, dims.split(","))) // 8 if dims else 0
        for bits, dims in _ARRAY.findall(shape)
    )
    found[channel] = (kind, size)
  return {
      kind: (len(sizes), sum(sizes))
      for kind in COLLECTIVES
      if (sizes := [size for other, size in found.values() if other == kind])
  }


def compile_abstract(function, *args, **options) -> tuple[Any, Any]:
  """Compiles for the devices that the arguments' shardings name.

  Args:
    function: to jit with `options`.
    *args: trees of `jax.ShapeDtypeStruct` with shardings.
    **options: of `jax.jit`.

  Returns:
    The compiled program, and its outputs as arguments of the next.
  """
  lowered = jax.jit(function, **options).lower(*args)
  compiled = lowered.compile()
  outputs = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      lowered.out_info, compiled.output_shardings,
  )
  return compiled, outputs


def compile_program(name: str, function, *args, **options) -> Program:
  """Compiles and reads what the compiler says of the program."""
  began = time.perf_counter()
  compiled, _ = compile_abstract(function, *args, **options)
  seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  return Program(
      name=name,
      seconds=seconds,
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      code=memory.generated_code_size_in_bytes,
      collectives=collectives(compiled.as_text()),
      compiled=compiled,
  )


def decode_config(config: ModelConfig, dtype: str) -> ModelConfig:
  """What `generation.load` makes of a folder's config and a dtype."""
  return config.with_dtype(dtype)


def decode_program(
    name: str, heads: Heads, config: ModelConfig, partitioning: Partitioning,
    batch_size: int, input_length: int, output_length: int,
) -> Program:
  """Compiles a decode loop as `generation.Generator` would run it.

  The view, the encoder and the empty cache are compiled too: where their
  outputs lie is where the loop's arguments lie.
  """
  place = functools.partial(_array, partitioning)
  model = EncoderDecoder(config, partitioning, is_view=True)
  _, view = compile_abstract(
      functools.partial(decode_view, config), abstract_params(config, partitioning)
  )
  tokens = place((batch_size, input_length), jnp.int32, "batch", "length")
  rows = place((batch_size,), jnp.int32, "batch")
  _, context = compile_abstract(functools.partial(prefill, model), view, tokens, rows)
  own = heads.abstract(config, partitioning)
  if own:
    _, own = compile_abstract(heads.view, own)
  drafting = heads.make(ModelReader(model), own).drafting
  settings = DecodeSettings(drafting.drafter)
  _, cache = compile_abstract(
      functools.partial(decode_cache, model, settings, batch_size, output_length)
  )
  return compile_program(
      name, functools.partial(decode_batch, model, settings),
      DecodeParams(view, drafting.params), context, Prompt(tokens, rows, output_length), rows,
      place((), jnp.int32), rows, cache, donate_argnums=6,
  )


def training_program(
    config: ModelConfig, heads: Heads, partitioning: Partitioning, batch_size: int,
    input_length: int, output_length: int,
) -> Program:
  """Compiles the loss of all heads and its gradients, which lie as the parameters do."""
  place = functools.partial(_array, partitioning)
  step = Step(config, partitioning, Optimizer(), Loss(trains_base=True), heads)
  params = step.abstract_state.params
  rows = lambda length: place((batch_size, length), jnp.int32, "batch", "length")
  batch = {
      f"{side}_{name}": rows(length)
      for side, length, names in (
          ("encoder", input_length, ("input_tokens", "segment_ids")),
          ("decoder", output_length, ("input_tokens", "target_tokens", "segment_ids")),
      )
      for name in names
  }
  return compile_program(
      "forward-backward", step.gradients, params, batch, jax.eval_shape(jax.random.key, 0),
      out_shardings=(
          jax.tree.map(lambda leaf: leaf.sharding, params), partitioning.sharding(())
      ),
  )


def _array(partitioning: Partitioning, shape, dtype, *names) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=partitioning.sharding(names))


def plan(
    config: ModelConfig,
    heads: Heads = Heads(1),
    topology: str = "v5e:4x4",
    data: int = -1,
    fsdp: int = 2,
    model: int = 2,
    batch_size: int = 32,
    input_length: int = 512,
    output_length: int = 128,
    dtype: str = "bfloat16",
    node_counts: Sequence[int] = (1, 2, 4, 8, 16, 32),
    batch_sizes: Sequence[int] = (1, 8, 32),
) -> Plan:
  """Compiles the programs for a topology, times calls by the peaks, prints tables.

  Args:
    config: of the model. Training stores its `param_dtype`.
    heads: behind it; the blockwise loop is compiled where there are any.
    topology: a chip of `CHIPS`, a colon and a shape.
    data: devices along the batch only; -1 takes what is left.
    fsdp: devices along the batch and the parameters' `embed` axis.
    model: devices along heads, mlp and vocabulary.
    batch_size: of the compiled programs.
    input_length: tokens of the encoder.
    output_length: most tokens of the decoder.
    dtype: of all products, and of weights and cache in decoding.
    node_counts: nodes of the calls to time.
    batch_sizes: of the calls to time.

  Raises:
    InputError: naming the argument, before anything is compiled; or where a
      program doesn't fit the devices.
  """
  for name, value in {"data": data, "fsdp": fsdp, "model": model}.items():
    if not isinstance(value, int):
      raise InputError(name, value, "-1 or a positive integer")
  for name, value in {
      "batch_size": batch_size, "input_length": input_length, "output_length": output_length,
  }.items():
    if not isinstance(value, int) or value < 1:
      raise InputError(name, value, "a positive integer")
  for name, values in {"node_counts": node_counts, "batch_sizes": batch_sizes}.items():
    if not isinstance(values, (tuple, list)) or not values or not all(
        isinstance(value, int) and value > 0 for value in values
    ):
      raise InputError(name, values, "positive integers, as in (1, 8)")
  if dtype not in ("bfloat16", "float32"):
    raise InputError("dtype", dtype, "bfloat16 or float32")
  decoded = decode_config(config, dtype)
  config = config.replace(dtype=dtype, accum_dtype=decoded.accum_dtype)
  chip, devices = topology_devices(topology)
  partitioning = make_partitioning(data, fsdp, model, devices)
  partitioning.check_batch(batch_size)
  check_model(config, heads, partitioning)

  console = plain_console()
  shape = ", ".join(f"{axis} {size}" for axis, size in partitioning.mesh.shape.items())
  console.print(
      f"{topology}, mesh {shape}; batch {batch_size}, {input_length} in, {output_length} out, "
      f"{dtype}, block size {heads.block_size}"
  )
  calls = {
      (where, rows, nodes): plan_call(
          chip, on, decoded, heads, nodes, rows, output_length, input_length
      )
      for where, on in (("mesh", partitioning), ("chip", None))
      for rows in batch_sizes
      for nodes in node_counts
  }
  for where, title in (("chip", "on one chip"), ("mesh", "on the mesh, without collectives")):
    console.print(_call_table(title, where, calls, node_counts, batch_sizes))

  loop = lambda name, heads: decode_program(
      name, heads, decoded, partitioning, batch_size, input_length, output_length
  )
  jobs = {"greedy": lambda: loop("greedy", Heads(1))}
  if heads.block_size > 1:
    jobs["blockwise"] = lambda: loop("blockwise", heads)
  else:
    console.print("no blockwise loop: there are no parallel heads; set the block size")
  jobs["forward-backward"] = lambda: training_program(
      config, heads, partitioning, batch_size, input_length, output_length
  )
  programs = {}
  for name, job in jobs.items():
    try:
      with console.status(f"compiling {name}"):
        programs[name] = job()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      reason = next(line for line in str(error).splitlines() if line.strip())
      raise InputError(
          "topology", topology, f"one that holds the {name} program ({reason})"
      ) from error
  console.print(_memory_table(programs, chip))
  console.print(_collective_table(programs))
  return Plan(chip, partitioning, programs, calls)


def _call_table(title: str, where: str, calls, node_counts, batch_sizes) -> Table:
  """Time of a call, and over that of the fewest nodes; a column a batch size."""
  table = Table(title=f"Roofline time of a decoder call {title}, ms (over {min(node_counts)} node)")
  table.add_column("nodes", justify="right")
  for batch_size in batch_sizes:
    table.add_column(f"batch {batch_size}", justify="right")
  for nodes in node_counts:
    cells = []
    for batch_size in batch_sizes:
      call = calls[where, batch_size, nodes]
      ratio = call.seconds / calls[where, batch_size, min(node_counts)].seconds
      cells.append(f"{1e3 * call.seconds:.3f} ({ratio:.2f})")
    table.add_row(str(nodes), *cells)
  return table


def _memory_table(programs: dict[str, Program], chip: Chip) -> Table:
  table = Table(title=f"Memory a device, MB of {chip.memory / 1e6:,.0f}")
  table.add_column("program", no_wrap=True)
  fields = ("arguments", "outputs", "temporaries", "code", "memory")
  for name in (*fields[:-1], "total", "compile"):
    table.add_column(name, justify="right")
  for program in programs.values():
    cells = [f"{getattr(program, field) / 1e6:,.1f}" for field in fields]
    table.add_row(program.name, *cells, f"{program.seconds:.0f} s")
  return table


def _collective_table(programs: dict[str, Program]) -> Table:
  table = Table(title="Collectives a device; what a loop repeats counts once")
  for name in ("program", "kind"):
    table.add_column(name)
  for name in ("number", "MB"):
    table.add_column(name, justify="right")
  for program in programs.values():
    for kind, (number, size) in program.collectives.items():
      table.add_row(program.name, kind, str(number), f"{size / 1e6:,.2f}")
  return table


gin.external_configurable(plan, module="bpd_jax", denylist=["config", "heads"])


def main(argv: Sequence[str]) -> None:
  """Plans; see `--help`."""
  read_gin(argv, "python -m bpd_jax.plan", __doc__.splitlines()[0], has_cache=False)
  # The host needs no accelerator, and libtpu finds none to start.
  jax.config.update("jax_platforms", "cpu")
  heads = {"block_size": 1} | gin.get_bindings("Heads")
  plan(
      ModelConfig(**gin.get_bindings("ModelConfig")), Heads(**heads), **gin.get_bindings("plan")
  )


if __name__ == "__main__":
  # Its table says how long compiling took.
  run(main, has_cache=False)
