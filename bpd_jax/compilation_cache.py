"""Compiled programs kept on disk, so that a command that compiled before begins at once.

Only commands keep them (`launch.run`): a library sets nothing in its user's process. JAX
knows a program by what it computes, by the compiler and by its flags, but where machines of
several processors share a home it would load for one what another's instructions are in: so
each processor has a folder of its own.
"""

import contextlib
import hashlib
import os
from pathlib import Path
import platform
import time

import jax

# Variables of JAX that say where, or that nothing is kept: a user's word wins.
FOLDER_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
SWITCH_VARIABLE = "JAX_ENABLE_COMPILATION_CACHE"
KEPT_DAYS = 30
# What of Linux' account of a processor says which instructions a compiler may choose; some of
# those depend on the model.
_CPU_FIELDS = frozenset({
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features",
    "isa", "cpu", "machine",
})
# By default JAX keeps only what compiled for a second, and on a CPU little does.
_OPTIONS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


def default_folder() -> Path:
  """Where commands keep programs: in the folder that desktops give to caches.

  Raises:
    RuntimeError: where the user has no home.
  """
  given = Path(os.environ.get("XDG_CACHE_HOME", ""))
  return (given if given.is_absolute() else Path.home() / ".cache") / "bpd_jax" / "programs"


def describe_cache() -> str:
  """For `--help`."""
  return (
      "Compiled programs are kept in $XDG_CACHE_HOME/bpd_jax or ~/.cache/bpd_jax, in "
      f"{FOLDER_VARIABLE} where that is set, and nowhere with {SWITCH_VARIABLE}=false."
  )


def keep_programs() -> None:
  """Lets JAX keep in `default_folder` what this process compiles.

  Does nothing where the user has said where to, or to keep nothing, and where the folder
  can't be written.
  """
  # An empty name is a word too: JAX keeps nothing then.
  if (FOLDER_VARIABLE in os.environ or jax.config.jax_compilation_cache_dir is not None
      or not jax.config.jax_enable_compilation_cache):
    return
  try:
    set_folder(open_folder(default_folder()))
  except (OSError, RuntimeError):
    pass


def set_folder(folder: Path) -> None:
  """Lets JAX keep in a folder all that this process compiles, however fast that was."""
  jax.config.update("jax_compilation_cache_dir", str(folder))
  for name, value in _OPTIONS.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)


def environment_of(folder: Path) -> dict[str, str]:
  """Variables that do for another process what `set_folder` does for this one."""
  return {FOLDER_VARIABLE: str(folder)} | {
      name.upper(): str(value) for name, value in _OPTIONS.items()
  }


def open_folder(folder: Path) -> Path:
  """Makes a folder for this processor's programs below `folder`, which may be there.

  What no processor's process has read for `KEPT_DAYS` is deleted.

  Raises:
    OSError: where it can't be written.
  """
  own = folder / processor_fingerprint()
  # What is loaded from here is run, so that nobody else may write here.
  own.mkdir(mode=0o700, parents=True, exist_ok=True)
  if not os.access(own, os.W_OK | os.X_OK):
    raise PermissionError(f"{own} can't be written")
  oldest = time.time() - KEPT_DAYS * 24 * 60 * 60
  for path in (*folder.glob("*/*-cache"), *folder.glob("*/call_costs_*.json")):
    # Others may delete at the same time.
    with contextlib.suppress(OSError):
      if path.stat().st_atime < oldest:
        path.unlink()
  return own


def processor_fingerprint(account: Path = Path("/proc/cpuinfo")) -> str:
  """Sixteen hexadecimal digits of the processor and its features.

  Args:
    account: what Linux says of the processors. Without it the machine's name counts:
      another machine may have another processor.
  """
  try:
    first, *_ = account.read_text(encoding="utf-8", errors="replace").strip().split("\n\n")
  except OSError:
    first = ""
  lines = (line.partition(":") for line in first.splitlines())
  fields = {name.strip(): value.strip() for name, _, value in lines}
  known = [f"{name} {fields[name]}" for name in sorted(_CPU_FIELDS & set(fields))]
  words = [platform.machine(), *(known or [platform.node()])]
  return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def make_room(
    maps: Path = Path("/proc/self/maps"), limit: Path = Path("/proc/sys/vm/max_map_count")
) -> None:
  """Drops what this process compiled if there is little room left for more.

  On a CPU a loop of decoding is some 400 mappings of memory, and 150 of those are all that
  Linux lets a process have by default. Up to half of that stays, to be used again.

  Args:
    maps: a line for each mapping of this process.
    limit: how many it may have. Without these two files everything is dropped.
  """
  try:
    with maps.open("rb") as lines:
      has_room = sum(1 for _ in lines) <= int(limit.read_text()) // 2
  except OSError:
    has_room = False
  if not has_room:
    jax.clear_caches()
