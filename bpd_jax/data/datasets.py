"""Tasks for training, opened as datasets of token ids."""

from collections.abc import Iterator
import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from bpd_jax.data.batches import Dataset
from bpd_jax.data.grammar import GrammarTask
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.rows import rows_fingerprint, RowsTask
from bpd_jax.data.token_cache import TokenCache, write_cache
from bpd_jax.errors import InputError
from bpd_jax.folders import local_path
from bpd_jax.vocabulary import Vocabulary

TextTask = JsonlTask | RowsTask | GrammarTask


@dataclasses.dataclass(frozen=True)
class CachedTask:
  """A token cache from `python -m bpd_jax.prepare cache`.

  Attributes:
    folder: what the command was given as `--to`.
    name: "TASK.SPLIT", or what else the cache's folder in there is called.
    max_examples: how many examples, from the first; all by default.
  """

  folder: str
  name: str
  max_examples: int | None = None

  @property
  def path(self) -> Path:
    """The cache's own folder."""
    return local_path(self.folder, "CachedTask.folder") / self.name


class First:
  """The first examples of a dataset."""

  def __init__(self, dataset: Dataset, count: int):
    self.name = dataset.name
    self.lengths = dataset.lengths[:count]
    self._dataset = dataset

  def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    return self._dataset[i]


def task_fingerprint(task: CachedTask | TextTask) -> str:
  """A hash of all that a task's examples depend on.

  Raises:
    InputError: where the task can't be read.
  """
  if isinstance(task, CachedTask):
    content = TokenCache(task.path).fingerprint
  elif isinstance(task, JsonlTask):
    content = f"{_file_hash(task)} {task.inputs} {task.targets}"
  else:
    content = rows_fingerprint(task.rows())
  text = f"{content} {task.max_examples}"
  return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def task_label(task: CachedTask | TextTask) -> str:
  """The name of a task's dataset, as metrics have it; InputError for no cache."""
  if isinstance(task, CachedTask):
    return TokenCache(task.path).name
  return f"{task.name}.{task.split}"


def check_task(
    task: CachedTask | TextTask, vocabulary: Vocabulary, vocab_size: int | None = None,
    eos_id: int | None = None,
) -> None:
  """Raises InputError where `open_task` would, but for a disk that is full.

  What `task_fingerprint` finds isn't looked for again.
  """
  if isinstance(task, CachedTask):
    open_task(task, vocabulary, Path(), vocab_size=vocab_size, eos_id=eos_id)
    return
  if isinstance(task, JsonlTask) and task.targets is None:
    raise InputError(f"JsonlTask {task.name} targets", None, "a field of the file")
  for _ in _encoded(task, vocabulary, vocabulary.eos_id if eos_id is None else eos_id):
    pass


def open_task(
    task: CachedTask | TextTask, vocabulary: Vocabulary, folder: Path,
    fingerprint: str | None = None, *, vocab_size: int | None = None, eos_id: int | None = None,
) -> Dataset:
  """A task's examples as token ids; text is made into a token cache once.

  Args:
    task: a cache, or a task with rows of text.
    vocabulary: of the run.
    folder: where caches of text go.
    fingerprint: `task_fingerprint`, where it is known already.
    vocab_size: rows of the model's embedding table, beyond which no id may lie; the
      vocabulary's own size by default.
    eos_id: the model's, which ends each side; the vocabulary's own by default.

  Raises:
    InputError: where the ids are another vocabulary's or model's, or a row can't be read.
  """
  vocab_size = vocabulary.size if vocab_size is None else vocab_size
  eos_id = vocabulary.eos_id if eos_id is None else eos_id
  if isinstance(task, CachedTask):
    cache = TokenCache(task.path)
    if cache.vocabulary != vocabulary.fingerprint:
      raise InputError(
          f"token cache {task.path} vocabulary",
          f"{cache.vocabulary} of {cache.vocab_size} ids",
          f"{vocabulary.fingerprint} of {vocabulary.size} ids, the run's",
      )
    if cache.vocab_size > vocab_size:
      raise InputError(
          f"token cache {task.path} vocab_size", cache.vocab_size,
          f"at most {vocab_size}, the model's",
      )
    if cache.eos_id != eos_id:
      raise InputError(
          f"token cache {task.path} eos_id", cache.eos_id,
          f"{eos_id}, the model's; prepare's --vocabulary takes a model folder",
      )
    return cache if task.max_examples is None else First(cache, task.max_examples)
  path = folder / f"{task_label(task)}_{fingerprint or task_fingerprint(task)}"
  if path.is_dir():
    return TokenCache(path)
  return write_cache(
      path, _encoded(task, vocabulary, eos_id), task=task.name, split=task.split,
      vocabulary=vocabulary, eos_id=eos_id, vocab_size=vocab_size,
  )


def _encoded(
    task: TextTask, vocabulary: Vocabulary, eos_id: int
) -> Iterator[tuple[list[int], list[int]]]:
  """Inputs and targets of each row."""
  for row in task.rows():
    inputs, targets = ([*vocabulary.encode(row[name]), eos_id] for name in ("inputs", "targets"))
    yield inputs, targets


def _file_hash(task: JsonlTask) -> str:
  try:
    with open(task.file, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise InputError(
        f"JsonlTask {task.name} path", task.path, f"a file that can be read ({error.strerror})"
    ) from error
