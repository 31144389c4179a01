"""Rows of text from JSONL files, one object a line."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import re

from bpd_jax.errors import InputError
from bpd_jax.folders import local_path


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
        fields as texts; where the file can't be read or is empty.
    """
    fields = {"inputs": self.inputs}
    if self.targets is not None:
      fields["targets"] = self.targets
    try:
      text = self.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f"JsonlTask {self.name} path", self.path, "a UTF-8 text file") from error
    return parse_jsonl(text, fields, self.path, self.max_examples)


def parse_jsonl(
    text: str, fields: Mapping[str, str], source: str, max_examples: int | None = None
) -> list[dict[str, str]]:
  """Texts that stand in fields of JSON objects, one object a line.

  Args:
    text: the lines; empty ones are skipped.
    fields: name in a row -> field of the object.
    source: what the lines were read from, for errors.
    max_examples: how many rows, from the first.

  Raises:
    InputError: naming source and line where a line isn't an object with the
      fields as texts, or the source where there is none.
  """
  rows = []
  # Not splitlines(), which also breaks at characters that JSON allows in texts.
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except ValueError as error:
      raise InputError(f"{source}:{number}", line[:40], f"JSON ({error})") from error
    row = {}
    for name, field in fields.items():
      value = record.get(field) if isinstance(record, dict) else None
      if not isinstance(value, str):
        raise InputError(f"{source}:{number} {field}", value, "a text")
      row[name] = value
    rows.append(row)
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
