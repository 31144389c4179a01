"""What every benchmark needs: engines in processes of their own, spreads, the machine."""

from collections.abc import Callable, Sequence
import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import os
from pathlib import Path
import statistics
from typing import Any

import jax

from bpd_jax.errors import check_count, InputError

# The OpenMP threads of the other engines spin for up to 0.2 s after their last
# task; whoever runs next would share the cores with them.
PAUSE_SECONDS = 0.3
# A narrower console would break figures over lines.
TABLE_WIDTH = 110
PACKAGES = {
    "transformers": ("torch", "transformers"),
    "ctranslate2": ("ctranslate2", "torch", "transformers"),
}


class Worker:
  """An engine in a process of its own; a call sends the inputs and waits.

  The process is a fresh one, with the cores and the environment of this one.
  """

  def __init__(self, load: Callable[..., Callable[[Any], Any]], *args: Any):
    context = multiprocessing.get_context("spawn")
    self._pipe, end = context.Pipe()
    self._process = context.Process(target=_serve, args=(end, load, args), daemon=True)
    self._process.start()
    end.close()
    self._receive()

  def __call__(self, inputs: Any) -> Any:
    self._pipe.send(inputs)
    return self._receive()

  def close(self) -> None:
    """Ends the process."""
    self._pipe.close()
    self._process.join()

  def _receive(self) -> Any:
    answer = self._pipe.recv()
    if isinstance(answer, Exception):
      raise answer
    return answer


def _serve(pipe: Any, load: Callable[..., Callable[[Any], Any]], args: Sequence[Any]) -> None:
  """The body of a worker: loads, then answers until the pipe closes."""
  try:
    run = load(*args)
    pipe.send(None)
    while True:
      pipe.send(run(pipe.recv()))
  except EOFError:
    pass
  except Exception as error:
    pipe.send(error)


@dataclasses.dataclass(frozen=True)
class Spread:
  """Median, least and largest of some repeats."""

  median: float
  low: float
  high: float

  @classmethod
  def of(cls, values: Sequence[float]) -> "Spread":
    """Of any numbers, at least one."""
    return cls(statistics.median(values), min(values), max(values))

  @classmethod
  def ratio(cls, above: Sequence[float], below: Sequence[float]) -> "Spread":
    """Of the ratios of two series, repeat by repeat."""
    return cls.of([a / b for a, b in zip(above, below, strict=True)])

  def text(self, digits: int) -> str:
    """As in a table: median (least–largest)."""
    median, low, high = (f"{x:,.{digits}f}" for x in (self.median, self.low, self.high))
    return f"{median} ({low}–{high})"


def check_counts(options: Any) -> None:
  """Raises InputError where a field of a dataclass isn't a positive integer, or a tuple of them."""
  for field in dataclasses.fields(options):
    value = getattr(options, field.name)
    for each in value if isinstance(value, tuple) else (value,):
      check_count(field.name, each)


def missing_packages(engine: str) -> list[str]:
  """What of an engine's packages isn't installed."""
  return [name for name in PACKAGES[engine] if importlib.util.find_spec(name) is None]


def quiet_transformers() -> None:
  """Keeps transformers from writing between the progress bars."""
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()


def describe_machine(threads: int) -> dict[str, Any]:
  """The processor, its cores in use, and the versions that count."""
  names = [
      line.partition(":")[2].strip()
      for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
      if line.startswith("model name")
  ]
  versions = {}
  for package in ("jax", "jaxlib", "flax", "torch", "transformers", "ctranslate2"):
    if importlib.util.find_spec(package) is not None:
      versions[package] = importlib.metadata.version(package)
  return {"processor": names[0] if names else "unknown", "threads": threads, "versions": versions}


def pin_cores(threads: int) -> None:
  """Leaves this process `threads` cores; to be called before JAX starts.

  XLA makes as many threads as there are cores to run on; no option sets them.

  Raises:
    InputError: where there are fewer cores, or no way to choose them.
  """
  if not hasattr(os, "sched_setaffinity"):
    raise InputError("threads", threads, "used on Linux only, where cores can be chosen")
  cores = sorted(os.sched_getaffinity(0))
  if threads > len(cores):
    raise InputError("threads", threads, f"1 … {len(cores)}, the cores of this machine")
  os.sched_setaffinity(0, cores[:threads])
  jax.config.update("jax_platforms", "cpu")
