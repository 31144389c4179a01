"""Paths as users give them; folders and files that appear whole or not at all; JSON in them."""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
import re
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils

from bpd_jax.errors import InputError

PathLike = str | os.PathLike
IDENTITY_FILE = ".identity.json"


# "gs://bucket/run", also where it has been a Path since; a drive has one letter.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# What Orbax takes for a pattern: it writes such folders in part, and can't read them.
_PATTERN = re.compile(r"[*?\[\]]")


def local_path(path: PathLike, field: str = "path") -> Path:
  """A path as a user gives it: `~` is a home.

  Args:
    path: on a local disk.
    field: what it is, for errors.

  Raises:
    InputError: where it is on something else, "gs://…", or there is no such home.
  """
  if not isinstance(path, str | os.PathLike):
    raise InputError(field, path, "a path")
  if _SCHEME.match(os.fspath(path)):
    raise InputError(field, str(path), "a path on a local disk; others can't be read or written")
  try:
    return Path(path).expanduser()
  except RuntimeError as error:
    raise InputError(field, str(path), f"a path of a user that exists ({error})") from error


def array_path(path: PathLike, field: str = "folder") -> Path:
  """`local_path`, absolute, of a folder that Orbax reads or writes.

  Raises:
    InputError: see `local_path`; for characters that Orbax takes for a pattern.
  """
  absolute = Path(os.path.abspath(local_path(path, field)))
  if _PATTERN.search(str(absolute)):
    raise InputError(field, str(absolute), "a path without * ? [ ], which Orbax can't read back")
  return absolute


def check_new(folder: PathLike) -> None:
  """Raises InputError where something is at the path."""
  if os.path.lexists(local_path(folder, "folder")):
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
    _put(partial, folder, may_replace=may_replace)
  except BaseException:
    if is_first:
      shutil.rmtree(partial, ignore_errors=True)
    raise


@contextlib.contextmanager
def resumable_folder(folder: PathLike, identity: dict[str, Any]) -> Iterator[Path]:
  """A `new_folder` whose finished files outlive a block that was cut off.

  The next block of the same identity finds them again, and one of another identity is
  refused. A block that had finished nothing leaves nothing.

  Args:
    folder: the path, where nothing is yet.
    identity: what must be equal for files to be of use, ready for JSON.

  Raises:
    InputError: naming what differs from the identity of the block that was cut off.
  """
  check_new(folder)
  folder, partial = _place(folder)
  is_first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    if is_first:
      _make(partial, folder)
      stack.enter_context(held(partial / IDENTITY_FILE, "folder", folder))
      found = _identity(partial)
      if found is not None:
        check_identity(
            "", found, identity, f"as when {folder} was begun; to begin anew, remove {partial}"
        )
      else:
        _empty(partial)
      write_object(partial / IDENTITY_FILE, identity)
    _wait_for_all("begin")
    try:
      yield partial
      if is_first:
        (partial / IDENTITY_FILE).unlink()
      _put(partial, folder, may_replace=False)
    except BaseException:
      if is_first and {path.name for path in partial.glob("*")} <= {IDENTITY_FILE}:
        shutil.rmtree(partial, ignore_errors=True)
      raise


@contextlib.contextmanager
def held(file: Path, field: str, folder: Path) -> Iterator[None]:
  """Holds a file that one process at a time can hold.

  Args:
    file: made where it isn't there.
    field: what the folder is, for errors.
    folder: whose file it is.

  Raises:
    InputError: where another process holds it.
    OSError: where it can't be written.
  """
  with open(file, "a", encoding="utf-8") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(field, str(folder), "one that no other process works in") from error
    except OSError:
      pass  # A file system without locks.
    yield


def _empty(partial: Path) -> None:
  """Removes all but the file that is held."""
  for path in partial.iterdir():
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    elif path.name != IDENTITY_FILE:
      path.unlink()


def _place(folder: PathLike) -> tuple[Path, Path]:
  """The folder's path, and that of the hidden sibling that becomes it."""
  folder = Path(os.path.abspath(local_path(folder, "folder")))
  return folder, folder.with_name(f".{folder.name}.partial")


def _make(partial: Path, folder: Path) -> None:
  try:
    partial.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
        "folder", str(folder), f"a path that can be written ({error.strerror})"
    ) from error


def _put(partial: Path, folder: Path, *, may_replace: bool) -> None:
  """Renames what is whole, in place of what was there."""
  _wait_for_all("written")
  if jax.process_index() == 0:
    if not may_replace:
      check_new(folder)
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
  path = local_path(path)
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


def contents_fingerprint(path: PathLike, field: str = "path") -> str:
  """Sixteen hexadecimal digits of a file's contents, or of all names and contents in a folder.

  They are the same wherever it lies and whenever it was written; a GB takes a second or two.

  Args:
    path: of the file or folder.
    field: what it is, for errors.

  Raises:
    InputError: where it can't be read.
  """
  path = local_path(path, field)
  digest = hashlib.sha256()
  try:
    if path.is_dir():
      inside = sorted(file for file in path.rglob("*") if file.is_file())
    else:
      inside = [path]
    for file in inside:
      with open(file, "rb") as opened:
        own = hashlib.file_digest(opened, "sha256").hexdigest()
      digest.update(f"{file.relative_to(path).as_posix()} {own}\n".encode())
  except OSError as error:
    raise InputError(field, str(path), f"one that can be read ({error.strerror})") from error
  return digest.hexdigest()[:16]


def check_identity(
    place: str, found: Mapping[str, Any], wanted: Mapping[str, Any], whose: str
) -> None:
  """Raises InputError naming the first field, by its dotted name, that isn't as it was.

  Args:
    place: stands before the field's name.
    found: what was, as JSON has it.
    wanted: what is asked for now.
    whose: says of whom `found` is.
  """
  found, wanted = _flat(found), _flat(wanted)
  for name in sorted(found.keys() | wanted.keys()):
    if found.get(name) != wanted.get(name):
      raise InputError(f"{place} {name}".strip(), wanted.get(name), f"{found.get(name)!r}, {whose}")


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested fields by dotted names, as JSON has their values."""
  flat = {}
  for name, value in fields.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = json.loads(json.dumps(value))
  return flat


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
