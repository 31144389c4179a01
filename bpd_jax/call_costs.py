"""What a decoder call of each block size costs on this machine: the table that `auto` reads.

It is measured once for a model's sizes, a drafter, a batch size and a device, with the program
that is going to decode, and kept beside the compiled programs where those are kept. A file of
it can be given instead: so that a result is made again with the costs that it was made with,
and on clusters, where all hosts must decide alike.
"""

from collections.abc import Callable, Sequence
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
from pathlib import Path
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from bpd_jax.compilation_cache import processor_fingerprint
from bpd_jax.decoding.policies.goodput import Goodput
from bpd_jax.decoding.types import Drafting, Policing
from bpd_jax.environment import describe_device, versions
from bpd_jax.errors import brief, InputError
from bpd_jax.folders import local_path, new_file, PathLike, read_object, write_object
from bpd_jax.model.config import ModelConfig
from bpd_jax.partitioning import Partitioning

# Timed runs of each block size; most and fewest tokens of a row in one, and about its seconds
# where every call makes one token; and the calls without which a size isn't timed.
REPEATS, MOST_TOKENS, FEWEST_TOKENS, RUN_SECONDS, FEWEST_CALLS = 5, 64, 24, 0.2, 3
# Beyond this share of the machine that others use, a table isn't kept.
BUSY = 0.25


@dataclasses.dataclass(frozen=True)
class CallCosts:
  """Measured seconds of a decoder call, by block size.

  Attributes:
    of: what was timed, by `costs_key`.
    widths: block sizes, rising from 1.
    seconds: of a call of each, draft included, the median; infinite where too few were made.
    ranges: least and largest of each.
    date: when, ISO 8601 in UTC; None for costs that somebody made up.
    busy: the share of the processors that others used just before; None where unknown.

  Raises:
    InputError: naming the field that isn't so.
  """

  of: dict[str, Any]
  widths: tuple[int, ...]
  seconds: tuple[float, ...]
  ranges: tuple[tuple[float, float], ...]
  date: str | None = None
  busy: float | None = None

  def __post_init__(self):
    widths = list(self.widths)
    if not all(type(width) is int for width in widths) or not widths or widths[0] != 1 or (
        widths != sorted(set(widths))):
      raise InputError("costs widths", widths, "whole numbers, rising from 1")
    if not len(self.widths) == len(self.seconds) == len(self.ranges):
      raise InputError("costs seconds", list(self.seconds), f"{len(widths)} numbers, as widths")
    if not all(seconds > 0 for seconds in self.seconds) or self.seconds[0] == math.inf:
      raise InputError("costs seconds", list(self.seconds), "positive numbers")

  @property
  def may_be_kept(self) -> bool:
    """Whether every size was timed, on a machine that had little else to do."""
    return max(self.seconds) < math.inf and (self.busy is None or self.busy <= BUSY)

  def check(self, key: dict[str, Any], block_size: int) -> None:
    """Raises InputError where it is of something else than `costs_key` says."""
    for name, wanted in key.items():
      if self.of.get(name) != wanted:
        raise InputError(f"costs {name}", self.of.get(name), f"{wanted!r}, as it is here")
    if self.widths[-1] != block_size:
      raise InputError(
          "costs widths", list(self.widths), f"1 … {block_size}, the drafter's block size"
      )

  def describe(self) -> dict[str, Any]:
    """For `results.json`, and what `save` writes; None for what wasn't timed."""
    known = lambda seconds: seconds if seconds < math.inf else None
    return dataclasses.asdict(self) | {
        "seconds": [known(seconds) for seconds in self.seconds],
        "ranges": [[known(low), known(high)] for low, high in self.ranges],
    }

  def save(self, path: PathLike) -> None:
    """Writes it as JSON; InputError where a size wasn't timed."""
    if max(self.seconds) == math.inf:
      raise InputError(
          "costs seconds", self.describe()["seconds"],
          "one of every size, as prompts with longer outputs give",
      )
    with new_file(local_path(path, "costs")) as partial:
      write_object(partial, self.describe())

  def policing(self) -> Policing:
    """The policy that chooses by these costs, with nothing seen yet."""
    policy = Goodput(self.widths)
    return Policing(policy, policy.params(self.seconds))


def costs_key(
    config: ModelConfig, partitioning: Partitioning, drafting: Drafting, batch_size: int
) -> dict[str, Any]:
  """All that the costs of calls depend on, but for how long rows are."""
  sizes = json.dumps(dataclasses.asdict(config), sort_keys=True, default=str)
  kind = type(drafting.drafter)
  # The default says where in memory an object lies.
  fields = "" if kind.__repr__ is object.__repr__ else repr(drafting.drafter)
  learned = [
      (jax.tree_util.keystr(path), np.shape(leaf), str(jnp.result_type(leaf)))
      for path, leaf in jax.tree_util.tree_leaves_with_path(drafting.params)
  ]
  text = f"{sizes} {kind.__module__}:{kind.__qualname__} {fields} {learned}"
  digest = hashlib.sha256(text.encode()).hexdigest()[:16]
  device = describe_device()
  if partitioning.mesh.devices.flat[0].platform == "cpu":
    # A kind of GPU is one, of processors there are many.
    device += f", {processor_fingerprint()}"
  return {
      "model": digest,
      "batch_size": batch_size,
      "device": device,
      "mesh": [int(size) for size in partitioning.mesh.devices.shape],
      "jax": versions()["jax"],
  }


def load_costs(path: PathLike) -> CallCosts:
  """Reads a table.

  Args:
    path: of `CallCosts.save`.

  Raises:
    InputError: naming the file where it isn't such a table, or the field.
  """
  file = local_path(path, "costs")
  try:
    fields = read_object(file)
    names = {entry.name for entry in dataclasses.fields(CallCosts)}
    if set(fields) != names:
      raise ValueError(f"its fields aren't {sorted(names)}")
    numbers = [*fields["seconds"], *itertools.chain(*fields["ranges"])]
    if fields["busy"] is not None:
      numbers.append(fields["busy"])
    if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
      raise ValueError("not all of its seconds are finite numbers")
    return CallCosts(**fields | {
        "of": dict(fields["of"]), "widths": tuple(fields["widths"]),
        "seconds": tuple(map(float, fields["seconds"])),
        "ranges": tuple((float(low), float(high)) for low, high in fields["ranges"]),
    })
  except InputError as error:
    if error.field.startswith("costs "):
      raise
    raise InputError("costs", str(path), "a file of CallCosts.save") from error
  except (OSError, TypeError, ValueError) as error:
    raise InputError("costs", str(path), f"a file of CallCosts.save ({brief(error)})") from error


def kept_file(key: dict[str, Any]) -> Path | None:
  """Where a table is kept: with the compiled programs; None where those aren't."""
  folder = jax.config.jax_compilation_cache_dir
  if not folder or "://" in folder or not jax.config.jax_enable_compilation_cache:
    return None
  digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
  return Path(folder) / f"call_costs_{digest}.json"


def find_costs(
    run: Callable[[Policing, int], tuple[float, list[int]]], widths: Sequence[int],
    key: dict[str, Any], max_length: int, *, is_fresh: bool = False,
) -> CallCosts:
  """The table that is kept; where there is none, it is measured, and kept if it may be.

  Args:
    run: see `measure_costs`, also for what follows.
    widths: block sizes.
    key: of `costs_key`.
    max_length: most tokens of a row.
    is_fresh: whether it is measured whatever is kept.
  """
  file, costs = kept_file(key), None
  if file is not None and file.exists() and not is_fresh:
    try:
      costs = load_costs(file)
      costs.check(key, widths[-1])
      costs = costs if costs.widths == tuple(widths) else None
    except InputError:
      costs = None  # of an older form, or cut
  # Hosts may have kept different ones, and decide alike.
  none = [np.nan] * len(widths)
  seconds = _of_first(np.array(none if costs is None else costs.seconds))
  if np.isfinite(seconds).all():
    if costs is None:
      ranges = tuple((x, x) for x in seconds.tolist())
      return CallCosts(key, tuple(widths), tuple(seconds.tolist()), ranges)
    return dataclasses.replace(costs, seconds=tuple(seconds.tolist()))
  costs = measure_costs(run, widths, key, max_length)
  if file is not None and costs.may_be_kept:
    try:
      costs.save(file)
    except OSError:
      pass  # the next process measures again
  return costs


def measure_costs(
    run: Callable[[Policing, int], tuple[float, list[int]]], widths: Sequence[int],
    key: dict[str, Any], max_length: int,
) -> CallCosts:
  """Times calls of each block size, in turn.

  Args:
    run: decodes a batch under a policy, at most so many tokens a row; seconds, and
      how wide each decoder call was: tokens that some row drafted, and the root.
    widths: block sizes, rising from 1.
    key: of `costs_key`.
    max_length: most tokens of a row.

  Returns:
    The table; on several processes that of the first.
  """
  policy = Goodput(tuple(widths))
  alone = [
      Policing(policy, policy.params(np.where(np.arange(len(widths)) == i, 1.0, np.inf)))
      for i in range(len(widths))
  ]
  run(alone[0], 1)  # compiles
  busy = busy_share()
  tokens = min(max_length, MOST_TOKENS)
  seconds, calls = run(alone[0], min(tokens, FEWEST_TOKENS))
  # Processes make the same runs, or they would wait for each other.
  per_call = float(_of_first(np.float64(seconds / len(calls))))
  tokens = int(np.clip(RUN_SECONDS / per_call, min(tokens, FEWEST_TOKENS), tokens))
  once, whole = np.empty([REPEATS]), np.empty([len(widths), REPEATS])
  num_calls = np.zeros([len(widths), len(widths)], int)  # of each run, by what they were
  for repeat in range(REPEATS):
    # A batch's own seconds, and those of its first call, which is over the roots alone.
    once[repeat], _ = run(alone[0], 1)
    for i, policing in enumerate(alone):
      whole[i, repeat], calls = run(policing, tokens)
      # The least size that holds it, as the loop takes it.
      num_calls[i] = np.bincount(np.searchsorted(widths, calls[1:]), minlength=len(widths))
  times = _of_first(solve_times(whole - np.median(once), num_calls))
  return CallCosts(
      key, tuple(widths), tuple(np.median(times, axis=1).tolist()),
      tuple(zip(times.min(1).tolist(), times.max(1).tolist())),
      datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), busy,
  )


def solve_times(whole: np.ndarray, num_calls: np.ndarray) -> np.ndarray:
  """Seconds of a call of each size, of runs in which calls of smaller sizes were made too.

  Args:
    whole: [sizes, repeats] seconds of runs, without their first calls.
    num_calls: [sizes, sizes], of the run of each size the other calls, by their size.

  Returns:
    [sizes, repeats]; infinite where a run had too few calls of its size.
  """
  times = np.full(whole.shape, np.inf)
  for i, calls in enumerate(num_calls):
    if calls[i] >= FEWEST_CALLS:
      others = calls[:i] > 0
      rest = whole[i] - calls[:i][others] @ np.median(times[:i][others], axis=1)
      # Where a clock is coarse or the machine stumbled, a difference may be none.
      times[i] = np.maximum(rest / calls[i], 1e-7)
  if np.isinf(times[0]).all():
    # Rows that end at once have nothing to draft: their calls are all over the roots.
    times[0] = np.maximum(whole[0], 1e-7)
  return times


def busy_share(account: Path = Path("/proc/stat"), seconds: float = 0.2) -> float | None:
  """The share of the processors' time that is used while this process sleeps, 0 to 1.

  Args:
    account: Linux' account of that time.
    seconds: to look for.

  Returns:
    None where there is no such account.
  """
  def read() -> tuple[int, int]:
    # user, nice, system, idle, iowait, …
    fields = [int(field) for field in account.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields), fields[3] + fields[4]

  try:
    before = read()
    time.sleep(seconds)
    after = read()
  except (OSError, ValueError, IndexError):
    return None
  passed = after[0] - before[0]
  return None if passed <= 0 else round(1 - (after[1] - before[1]) / passed, 3)


def _of_first(values: np.ndarray) -> np.ndarray:
  """What the first process has."""
  if jax.process_count() == 1:
    return values
  # JAX sends no float64 where it isn't enabled; nanoseconds have room in float32's bits.
  return np.asarray(
      multihost_utils.broadcast_one_to_all(np.asarray(values, np.float32)), np.float64
  )
