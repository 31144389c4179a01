"""The rows that are shipped with the package, so that a table can be made anywhere.

`load_rows` reads them, `RowsTask` is what an evaluation is given; nothing but the
standard library is needed. They were chosen from the built corpus by
`choose_rows`, see docs/data.md.
"""

from collections.abc import Collection, Sequence
import dataclasses
import gzip
import hashlib
import json
from pathlib import Path

from bpd_jax.data.cleaning import stable_hash
from bpd_jax.data.extraction import Record
from bpd_jax.data.grammar import grammar
from bpd_jax.data.jsonl import check_max_examples
from bpd_jax.data.manifest import write_jsonl
from bpd_jax.data.text_tasks import RECORD_TASKS
from bpd_jax.errors import InputError
from bpd_jax.vocabulary import SentencePieceVocabulary

FILES = Path(__file__).parent / "files"
VOCABULARY_FILE = FILES / "docstrings.model"
TASKS = (*RECORD_TASKS, "grammar")
NUM_ROWS = {"validation": 200, "test": 500}
MAX_INPUT_TOKENS = 256
MAX_TARGET_TOKENS = 128

# What each task's outputs are judged by: prose by the words it shares with the
# reference, code by edits, and the grammar, which has one right answer, by that. A
# repair counts where the word is right: by characters a text with every third word
# wrong is nine tenths right, and a word that is another one costs as little as a typo.
MAIN_METRICS = {
    "docstring_summary": "rouge_l",
    "docstring_qa": "rouge_l",
    "docstring_lm": "rouge_l",
    "code_format": "edit_similarity",
    "code_body": "edit_similarity",
    "docstring_repair": "word_similarity",
    "docstring_convert": "edit_similarity",
    "grammar": "exact_match",
}
# The beginning of an input that says what to do rather than to what.
INSTRUCTION = (
    r"(summarize|question: .*\ncontext|continue|format|implement|repair|convert to \w+|grammar):\n"
)

Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class RowsTask:
  """A task whose rows are shipped.

  Attributes:
    name: one of `TASKS`.
    split: "validation", for choosing anything at all, or "test".
    max_examples: how many rows, from the first; all by default.
  """

  name: str
  split: str = "test"
  max_examples: int | None = None

  def __post_init__(self):
    check_shipped(self.name, self.split)
    check_max_examples(self.name, self.max_examples)

  @property
  def main_metric(self) -> str:
    """By which outputs are judged."""
    return MAIN_METRICS[self.name]

  @property
  def instruction(self) -> str:
    """A regular expression for the beginning of an input that says what to do."""
    return INSTRUCTION

  def rows(self) -> list[Row]:
    """Reads the rows; see `load_rows`."""
    return load_rows(self.name, self.split)[: self.max_examples]

  def placed_rows(self) -> dict[str, Row]:
    """Rows by where each stands, as in "grammar.test:1"."""
    return {
        f"{self.name}.{self.split}:{number}": row
        for number, row in enumerate(self.rows(), start=1)
    }


def shipped_vocabulary(path: str) -> str:
  """A vocabulary's path; that of the shipped one by its place in a checkout, found anywhere."""
  package = FILES.parents[1]
  is_shipped = path == VOCABULARY_FILE.relative_to(package.parent).as_posix()
  return str(VOCABULARY_FILE) if is_shipped and not Path(path).exists() else path


def check_shipped(task: str, split: str) -> None:
  """Raises InputError where the package has no rows of a task or split."""
  if task not in TASKS:
    raise InputError("task", task, f"one of {TASKS}")
  if split not in NUM_ROWS:
    raise InputError("split", split, f"one of {tuple(NUM_ROWS)}; the package ships no others")


def load_rows(task: str, split: str = "test", folder: Path = FILES) -> list[Row]:
  """Shipped rows of a task.

  Args:
    task: one of `TASKS`.
    split: "validation", for choosing anything at all, or "test".
    folder: the package's own by default.

  Returns:
    Rows with `inputs`, `targets` and `source`, the record's key or "".

  Raises:
    InputError: for an unknown task or split, or where the file can't be read.
  """
  check_shipped(task, split)
  path = _path(folder, task, split)
  try:
    with gzip.open(path, "rt", encoding="utf-8") as file:
      return [json.loads(line) for line in file]
  except (OSError, EOFError, ValueError) as error:
    raise InputError("rows", str(path), f"gzipped JSONL ({error})") from error


def rows_fingerprint(rows: Sequence[Row]) -> str:
  """A hash of inputs and targets in order, the same wherever they are read.

  Rows needn't have targets.
  """
  digest = hashlib.sha256()
  for row in rows:
    digest.update(json.dumps([row["inputs"], row.get("targets")]).encode("utf-8") + b"\n")
  return digest.hexdigest()[:16]


def task_rows(task: str, records: Sequence[Record]) -> list[Row]:
  """All rows that records give for a task, the first of equal inputs or targets."""
  seen, rows = set(), []
  for record in records:
    for example in RECORD_TASKS[task](record):
      if seen.isdisjoint({example.inputs, example.targets}):
        seen |= {example.inputs, example.targets}
        rows.append(
            {"inputs": example.inputs, "targets": example.targets, "source": record.key}
        )
  return rows


def choose_rows(
    task: str,
    split: str,
    records: Sequence[Record],
    train_targets: Collection[str],
    vocabulary: SentencePieceVocabulary,
) -> list[Row]:
  """Rows to ship: those that fit, whose target isn't one of training's, by a hash.

  Args:
    task: one of `TASKS`.
    split: "validation" or "test".
    records: of that split.
    train_targets: of the same task.
    vocabulary: in which inputs and targets must fit, EOS included.
  """
  if task == "grammar":
    return [
        {"inputs": example.inputs, "targets": example.targets, "source": ""}
        for example in grammar(split, NUM_ROWS[split])
    ]
  chosen = []
  rows = task_rows(task, records)
  for row in sorted(rows, key=lambda row: stable_hash(f"{row['source']} {row['inputs']}")):
    fits = (
        len(vocabulary.encode(row["inputs"])) < MAX_INPUT_TOKENS
        and len(vocabulary.encode(row["targets"])) < MAX_TARGET_TOKENS
    )
    if fits and row["targets"] not in train_targets:
      chosen.append(row)
  return chosen[: NUM_ROWS[split]]


def write_rows(folder: Path, task: str, split: str, rows: Sequence[Row]) -> None:
  """Writes what `load_rows` reads."""
  write_jsonl(_path(folder, task, split), rows)


def _path(folder: Path, task: str, split: str) -> Path:
  return folder / f"{task}.{split}.jsonl.gz"
