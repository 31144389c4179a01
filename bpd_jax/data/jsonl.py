"""Rows of text from JSONL files, one object a line."""

import dataclasses
import json
from pathlib import Path

from bpd_jax.errors import InputError


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
  """

  name: str
  path: str
  inputs: str = "inputs"
  targets: str | None = None
  split: str = "test"
  max_examples: int | None = None

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
      lines = Path(self.path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f"JsonlTask {self.name} path", self.path, "a UTF-8 text file") from error
    rows = []
    for number, line in enumerate(lines, start=1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except ValueError as error:
        raise InputError(f"{self.path}:{number}", line[:40], f"JSON ({error})") from error
      row = {}
      for name, field in fields.items():
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
          raise InputError(f"{self.path}:{number} {field}", value, "a text")
        row[name] = value
      rows.append(row)
      if len(rows) == self.max_examples:
        break
    if not rows:
      raise InputError(f"JsonlTask {self.name} path", self.path, "a file with at least one row")
    return rows
