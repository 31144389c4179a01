"""The corpus `docstrings`: cleaned docstrings with their code, split by distribution.

`build` reads the files that the manifest names and gives the same records, in
the same order, on every machine. The command line writes the manifest anew,
checks it, and shows what is in the corpus:

  python -m bpd_jax.data.docstrings check
  python -m bpd_jax.data.docstrings examples code_format --split train
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import gc
import hashlib
import io
import itertools
import json
from pathlib import Path
import sys
from typing import Any

import numpy as np
from rich.table import Table

from bpd_jax.data import cleaning, rows
from bpd_jax.data.extraction import extract, Record
from bpd_jax.data.grammar import grammar
from bpd_jax.data.manifest import (
  Entry,
  Environment,
  Manifest,
  MANIFEST_FILE,
  missing,
  read_files,
  read_manifest,
  write_manifest,
)
from bpd_jax.data.sources import LICENCES, Source, SOURCES, SPLITS
from bpd_jax.errors import InputError
from bpd_jax.launch import Parser, run
from bpd_jax.terminal import plain_console, track
from bpd_jax.vocabulary import NUM_SENTINELS, SentencePieceVocabulary

# With T5's sentinels after the pieces, a model's vocabulary is 4,096.
VOCAB_SIZE = 4096 - NUM_SENTINELS


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What `clean` gives.

  Attributes:
    records: of each split, by distribution, path and line.
    steps: records left after each step of the cleaning, by split.
    leaked: share of validation and test records that had more than 20 % of
      their 13-grams in training, before they were dropped and after.
  """

  records: Mapping[str, Sequence[Record]]
  steps: Mapping[str, Mapping[str, int]]
  leaked: Mapping[str, tuple[float, float]]


def build(
    manifest: Manifest | None = None, environment: Environment | None = None
) -> Corpus:
  """Builds the corpus from the files that the manifest names.

  Args:
    manifest: the package's own by default.
    environment: where to look; the running one by default.

  Raises:
    InputError: where a file is missing or differs, or where the records aren't
      those that the manifest promises.
  """
  manifest = read_manifest() if manifest is None else manifest
  environment = Environment() if environment is None else environment
  corpus = clean(_extract_all(manifest.entries, environment))
  found = fingerprint(corpus.records)
  if found != manifest.fingerprint:
    raise InputError(
        "corpus fingerprint", found, f"{manifest.fingerprint}, from the manifest; "
        "the files are the same, so the program that reads them has changed"
    )
  return corpus


def make_manifest(
    sources: Sequence[Source] = SOURCES, environment: Environment | None = None
) -> Manifest:
  """Makes a manifest of what is installed.

  Args:
    sources: all must be installed.
    environment: where to look; the running one by default.

  Raises:
    InputError: where a distribution isn't installed.
  """
  environment = Environment() if environment is None else environment
  entries, extracted = [], {split: [] for split in SPLITS}
  for source in _track(sources):
    if source.licence not in LICENCES:
      raise InputError(
          f"{source.distribution} licence", source.licence, f"one of {sorted(LICENCES)}"
      )
    version = environment.version(source.distribution)
    if version is None:
      raise InputError(
          f"corpus distribution {source.distribution}", "not installed", "any version"
      )
    files = {}
    for path, file in environment.files(source.distribution).items():
      content = file.read_bytes()
      if records := extract(source.distribution, path, content):
        files[path] = hashlib.sha256(content).hexdigest()
        extracted[source.split] += records
    entries.append(Entry(**dataclasses.asdict(source), version=version, files=files))
  records = clean(extracted).records
  counts = {split: len(records[split]) for split in SPLITS}
  return Manifest(tuple(entries), fingerprint(records), counts)


def clean(extracted: Mapping[str, Sequence[Record]]) -> Corpus:
  """Drops what would make a model's figures look better than they are.

  Duplicates and common first lines are dropped over all splits together; of
  equal docstrings training keeps its own. Packages are capped in training, and
  validation and test lose what training has shown.

  Args:
    extracted: records of each split, in their order.
  """
  steps = {}

  def note(step: str, records: Iterable[Record]) -> list[Record]:
    records = list(records)
    counts = Counter(split_of[record.key] for record in records)
    steps[step] = {split: counts[split] for split in SPLITS}
    return records

  split_of = {record.key: split for split in SPLITS for record in extracted[split]}
  records = note("extracted", (record for split in SPLITS for record in extracted[split]))
  records = note("without duplicates", cleaning.drop_duplicates(records))
  records = note("without common first lines", cleaning.drop_common_first_lines(records))
  train = [record for record in records if split_of[record.key] == "train"]
  others = [record for record in records if split_of[record.key] != "train"]
  train = cleaning.cap_distributions(train)
  note("capped", [*train, *others])
  seen = cleaning.NgramSet(train)
  kept, leaked = [], {}
  for split in SPLITS[1:]:
    rows = [record for record in others if split_of[record.key] == split]
    left = [record for record in rows if seen.seen_share(record) <= cleaning.MAX_SEEN]
    leaked[split] = (1 - len(left) / len(rows) if rows else 0.0, _leaked_share(left, seen))
    kept += left
  records = note("without leakage", [*train, *kept])
  by_split = {
      split: [record for record in records if split_of[record.key] == split] for split in SPLITS
  }
  return Corpus(by_split, steps, leaked)


def fingerprint(records: Mapping[str, Iterable[Record]]) -> str:
  """SHA-256 over every field of every record, in order."""
  digest = hashlib.sha256()
  for split in SPLITS:
    for record in records[split]:
      line = json.dumps([split, record.to_dict()], ensure_ascii=False, sort_keys=True)
      digest.update(line.encode("utf-8") + b"\n")
  return digest.hexdigest()


def _leaked_share(records: Sequence[Record], seen: cleaning.NgramSet) -> float:
  shares = [seen.seen_share(record) for record in records]
  return sum(share > cleaning.MAX_SEEN for share in shares) / max(1, len(shares))


def _extract_all(
    entries: Sequence[Entry], environment: Environment
) -> dict[str, list[Record]]:
  extracted = {split: [] for split in SPLITS}
  for entry in _track(entries):
    for path, content in read_files(entry, environment):
      extracted[entry.split] += extract(entry.distribution, path, content)
  return extracted


def _track(distributions: Sequence[Any]) -> Iterator[Any]:
  """Shows progress on standard error.

  Python's search for cycles is off meanwhile: syntax trees have none, and going
  through the growing list of records again and again takes half of the time.
  """
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield from track(distributions, "reading sources", plain_console(stderr=True))
  finally:
    if was_enabled:
      gc.enable()


def train_vocabulary(
    records: Sequence[Record], vocab_size: int = VOCAB_SIZE, num_records: int = 20_000
) -> bytes:
  """Trains a SentencePiece model that keeps every character of a text.

  Byte pairs: they gave 2.9 characters a token of unseen text where a unigram
  model gave 2.6, and train in seconds. Line breaks and runs of spaces are pieces
  of their own, unknown characters become bytes, and nothing is normalised.

  Args:
    records: of the training split.
    vocab_size: pieces, bytes and special ids, without T5's 100 sentinels.
    num_records: how many to read, chosen by a hash.

  Returns:
    The content of a model file.
  """
  import sentencepiece

  chosen = sorted(records, key=lambda record: cleaning.stable_hash(record.key))[:num_records]
  texts = itertools.chain.from_iterable(
      (record.docstring, f"{record.signature}\n{record.body}") for record in chosen
  )
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=texts,
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      max_sentence_length=20_000,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      split_by_unicode_script=False,
      split_by_number=False,
      byte_fallback=True,
      user_defined_symbols=["\n", "\n\n", *("\u2581" * width for width in range(2, 17))],
      minloglevel=2,
  )
  return model.getvalue()


def write_shipped(corpus: Corpus, folder: Path) -> None:
  """Writes the rows of all tasks that fit the shipped vocabulary into a folder.

  The vocabulary itself stays: models and caches rest on its ids.
  """
  vocabulary = SentencePieceVocabulary(rows.VOCABULARY_FILE)
  for task in rows.TASKS:
    train = () if task == "grammar" else rows.task_rows(task, corpus.records["train"])
    targets = {row["targets"] for row in train}
    for split in rows.NUM_ROWS:
      chosen = rows.choose_rows(task, split, corpus.records[split], targets, vocabulary)
      rows.write_rows(folder, task, split, chosen)


def _print_statistics(corpus: Corpus) -> None:
  console = plain_console(width=None if sys.stdout.isatty() else 120)
  table = Table("step", *SPLITS, title="records")
  for step, counts in corpus.steps.items():
    table.add_row(step, *(f"{counts[split]:,}" for split in SPLITS))
  console.print(table)
  for split, (before, after) in corpus.leaked.items():
    console.print(
        f"{split}: {before:.2%} of the records had over {cleaning.MAX_SEEN:.0%} of their "
        f"{cleaning.NGRAM}-grams in training; of those that are left, {after:.2%}"
    )
  table = Table("split", "distribution", "records", "share", "docstring characters")
  for split in SPLITS:
    counts, sizes = Counter(), Counter()
    for record in corpus.records[split]:
      counts[record.distribution] += 1
      sizes[record.distribution] += len(record.docstring)
    for name, count in counts.most_common(12):
      share = count / len(corpus.records[split])
      table.add_row(split, name, f"{count:,}", f"{share:.1%}", f"{sizes[name]:,}")
    table.add_row(split, "all", f"{counts.total():,}", "", f"{sizes.total():,}", end_section=True)
  console.print(table)


def _print_tasks(corpus: Corpus) -> None:
  """Counts and lengths of each task's rows; lengths of about 2,000, evenly taken."""
  vocabulary = SentencePieceVocabulary(rows.VOCABULARY_FILE)
  table = Table(
      "task", "split", "rows", "input tokens", "target tokens", "seen",
      title="rows; tokens at 50 %, 90 %, 99 % and most, EOS included; targets seen in training",
  )
  for task in rows.TASKS:
    train_targets = set()
    for split in SPLITS:
      if task == "grammar":
        found = [dataclasses.asdict(example) for example in grammar(split, 2000)]
      else:
        found = rows.task_rows(task, corpus.records[split])
      targets = {row["targets"] for row in found}
      train_targets = targets if split == "train" else train_targets
      some = found[:: max(1, len(found) // 2000)]
      lengths = [
          " ".join(f"{value:.0f}" for value in np.percentile(
              [len(vocabulary.encode(row[name])) + 1 for row in some], [50, 90, 99, 100]
          ))
          for name in ("inputs", "targets")
      ]
      seen = "" if split == "train" else f"{len(targets & train_targets) / len(targets):.1%}"
      table.add_row(task, split, f"{len(found):,}", *lengths, seen)
  # As wide as it needs where the output isn't a terminal.
  plain_console(width=None if sys.stdout.isatty() else 120).print(table)


def _print_examples(task: str, split: str, num_examples: int) -> None:
  """From the shipped rows where there are some, else from the corpus."""
  if split != "train":
    found = rows.load_rows(task, split)
  elif task == "grammar":
    found = [dataclasses.asdict(example) for example in grammar(split, num_examples)]
  else:
    found = rows.task_rows(task, build().records[split])
  for row in found[:: max(1, len(found) // num_examples)][:num_examples]:
    plain_console().rule(row.get("source", ""))
    print(f"{row['inputs']}\n--->\n{row['targets']}")


def main(argv: Sequence[str]) -> None:
  """Runs a command; see `--help`."""
  parser = Parser(
      prog="python -m bpd_jax.data.docstrings", description=__doc__.splitlines()[0]
  )
  commands = parser.add_subparsers(dest="command", required=True)
  commands.add_parser("check", help="compare files and records with the manifest")
  commands.add_parser(
      "requirements", help="print what the manifest names and isn't installed, as pip reads it"
  )
  commands.add_parser("statistics", help="count what each step leaves, and each task's rows")
  ship = commands.add_parser("ship", help="choose the evaluation rows")
  ship.add_argument("--to", default=rows.FILES, type=Path, metavar="DIR")
  examples = commands.add_parser("examples", help="print examples of a task")
  examples.add_argument("task", choices=rows.TASKS)
  examples.add_argument("--split", choices=SPLITS, default="test")
  examples.add_argument("-n", type=int, default=5, metavar="N", help="how many (default 5)")
  write = commands.add_parser("manifest", help="write the manifest of what is installed")
  write.add_argument("--to", default=str(MANIFEST_FILE), metavar="FILE")
  args = parser.parse_args(argv)
  if args.command == "manifest":
    manifest = make_manifest()
    write_manifest(args.to, manifest)
    files = sum(len(entry.files) for entry in manifest.entries)
    print(f"{args.to}: {len(manifest.entries)} distributions, {files:,} files, "
          f"fingerprint {manifest.fingerprint}")
  elif args.command == "requirements":
    for entry in missing(read_manifest(), Environment()):
      print(f"{entry.distribution}=={entry.version}")
  elif args.command == "check":
    corpus = build()
    counts = ", ".join(f"{len(corpus.records[split]):,} {split}" for split in SPLITS)
    print(f"the corpus is as the manifest has it: {counts}")
  elif args.command == "ship":
    args.to.mkdir(parents=True, exist_ok=True)
    write_shipped(build(), args.to)
  elif args.command == "examples":
    _print_examples(args.task, args.split, args.n)
  else:
    corpus = build()
    _print_statistics(corpus)
    _print_tasks(corpus)


if __name__ == "__main__":
  run(main)
