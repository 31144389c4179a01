"""Times training steps on this machine's CPU, beside transformers with the same weights.

  python -m bpd_jax.benchmark train

A random T5 1.1 small in float32, Adafactor, one batch of full rows, no dropout.
Both start from the same weights, and their first losses are compared, so that
both do the same work. Steps alternate, each engine in a process of its own; see
the module `decode`.
"""

import dataclasses
from pathlib import Path
import tempfile
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bpd_jax.addons.heads import Heads
from bpd_jax.benchmark.engines import (
    check_counts,
    missing_packages,
    PAUSE_SECONDS,
    quiet_transformers,
    Spread,
    Worker,
)
from bpd_jax.data.batches import assemble
from bpd_jax.errors import InputError
from bpd_jax.interchange.huggingface import export_model
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device
from bpd_jax.training.loss import head_losses, Loss
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.step import place_batch, Step

# Losses of the same weights on the same batch may differ by this in float32.
LOSS_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """What is measured.

  Attributes:
    batch_size: rows of a step.
    input_length: tokens of a row's inputs.
    output_length: tokens of a row's targets.
    block_size: h of the model with heads.
    repeats: timed steps of each engine.
    threads: cores and threads of every engine.
  """

  batch_size: int = 8
  input_length: int = 256
  output_length: int = 64
  block_size: int = 8
  repeats: int = 7
  threads: int = 2

  def __post_init__(self):
    check_counts(self)
    if self.block_size < 2:
      raise InputError("block_size", self.block_size, "2 or more")


class Trainer:
  """This package's training step; a call does one on the same batch."""

  def __init__(self, config: ModelConfig, heads: Heads, batch: dict[str, np.ndarray]):
    place, key = single_device(), jax.random.key(0)
    optimizer = Optimizer(learning_rate=1e-3, warmup_steps=1)
    self._step = Step(config, place, optimizer, Loss(trains_base=True), heads)
    self._state = self._step.init(
        {"base": init_params(config, place, key), "own": heads.begin(config, place, key)}
    )
    self._batch = place_batch(single_device(), batch)

  def __call__(self, inputs: Any = None) -> tuple[float, float]:
    """The base model's loss before the step, and seconds."""
    began = time.perf_counter()
    self._state, metrics = self._step(self._state, self._batch, jax.random.key(0))
    jax.block_until_ready((self._state, metrics))
    seconds = time.perf_counter() - began
    return head_losses(jax.device_get(metrics))["loss_head_1"], seconds


def load_transformers(folder: Path, options: TrainOptions):
  """transformers on PyTorch with PyTorch's Adafactor."""
  import torch
  import transformers

  quiet_transformers()
  torch.set_num_threads(options.threads)
  model = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
  model.train()
  optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)

  def step(batch):
    inputs, targets = (torch.from_numpy(x).long() for x in batch)
    began = time.perf_counter()
    loss = model(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=targets
    ).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - began
    return loss.item(), seconds

  return step


def measure_training(
    config: ModelConfig, options: TrainOptions, progress: Progress, say=print
) -> dict[str, Any]:
  """Runs everything; compiles first, then times in alternating steps.

  Args:
    config: of the model; no dropout.
    options: what to run.
    progress: shows how many steps are done.
    say: gets a line where an engine is left out.

  Returns:
    engines: name -> seconds [repeats], and loss, the first. "bpd_jax", then
    "bpd_jax, h heads" and "transformers" where it is installed.

  Raises:
    RuntimeError: where the first losses differ, so that the work does, too.
  """
  rng = np.random.default_rng(0)
  draw = lambda length: rng.integers(
      config.eos_id + 1, config.vocab_size, [options.batch_size, length], dtype=np.int32
  )
  inputs, targets = draw(options.input_length), draw(options.output_length)
  rows = [[row] for row in zip(inputs, targets)]
  batch = assemble(rows, options.input_length, options.output_length)
  heads = f"bpd_jax, {options.block_size} heads"
  engines = {
      "bpd_jax": Trainer(config, Heads(1), batch),
      heads: Trainer(config, Heads(options.block_size), batch),
  }
  with tempfile.TemporaryDirectory() as folder:
    if missing := missing_packages("transformers"):
      say(f"transformers is left out: {', '.join(missing)} not installed (extra bench)")
    else:
      params = init_params(config, single_device(), jax.random.key(0))
      export_model(Path(folder) / "transformers", config, jax.device_get(params))
      engines["transformers"] = Worker(load_transformers, Path(folder) / "transformers", options)
    record = {name: {"seconds": []} for name in engines}
    task = progress.add_task("", total=(options.repeats + 1) * len(engines))
    for repeat in range(options.repeats + 1):
      for name, run in engines.items():
        progress.update(task, description=name)
        time.sleep(PAUSE_SECONDS)
        loss, seconds = run((inputs, targets))
        progress.advance(task)
        if repeat:
          record[name]["seconds"].append(seconds)
        else:
          record[name]["loss"] = loss
    if "transformers" in engines:
      engines["transformers"].close()
  losses = [engine["loss"] for engine in record.values()]
  if max(losses) - min(losses) > LOSS_TOLERANCE:
    raise RuntimeError(f"the engines begin with different losses: {losses}")
  return {"engines": record}


def print_training_report(
    console: Console, record: dict[str, Any], options: TrainOptions
) -> None:
  """The table."""
  table = Table(
      title=f"training, batch {options.batch_size} × {options.input_length} tokens in, "
      f"{options.output_length} out; median (least–largest) of {options.repeats}"
  )
  engines = record["engines"]
  for column in ("engine", "seconds a step", "× bpd_jax's time", "× transformers' time"):
    table.add_column(column, justify="left" if column == "engine" else "right")
  for name, engine in engines.items():
    over = lambda other, engine=engine: (
        Spread.ratio(engine["seconds"], engines[other]["seconds"]).text(2)
        if other in engines else "–"
    )
    table.add_row(name, Spread.of(engine["seconds"]).text(3), over("bpd_jax"),
                  over("transformers"))
  console.print(table)
