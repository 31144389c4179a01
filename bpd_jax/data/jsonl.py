"""Rows of text from JSONL files, one object a line."""

from collections.abc import Iterator, Mapping
import dataclasses
import json
from pathlib import Path
import re
from typing import Any

from bpd_jax.errors import check_text, InputError
from bpd_jax.folders import local_path, PathLike


@dataclasses.dataclass(frozen=True)
class JsonlTask:
  """A task whose rows are the lines of a file.

  Attributes:
    name: in results.
    path: the file.
    inputs: field that holds the prompt.
    targets: field that holds the reference; None where there is none.
    split: what the rows are, for results.
    max_examples: how many rows, from the first; all by default.
    main_metric: by which outputs are judged, see `evaluation.quality`.
    instruction: a regular expression for the beginning of an input that says
      what to do rather than to what.
  """

  name: str
  path: str
  inputs: str = "inputs"
  targets: str | None = None
  split: str = "test"
  max_examples: int | None = None
  main_metric: str = "rouge_l"
  instruction: str = ""

  def __post_init__(self):
    check_max_examples(self.name, self.max_examples)
    try:
      re.compile(self.instruction)
    except re.error as error:
      allowed = f"a regular expression ({error})"
      raise InputError(f"{self.name} instruction", self.instruction, allowed) from error

  @property
  def file(self) -> Path:
    """The path on this machine."""
    return local_path(self.path, f"JsonlTask {self.name} path")

  def rows(self) -> list[dict[str, str]]:
    """Reads the rows: `inputs`, and `targets` where the task has them.

    Raises:
      InputError: naming file and line where a line isn't an object with the
        fields as texts in UTF-8; where the file can't be read or is empty.
    """
    return [*self.placed_rows().values()]

  def placed_rows(self) -> dict[str, dict[str, str]]:
    """Rows by where each stands, "PATH:LINE"; see `rows`."""
    fields = {"inputs": self.inputs}
    if self.targets is not None:
      fields["targets"] = self.targets
    text = read_text(self.path, f"JsonlTask {self.name} path")
    return parse_jsonl(text, fields, self.path, self.max_examples)


def read_text(path: PathLike, field: str) -> str:
  """A file's text, its line breaks as they are.

  Args:
    path: the file.
    field: what named it, for errors.

  Raises:
    InputError: naming the path where it can't be read, and the line that isn't UTF-8.
  """
  try:
    data = local_path(path, field).read_bytes()
  except OSError as error:
    raise InputError(field, str(path), f"a UTF-8 text file ({error.strerror})") from error
  return decode_text(data, str(path))


def decode_text(data: bytes, source: str) -> str:
  """Bytes in UTF-8 as text; InputError naming source and line where they aren't."""
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise InputError(
        f"{source}:{line}", data[error.start : error.end], "text in UTF-8"
    ) from error


def text_lines(text: str) -> Iterator[tuple[int, str]]:
  """Numbers, from 1 on, and texts of the lines that aren't empty.

  A line feed ends a line, with or without a carriage return before it. Not splitlines(),
  which also breaks at U+2028, form feeds and others that texts have inside.
  """
  for number, line in enumerate(text.split("\n"), start=1):
    if line.strip():
      yield number, line.removesuffix("\r")


def json_lines(text: str, source: str) -> Iterator[tuple[int, Any]]:
  """Numbers and values of the lines that aren't empty.

  Raises:
    InputError: naming source and line where a line isn't JSON.
  """
  for number, line in text_lines(text):
    try:
      yield number, json.loads(line)
    except ValueError as error:
      raise InputError(f"{source}:{number}", line[:40], f"JSON ({error})") from error


def parse_jsonl(
    text: str, fields: Mapping[str, str], source: str, max_examples: int | None = None
) -> dict[str, dict[str, str]]:
  """Texts that stand in fields of JSON objects, one object a line.

  Args:
    text: the lines; empty ones are skipped.
    fields: name in a row -> field of the object.
    source: what the lines were read from, for errors.
    max_examples: how many rows, from the first.

  Returns:
    Rows by where each stands, "SOURCE:LINE", in order.

  Raises:
    InputError: naming source and line where a line isn't an object with the
      fields as texts in UTF-8, or the source where there is none.
  """
  rows = {}
  for number, record in json_lines(text, source):
    place, row = f"{source}:{number}", {}
    for name, field in fields.items():
      value = record.get(field) if isinstance(record, dict) else None
      if not isinstance(value, str):
        raise InputError(f"{place} {field}", value, "a text")
      check_text(f"{place} {field}", value)
      row[name] = value
    rows[place] = row
    if len(rows) == max_examples:
      break
  if not rows:
    raise InputError("file", source, "at least one row")
  return rows


def check_max_examples(name: str, max_examples: int | None) -> None:
  """Raises InputError where a task is asked for no rows at all."""
  is_count = isinstance(max_examples, int) and max_examples > 0
  if max_examples is not None and not is_count:
    raise InputError(f"{name} max_examples", max_examples, "a positive integer, or None")
