"""Writes what SeqIO's tasks give into token caches, once; training reads those.

  python -m bpd_jax.prepare list
  python -m bpd_jax.prepare examples docstring_qa -n 3
  python -m bpd_jax.prepare cache docstring_qa docstring_lm --to runs/caches
  python -m bpd_jax.prepare rows squad --split validation --to squad.jsonl

A cache is a folder TASK.SPLIT of the given one, see `bpd_jax.data.token_cache`.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import io
import itertools
import json
import os
from pathlib import Path
import sys
import time
from typing import Any, TYPE_CHECKING

import jax
from rich import box
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bpd_jax.checkpoints import CONFIG_FILE, load_config
from bpd_jax.data.rows import MAX_INPUT_TOKENS, MAX_TARGET_TOKENS, VOCABULARY_FILE
from bpd_jax.errors import check_count, InputError
from bpd_jax.folders import local_path, new_file
from bpd_jax.launch import Parser, run
from bpd_jax.terminal import description_column, plain_console
from bpd_jax.vocabulary import (
  ByteVocabulary,
  open_vocabulary,
  read_vocabulary,
  Vocabulary,
  vocabulary_path,
)

if TYPE_CHECKING:
  from bpd_jax.data.seqio_cache import Request
  from bpd_jax.data.seqio_tasks import TaskInfo

# A narrower console would cut words off.
TABLE_WIDTH = 120


def cache(
    tasks: Sequence[str],
    to: str,
    splits: Sequence[str] = ("train",),
    *,
    vocabulary_file: str = str(VOCABULARY_FILE),
    data_dir: str | None = None,
    max_input_length: int = MAX_INPUT_TOKENS,
    max_target_length: int = MAX_TARGET_TOKENS,
    copies: int = 1,
    seed: int = 0,
    max_examples: int | None = None,
    **corpus: Any,
) -> None:
  """Writes a cache for each task and split.

  A folder that is there stays as it is if it is whole and was asked for alike.

  Args:
    tasks: registered names.
    to: the folder of the caches.
    splits: of each task.
    vocabulary_file: see `find_vocabulary`.
    data_dir: TFDS's folder; its own default if None.
    max_input_length: longer inputs are cut.
    max_target_length: examples with longer targets are left out.
    copies: passes over the data, for tasks that add noise.
    seed: of the noise, and of the choice of examples.
    max_examples: how many of each split, at random; all if None.
    **corpus: manifest and environment, see `seqio_tasks.register`.

  Raises:
    InputError: before anything is written where an argument is wrong, data isn't
      there, or a folder holds something else.
  """
  check_count("max_input_length", max_input_length)
  check_count("max_target_length", max_target_length)
  check_count("copies", copies)
  if max_examples is not None:
    check_count("max_examples", max_examples)
  vocabulary = find_vocabulary(vocabulary_file)
  import_quietly()
  from bpd_jax.data import seqio_cache, seqio_tasks

  infos = seqio_tasks.register(vocabulary, data_dir=data_dir, **corpus)
  todo = {}
  for task in tasks:
    info = find_task(task, infos)
    if copies > 1 and not info.is_noised:
      noised = [name for name, info in infos.items() if info.is_noised]
      raise InputError("copies", copies, f"1 for {task}, as they would be equal; more: {noised}")
    for split in splits:
      check_split(task, split)
      request = seqio_cache.Request(
          task, split, info.data_version(), vocabulary.fingerprint, max_input_length,
          max_target_length, copies, seed, max_examples,
      )
      folder = local_path(to, "to") / f"{task}.{split}"
      if os.path.lexists(folder):
        seqio_cache.check_same(folder, request, vocabulary)
        print(f"{folder}: is there and whole")
      else:
        todo[folder] = request
  for name in dict.fromkeys(request.task for request in todo.values()):
    get_data(name, infos[name])
  for folder, request in todo.items():
    _write(folder, request, vocabulary)


def random_examples(
    task: str,
    split: str,
    num_examples: int | None,
    *,
    vocabulary_file: str = str(VOCABULARY_FILE),
    data_dir: str | None = None,
    lengths: tuple[int, int] = (MAX_INPUT_TOKENS, MAX_TARGET_TOKENS),
    seed: int = 0,
    **corpus: Any,
) -> Iterator[tuple[list[int], list[int], str, str]]:
  """Random examples of a task as a model sees them, from ids back to text.

  Args:
    task: a registered name.
    split: of the task.
    num_examples: how many; None for all.
    vocabulary_file: see `find_vocabulary`.
    data_dir: TFDS's folder; its own default if None.
    lengths: most tokens of inputs and targets, for objectives that cut texts.
    seed: of the choice.
    **corpus: manifest and environment, see `seqio_tasks.register`.

  Yields:
    Ids of inputs and targets, and both as text.

  Raises:
    InputError: where an argument is wrong or the data isn't there.
  """
  if num_examples is not None:
    check_count("n", num_examples)
  vocabulary = find_vocabulary(vocabulary_file)
  import_quietly()
  from bpd_jax.data import seqio_cache, seqio_tasks

  info = find_task(task, seqio_tasks.register(vocabulary, data_dir=data_dir, **corpus))
  check_split(task, split)
  get_data(task, info)
  examples = seqio_cache.task_examples(task, split, lengths, seed=seed, is_shuffled=True)
  for inputs, targets in itertools.islice(examples, num_examples):
    yield inputs, targets, vocabulary.decode(inputs), vocabulary.decode(targets)


def print_examples(task: str, split: str, num_examples: int, **options: Any) -> None:
  """Prints examples; see `random_examples`."""
  examples = random_examples(task, split, num_examples, **options)
  for inputs, targets, prompt, reference in examples:
    plain_console().rule(f"{task}.{split}: {len(inputs)} → {len(targets)} tokens")
    print(f"{prompt}\n--->\n{reference}")


def write_rows(
    task: str, split: str, to: str, num_examples: int | None = None, **options: Any
) -> None:
  """Writes examples as JSONL, what an evaluation of rows reads.

  Inputs that are too long are cut, as they are for training.

  Args:
    task: a registered name.
    split: of the task.
    to: a file that doesn't exist yet.
    num_examples: how many, drawn at random; all by default.
    **options: of `random_examples`.

  Raises:
    InputError: where an argument is wrong, the data isn't there, or the file is or
      can't be written.
  """
  if os.path.lexists(local_path(to, "to")):
    raise InputError("to", to, "a path where nothing is yet")
  count = 0
  try:
    with new_file(to) as partial, open(partial, "w", encoding="utf-8") as file:
      for _, _, prompt, reference in random_examples(task, split, num_examples, **options):
        row = {"inputs": prompt, "targets": reference}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        count += 1
  except OSError as error:
    raise InputError("to", to, f"a path that can be written ({error.strerror})") from error
  print(f"{to}: {count:,} rows of {task}.{split}")


def print_tasks(data_dir: str | None = None, **corpus: Any) -> None:
  """Prints a table of the tasks and one of the mixtures; see `cache` for the arguments."""
  import_quietly()
  from bpd_jax.data import seqio_tasks

  console = plain_console()
  console.width = max(console.width, TABLE_WIDTH)
  table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  for column in ("task", "splits", "what it is", "data"):
    table.add_column(column, no_wrap=column == "task")
  infos = seqio_tasks.register(ByteVocabulary(), data_dir=data_dir, **corpus)
  for name, info in infos.items():
    if info.is_here():
      state = "here"
    elif info.is_made:
      state = "made on first use"
    else:
      state = f"not here: {info.dataset}" + (", by hand" if info.is_by_hand else "")
    table.add_row(name, " ".join(_splits(name)), info.about, state)
  console.print(table)
  table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column("mixture", no_wrap=True)
  table.add_column("tasks and rates; without rates by the number of examples")
  for name, rates in seqio_tasks.MIXTURES.items():
    table.add_row(name, ", ".join(
        task if callable(rate) else f"{task} {rate:g}" for task, rate in rates.items()
    ))
  console.print(table)


def find_vocabulary(path: str, *, has_sentinels: bool = True) -> Vocabulary:
  """Reads a vocabulary file, or that of a model folder, whose EOS then is the model's.

  Args:
    path: of either.
    has_sentinels: whether the model must have rows for the sentinels behind the pieces.
  """
  folder = found = local_path(path, "vocabulary")
  if folder.is_dir():
    found = vocabulary_path(folder)
  if found is None or not found.is_file():
    raise InputError(
        "vocabulary", path, "a SentencePiece model, a tokenizer.json, or a folder with one"
    )
  if not (folder / CONFIG_FILE).is_file():
    return read_vocabulary(found)
  config = load_config(folder)
  vocabulary = open_vocabulary(found, config.vocab_size, has_sentinels=has_sentinels)
  vocabulary.eos_id = config.eos_id
  return vocabulary


@functools.cache
def import_quietly() -> None:
  """Imports TensorFlow without what it says then and later.

  Its C++ writes to file descriptor 2 before it can be told not to.
  """
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
  sys.stderr.flush()
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 2)
    from absl import logging
    import tensorflow_datasets

    import bpd_jax.data.seqio_tasks  # noqa: F401
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)
  logging.set_verbosity(logging.FATAL)
  tensorflow_datasets.disable_progress_bar()


def find_task(name: str, infos: Mapping[str, "TaskInfo"]) -> "TaskInfo":
  """What is known of a task; InputError for one that isn't registered."""
  from bpd_jax.data.seqio_tasks import MIXTURES

  if name in MIXTURES:
    raise InputError("task", name, f"a task; the mixture's are {list(MIXTURES[name])}")
  if name not in infos:
    raise InputError("task", name, f"one of {list(infos)}")
  return infos[name]


def check_split(task: str, split: str) -> None:
  """InputError for a split that a task hasn't got."""
  if split not in _splits(task):
    raise InputError(f"{task} split", split, f"one of {_splits(task)}")


def get_data(task: str, info: "TaskInfo") -> None:
  """Makes a task's data where it isn't there; InputError where it can't be made."""
  if info.is_here():
    return
  folder = str(info.builder().data_dir)
  if not info.is_made:
    how = f"tfds build {info.dataset} --data_dir=DIR"
    if info.is_by_hand:
      how += " says what to fetch by hand"
    raise InputError(f"{task} data", folder, f"a folder with TFDS's {info.dataset}; {how}")
  print(f"{folder}: is made, once", file=sys.stderr)
  with contextlib.redirect_stdout(io.StringIO()):
    info.make()


def _write(folder: Path, request: "Request", vocabulary: Vocabulary) -> None:
  """Writes one cache and says what is in it."""
  from bpd_jax.data.seqio_cache import write_task

  started = time.monotonic()
  columns = (SpinnerColumn(), description_column(),
             TextColumn("{task.completed:,.0f} examples"), TimeElapsedColumn())

  def track(examples):
    with Progress(*columns, console=plain_console(stderr=True), transient=True) as progress:
      yield from progress.track(examples, description=folder.name)

  written, too_long = write_task(folder, request, vocabulary, track)
  inputs, targets = written.lengths.sum(axis=0)
  size = sum(path.stat().st_size for path in folder.iterdir())
  print(
      f"{folder}: {len(written):,} examples, {inputs:,} + {targets:,} tokens, "
      f"{size / 1e6:,.1f} MB, {time.monotonic() - started:,.0f} s; "
      f"{too_long.cut:,} inputs cut to {request.max_input_length}, "
      f"{too_long.left_out:,} targets over {request.max_target_length} left out"
  )


def _splits(task: str) -> tuple[str, ...]:
  import seqio

  return tuple(seqio.TaskRegistry.get(task).splits)


def main(argv: Sequence[str]) -> None:
  """Runs a command; see `--help`."""
  parser = Parser(
      prog="python -m bpd_jax.prepare", description=__doc__.splitlines()[0]
  )
  commands = parser.add_subparsers(dest="command", required=True)
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument(
      "--data-dir", metavar="DIR",
      help="TFDS's folder (default $TFDS_DATA_DIR, or ~/tensorflow_datasets)",
  )
  reading = argparse.ArgumentParser(add_help=False)
  reading.add_argument(
      "--vocabulary", default=str(VOCABULARY_FILE), metavar="FILE",
      help="vocabulary file, or model folder (default: the corpus')",
  )
  for side, default in (("input", MAX_INPUT_TOKENS), ("target", MAX_TARGET_TOKENS)):
    reading.add_argument(
        f"--max-{side}-length", type=int, default=default, metavar="N",
        help=f"most tokens of {side}s, EOS included (default {default})",
    )
  reading.add_argument("--seed", type=int, default=0, help="of noise, choice and order (default 0)")
  commands.add_parser("list", parents=[common], help="show tasks and mixtures")
  examples = commands.add_parser("examples", parents=[common, reading], help="show a task's rows")
  examples.add_argument("task")
  examples.add_argument("-n", type=int, default=5, metavar="N", help="how many (default 5)")
  examples.add_argument("--split", default="validation", help="default: validation")
  rows = commands.add_parser(
      "rows", parents=[common, reading], help="write a task's rows as JSONL, to evaluate on"
  )
  rows.add_argument("task")
  rows.add_argument("--to", required=True, metavar="FILE", help="file to write")
  rows.add_argument("-n", type=int, metavar="N", help="how many, at random (default all)")
  rows.add_argument("--split", default="validation", help="default: validation")
  write = commands.add_parser("cache", parents=[common, reading], help="write token caches")
  write.add_argument("tasks", nargs="+", metavar="TASK")
  write.add_argument("--to", required=True, metavar="DIR", help="folder for TASK.SPLIT")
  write.add_argument("--split", nargs="+", default=["train"], help="default: train")
  write.add_argument(
      "--copies", type=int, default=1, metavar="N",
      help="passes over text with different noise (default 1)",
  )
  write.add_argument(
      "--max-examples", type=int, metavar="N",
      help="how many of each split, at random (default all)",
  )
  args = parser.parse_args(argv)
  # Making a folder asks JAX which process this is; that needn't take an accelerator.
  jax.config.update("jax_platforms", "cpu")
  if args.command == "list":
    print_tasks(args.data_dir)
    return
  reading = {"vocabulary_file": args.vocabulary, "data_dir": args.data_dir, "seed": args.seed}
  lengths = args.max_input_length, args.max_target_length
  if args.command == "examples":
    print_examples(args.task, args.split, args.n, lengths=lengths, **reading)
  elif args.command == "rows":
    write_rows(args.task, args.split, args.to, args.n, lengths=lengths, **reading)
  else:
    cache(
        args.tasks, args.to, args.split, max_input_length=lengths[0],
        max_target_length=lengths[1], copies=args.copies, max_examples=args.max_examples,
        **reading,
    )


if __name__ == "__main__":
  run(main)
