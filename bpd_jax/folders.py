"""Folders and files that appear whole or not at all, and the JSON objects in them."""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils

from bpd_jax.errors import InputError

PathLike = str | os.PathLike


def check_new(folder: PathLike) -> None:
  """Raises InputError where something is at the path."""
  if os.path.lexists(folder):
    raise InputError("folder", str(folder), "a path where nothing is yet")


@contextlib.contextmanager
def new_folder(folder: PathLike, *, may_replace: bool = False) -> Iterator[Path]:
  """A folder that appears at its path only when the block has ended well.

  Yields a hidden sibling to write into, which is renamed at the end, or removed
  where the block raises. With several processes all enter, and the first one
  makes and renames.

  Args:
    folder: the path.
    may_replace: whether a folder may be there, which stays until the end.
  """
  if not may_replace:
    check_new(folder)
  folder = Path(os.path.abspath(folder))
  partial = folder.with_name(f".{folder.name}.partial")
  is_first = jax.process_index() == 0
  if is_first:
    try:
      shutil.rmtree(partial, ignore_errors=True)
      partial.mkdir(parents=True)
    except OSError as error:
      raise InputError(
          "folder", str(folder), f"a path that can be written ({error.strerror})"
      ) from error
  _wait_for_all("begin")
  try:
    yield partial
    _wait_for_all("written")
    if is_first:
      old = folder.with_name(f".{folder.name}.old")
      if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
      partial.rename(folder)
      shutil.rmtree(old, ignore_errors=True)
    _wait_for_all("renamed")
  except BaseException:
    if is_first:
      shutil.rmtree(partial, ignore_errors=True)
    raise


@contextlib.contextmanager
def new_file(path: PathLike) -> Iterator[Path]:
  """A file that appears at its path, in place of what is there, when the block has ended well.

  Yields a hidden sibling to write, which is renamed at the end, or removed where the
  block raises.
  """
  path = Path(path)
  partial = partial_file(path)
  try:
    yield partial
    partial.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise


def partial_file(path: Path) -> Path:
  """Where `new_file` writes; it stays there where the process is killed."""
  return path.with_name(f".{path.name}.partial")


def read_object(path: Path) -> dict[str, Any]:
  """Reads a JSON object; InputError naming the file where it isn't one."""
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise InputError(
        "file", str(path), f"a file that can be read ({error.strerror})"
    ) from error
  except ValueError as error:
    raise InputError(str(path), str(error), "JSON") from error
  if not isinstance(fields, dict):
    raise InputError(str(path), type(fields).__name__, "a JSON object")
  return fields


def write_object(path: Path, fields: dict[str, Any]) -> None:
  """Writes a JSON object, one field a line."""
  path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _wait_for_all(what: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"new_folder {what}")
