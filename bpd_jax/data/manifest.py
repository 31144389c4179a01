"""The manifest: every file of the corpus with its SHA-256, and what they must give.

A gzipped JSONL file: a header, then one line a distribution. Files are found
through importlib.metadata, in the running environment and in folders that
distributions were put into to be read and never imported; nothing that the
manifest doesn't name counts, and a file that is missing or differs is an InputError.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import sys
import sysconfig
from typing import Any

from bpd_jax.data.sources import is_read, LICENCES, SPLITS, STANDARD_LIBRARY
from bpd_jax.errors import InputError

MANIFEST_FILE = Path(__file__).parent / "files" / "manifest.jsonl.gz"
# Names the folder, or several, that distributions were put into only to be read.
CORPUS_VARIABLE = "BPD_JAX_CORPUS"


def _search_path() -> tuple[str, ...]:
  """Folders that `CORPUS_VARIABLE` names, then those that Python imports from."""
  folders = [name for name in os.environ.get(CORPUS_VARIABLE, "").split(os.pathsep) if name]
  for folder in folders:
    if not os.path.isdir(folder):
      raise InputError(CORPUS_VARIABLE, folder, "a folder that distributions are installed in")
  return (*folders, *sys.path)


@dataclasses.dataclass(frozen=True)
class Environment:
  """Where distributions are looked for.

  Attributes:
    search_path: folders that packages are installed in, the first match wins; those
      that $BPD_JAX_CORPUS names and Python's own by default.
    stdlib: folder of the standard library.
    python_version: its version.
  """

  search_path: tuple[str, ...] = dataclasses.field(default_factory=_search_path)
  stdlib: str = dataclasses.field(default_factory=lambda: sysconfig.get_path("stdlib"))
  python_version: str = dataclasses.field(default_factory=platform.python_version)

  def version(self, distribution: str) -> str | None:
    """The installed version without its local part ("+cpu"), None if there is none."""
    if distribution == STANDARD_LIBRARY:
      return self.python_version
    found = self._find(distribution)
    return None if found is None else found.version.partition("+")[0]

  def files(self, distribution: str) -> dict[str, Path]:
    """Files that the corpus could read, by their path in the manifest, sorted."""
    if distribution == STANDARD_LIBRARY:
      root = Path(self.stdlib)
      found = {
          Path(folder, name).relative_to(root).as_posix(): Path(folder, name)
          for folder, _, names in os.walk(root) for name in names
      }
    else:
      installed = self._find(distribution)
      files = [] if installed is None else installed.files or []
      found = {file.as_posix(): Path(installed.locate_file(file)) for file in files}
    return {path: found[path] for path in sorted(found) if is_read(distribution, path)}

  def _find(self, name: str) -> importlib.metadata.Distribution | None:
    context = importlib.metadata.DistributionFinder.Context(
        name=name, path=list(self.search_path)
    )
    return next(iter(importlib.metadata.MetadataPathFinder.find_distributions(context)), None)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A distribution as the manifest has it.

  Attributes:
    distribution: its name; "python" is the standard library.
    version: without its local part.
    licence: SPDX identifier.
    split: which split its docstrings are in.
    files: SHA-256 of each file, by path.
  """

  distribution: str
  version: str
  licence: str
  split: str
  files: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """All distributions, and the records that they must give.

  Attributes:
    entries: in the order in which they are read.
    fingerprint: of the records, see `docstrings.fingerprint`.
    counts: records of each split.
  """

  entries: tuple[Entry, ...]
  fingerprint: str
  counts: Mapping[str, int]


def read_manifest(path: str | os.PathLike = MANIFEST_FILE) -> Manifest:
  """Reads a manifest; InputError where it isn't one."""
  try:
    with gzip.open(path, "rt", encoding="utf-8") as file:
      header, *lines = map(json.loads, file)
    entries = tuple(Entry(**line) for line in lines)
    manifest = Manifest(entries, header["fingerprint"], header["counts"])
  except (OSError, EOFError) as error:
    raise InputError("manifest", str(path), f"a gzip file ({error})") from error
  except (KeyError, TypeError, ValueError) as error:
    raise InputError("manifest", str(path), f"a manifest of docstrings ({error})") from error
  for entry in manifest.entries:
    if entry.licence not in LICENCES:
      raise InputError(
          f"manifest {entry.distribution} licence", entry.licence, f"one of {sorted(LICENCES)}"
      )
    if entry.split not in SPLITS:
      raise InputError(f"manifest {entry.distribution} split", entry.split, f"one of {SPLITS}")
  return manifest


def write_manifest(path: str | os.PathLike, manifest: Manifest) -> None:
  """Writes a manifest; the same one gives the same bytes."""
  header = {"fingerprint": manifest.fingerprint, "counts": dict(manifest.counts)}
  entries = [dataclasses.asdict(entry) for entry in manifest.entries]
  write_jsonl(path, [header, *entries])


def write_jsonl(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes gzipped JSONL without a name or time in it."""
  text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  Path(path).write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def missing(manifest: Manifest, environment: Environment) -> list[Entry]:
  """Distributions that aren't installed at the manifest's version; pip can't fetch Python's own."""
  return [
      entry for entry in manifest.entries
      if entry.distribution != STANDARD_LIBRARY
      and environment.version(entry.distribution) != entry.version
  ]


def read_files(entry: Entry, environment: Environment) -> Iterator[tuple[str, bytes]]:
  """Path and content of a distribution's files, each checked against the manifest.

  Raises:
    InputError: naming distribution, file, and both versions or hashes.
  """
  name = f"{entry.distribution} {entry.version}"
  version = environment.version(entry.distribution)
  if version != entry.version:
    raise InputError(
        f"corpus distribution {entry.distribution}", version or "not installed",
        f"version {entry.version}, from the manifest",
    )
  found = environment.files(entry.distribution)
  for path, expected in entry.files.items():
    if path not in found or not found[path].is_file():
      raise InputError(
          f"corpus file {path} of {name}", "missing", f"sha256 {expected}, from the manifest"
      )
    content = found[path].read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
      raise InputError(
          f"corpus file {path} of {name}", f"sha256 {digest}",
          f"sha256 {expected}, from the manifest",
      )
    yield path, content
