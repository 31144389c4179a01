"""Folders and files that appear whole or not at all, and the JSON objects in them."""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
from pathlib import Path
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils

from bpd_jax.errors import InputError

PathLike = str | os.PathLike
IDENTITY_FILE = ".identity.json"


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
  folder, partial = _place(folder)
  is_first = jax.process_index() == 0
  if is_first:
    shutil.rmtree(partial, ignore_errors=True)
    _make(partial, folder)
  _wait_for_all("begin")
  try:
    yield partial
    _put(partial, folder)
  except BaseException:
    if is_first:
      shutil.rmtree(partial, ignore_errors=True)
    raise


@contextlib.contextmanager
def resumable_folder(folder: PathLike, identity: dict[str, Any]) -> Iterator[Path]:
  """A `new_folder` whose finished files outlive a block that was cut off.

  The next block of the same identity finds them again; one of another identity begins
  with nothing, as does one after a block that had written nothing.

  Args:
    folder: the path, where nothing is yet.
    identity: what must be equal for files to be of use, ready for JSON.
  """
  check_new(folder)
  folder, partial = _place(folder)
  is_first = jax.process_index() == 0
  if is_first:
    if _identity(partial) != identity:
      shutil.rmtree(partial, ignore_errors=True)
    _make(partial, folder)
    write_object(partial / IDENTITY_FILE, identity)
  _wait_for_all("begin")
  try:
    yield partial
    if is_first:
      (partial / IDENTITY_FILE).unlink()
    _put(partial, folder)
  except BaseException:
    if is_first and {path.name for path in partial.glob("*")} <= {IDENTITY_FILE}:
      shutil.rmtree(partial, ignore_errors=True)
    raise


def _place(folder: PathLike) -> tuple[Path, Path]:
  """The folder's path, and that of the hidden sibling that becomes it."""
  folder = Path(os.path.abspath(folder))
  return folder, folder.with_name(f".{folder.name}.partial")


def _make(partial: Path, folder: Path) -> None:
  try:
    partial.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
        "folder", str(folder), f"a path that can be written ({error.strerror})"
    ) from error


def _put(partial: Path, folder: Path) -> None:
  """Renames what is whole, in place of what was there."""
  _wait_for_all("written")
  if jax.process_index() == 0:
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
      shutil.rmtree(old, ignore_errors=True)
      folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
  _wait_for_all("renamed")


def _identity(partial: Path) -> dict[str, Any] | None:
  try:
    return read_object(partial / IDENTITY_FILE)
  except InputError:
    return None


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


def files_fingerprint(folder: PathLike) -> str:
  """Sixteen hexadecimal digits of all names, sizes and times below a folder, none of contents."""
  stats = [
      (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
      for path in sorted(Path(folder).rglob("*")) if path.is_file()
  ]
  return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


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
