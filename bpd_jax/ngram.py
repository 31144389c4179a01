"""Trains n-gram models on token ids, prunes them, and shows what they say.

  python -m bpd_jax.ngram train runs/caches/docstring_summary.train --to lm.arpa
  python -m bpd_jax.ngram prune lm.arpa --to small.arpa --to-count 100000
  python -m bpd_jax.ngram perplexity small.arpa runs/caches/docstring_summary.validation
  python -m bpd_jax.ngram query small.arpa --vocabulary models/docstrings "Returns the"
  python -m bpd_jax.ngram speed lm.arpa runs/caches/docstring_summary.validation
  python -m bpd_jax.ngram text runs/caches/docstring_summary.train > corpus.txt

Tokens come from token caches (`bpd_jax.data.token_cache`), or from JSONL files whose
objects have a list of ids in the field `tokens`. See docs/ngram.md.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
import sys
import time
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from bpd_jax.data.jsonl import json_lines, read_text
from bpd_jax.data.token_cache import TokenCache
from bpd_jax.errors import check_count, InputError
from bpd_jax.folders import local_path
from bpd_jax.launch import Parser, run
from bpd_jax.ngram_lm.arpa import (
  check_vocabulary,
  info_path,
  read_arpa,
  read_info,
  Say,
  write_arpa,
)
from bpd_jax.ngram_lm.arrays import device_arrays, log_probs, NgramArrays
from bpd_jax.ngram_lm.backoff import BackOff, join_sequences
from bpd_jax.ngram_lm.counts import check_cutoffs, check_order, count_grams
from bpd_jax.ngram_lm.pruning import check_pruning, prune_to_count, prune_to_threshold
from bpd_jax.ngram_lm.smoothing import CUTOFFS, katz, kneser_ney
from bpd_jax.prepare import find_vocabulary
from bpd_jax.terminal import description_column, plain_console

SMOOTHINGS = {"katz": katz, "kneser_ney": kneser_ney}
SIDES = {"targets": (1,), "inputs": (0,), "both": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Source:
  """Sequences of token ids.

  Attributes:
    path: what they are read from.
    name: of a cache, or the path.
    sequences: token ids, without EOS at the end.
    vocab_size: ids that the source says may occur; None where it doesn't say.
    vocabulary: fingerprint of the vocabulary whose ids these are, or None.
    fingerprint: of a cache, or None.
  """

  path: str
  name: str
  sequences: list[np.ndarray]
  vocab_size: int | None = None
  vocabulary: str | None = None
  fingerprint: str | None = None

  def join(self, vocab_size: int, start_id: int, eos_id: int) -> np.ndarray:
    """All sequences, closed; see `join_sequences`."""
    try:
      return join_sequences(self.sequences, vocab_size, start_id, eos_id)
    except InputError as error:
      raise InputError(f"{self.path} {error.field}", error.value, error.allowed) from error

  def describe(self, side: str) -> dict[str, Any]:
    """For the JSON file beside a model."""
    return {
        "name": self.name,
        "side": side if self.fingerprint else "tokens",
        "fingerprint": self.fingerprint,
        "sequences": len(self.sequences),
    }


def train(
    sources: Sequence[str],
    to: str,
    *,
    side: str = "targets",
    order: int = 4,
    smoothing: str = "kneser_ney",
    cutoffs: Sequence[int] | None = None,
    prune_to: int | None = None,
    threshold: float | None = None,
    vocab_size: int | None = None,
    start_id: int = 0,
    eos_id: int = 1,
    test: Sequence[str] = (),
) -> None:
  """Counts, smooths, prunes, and writes a model.

  Args:
    sources: token caches and JSONL files.
    to: a path where nothing is yet; gzipped where it ends in ".gz".
    side: of a cache's examples: targets, inputs, both.
    order: tokens of the longest n-grams.
    smoothing: katz or kneser_ney.
    cutoffs: the least count of an n-gram, for each order; `CUTOFFS` by default.
    prune_to: n-grams to keep.
    threshold: see `prune_to_threshold`.
    vocab_size: ids that a token can have; the sources' by default.
    start_id: the decoder's first input, context for the first token.
    eos_id: the token at the end of sequences.
    test: sources whose perplexity is printed.

  Raises:
    InputError: before anything is counted where an argument is wrong.
  """
  check_order(order)
  cutoffs = CUTOFFS[:order] if cutoffs is None else tuple(cutoffs)
  check_cutoffs(cutoffs, order)
  check_new(to)
  started = time.monotonic()
  with progress() as say:
    say("reading tokens")
    learned = [read_source(path, side, eos_id) for path in sources]
    tested = [read_source(path, side, eos_id) for path in test]
    vocabulary, vocab_size = common_vocabulary([*learned, *tested], vocab_size)
    check_pruning(vocab_size, prune_to, threshold)
    join = lambda source: source.join(vocab_size, start_id, eos_id)
    tokens = np.concatenate([join(source) for source in learned])
    tests = {source.path: join(source) for source in tested}
    counts = count_grams(tokens, order, vocab_size, start_id=start_id, eos_id=eos_id, say=say)
    model = prune_model(SMOOTHINGS[smoothing](counts, cutoffs, say), prune_to, threshold, say)
    write_arpa(to, model, {
        "smoothing": smoothing,
        "cutoffs": list(cutoffs),
        "pruned": describe_pruning(prune_to, threshold),
        "vocabulary": vocabulary,
        "trained_on": [source.describe(side) for source in learned],
    }, say)
  print_model(to, model, f"{len(tokens) - np.sum(tokens == start_id):,} tokens", started)
  print_perplexities(model, tests)


def prune(
    path: str, to: str, prune_to: int | None = None, threshold: float | None = None,
    vocab_size: int | None = None,
) -> None:
  """Writes a pruned model.

  Args:
    path: an ARPA file.
    to: a path where nothing is yet.
    prune_to: n-grams to keep; this or a threshold.
    threshold: see `prune_to_threshold`.
    vocab_size: needed where no JSON file says it.
  """
  if prune_to is None and threshold is None:
    raise InputError("prune", None, "--prune-to N or --threshold PART")
  check_new(to)
  info = read_info(path) or {}
  check_pruning(vocab_size or info.get("vocab_size", 1), prune_to, threshold)
  started = time.monotonic()
  with progress() as say:
    model = prune_model(read_arpa(path, vocab_size, say=say), prune_to, threshold, say)
    earlier = info.get("pruned") or []
    pruned = [*earlier, *describe_pruning(prune_to, threshold)]
    write_arpa(to, model, info | {"pruned": pruned}, say)
  print_model(to, model, path, started)


def perplexity(
    path: str, sources: Sequence[str], *, side: str = "targets", vocab_size: int | None = None
) -> None:
  """Prints the perplexity of sources, and which orders answered.

  Args:
    path: an ARPA file.
    sources: token caches and JSONL files.
    side: of a cache's examples.
    vocab_size: needed where no JSON file says it.
  """
  eos_id = (read_info(path) or {}).get("eos_id", 1)
  with progress() as say:
    say("reading tokens")
    read = [read_source(source, side, eos_id) for source in sources]
    for source in read:
      check_vocabulary(path, source.vocabulary)
    model = read_arpa(path, vocab_size, say=say)
    tests = {
        source.path: source.join(model.vocab_size, model.start_id, model.eos_id)
        for source in read
    }
  print_perplexities(model, tests)


def query(
    path: str, words: Sequence[str], *, vocabulary: str | None = None,
    vocab_size: int | None = None,
) -> None:
  """Prints the log-probability of each token of a sequence, and the n-gram that gave it.

  Args:
    path: an ARPA file.
    words: token ids, or texts where there is a vocabulary.
    vocabulary: a vocabulary file, or a folder with one; None for ids.
    vocab_size: needed where no JSON file says it.
  """
  if vocabulary is None:
    wrong = [word for word in words if not (word.isascii() and word.isdecimal())]
    if wrong:
      raise InputError("token", wrong[0], "an id; for text add --vocabulary FOLDER")
    pieces, tokens = None, [int(word) for word in words]
  else:
    pieces = find_vocabulary(vocabulary, has_sentinels=False)
    check_vocabulary(path, pieces.fingerprint)
    tokens = pieces.encode(" ".join(words))
  with progress() as say:
    model = read_arpa(path, vocab_size, say=say)
  closed = join_sequences([tokens], model.vocab_size, model.start_id, model.eos_id)
  scores, used = model.score(closed)
  table = Table(box=box.SIMPLE_HEAD)
  columns = ("token", "piece", "log-prob", "prob", "order")
  for column in columns if pieces else columns[:1] + columns[2:]:
    table.add_column(column, justify="left" if column == "piece" else "right")
  for token, score, order in zip(closed[1:], scores[1:], used[1:]):
    piece = [pieces.piece(int(token))] if pieces else []
    table.add_row(str(token), *piece, f"{score:.4f}", f"{np.exp(score):.3g}", str(order))
  console = plain_console()
  console.print(table)
  print(f"sum {scores[1:].sum():.4f}, perplexity {model.perplexity(closed):,.2f}")


def speed(
    path: str, sources: Sequence[str], *, side: str = "targets", vocab_size: int | None = None,
    batches: Sequence[int] = (1, 8, 32), num_histories: int = 16, k: int = 16, depth: int = 8,
    repeats: int = 200,
) -> None:
  """Prints how long the device form takes, for every order up to the model's.

  As in a beam: `depth` steps one after the other, each with `k` candidates after
  `num_histories` histories a row, whose newest tokens differ. Histories are windows of
  the sources, candidates and newest tokens are drawn from their tokens.

  Args:
    path: an ARPA file.
    sources: token caches and JSONL files.
    side: of a cache's examples.
    vocab_size: needed where no JSON file says it.
    batches: rows.
    num_histories: a row.
    k: candidates a row and step.
    depth: steps.
    repeats: of which the fastest and the median are printed.
  """
  for name, value in (("batch", min(batches)), ("repeats", repeats)):
    check_count(name, value)
  with progress() as say:
    say("reading tokens")
    model = read_arpa(path, vocab_size, say=say)
    read = [read_source(source, side, model.eos_id) for source in sources]
  tokens = np.concatenate([
      source.join(model.vocab_size, model.start_id, model.eos_id) for source in read
  ])
  table = Table(box=box.SIMPLE_HEAD)
  for column in ("order", "n-grams", "MB", "bytes an n-gram", "built in s", "batch", "scores",
                 "fastest, ms", "median, ms", "ns a score"):
    table.add_column(column, justify="right")
  for order in range(1, model.order + 1):
    shorter = model.only([
        np.full(num, n < order) for n, num in enumerate(model.num_grams)
    ])
    began = time.perf_counter()
    arrays = device_arrays(shorter)
    seconds = time.perf_counter() - began
    num_grams, num_bytes = sum(shorter.num_grams), arrays.num_bytes
    for batch in batches:
      times = _time_scores(arrays, tokens, (depth, batch, num_histories, k), repeats)
      num_scores = depth * batch * num_histories * k
      first = (str(order), f"{num_grams:,}", f"{num_bytes / 1e6:.1f}",
               f"{num_bytes / num_grams:.1f}", f"{seconds:.1f}")
      table.add_row(
          *(first if batch == batches[0] else [""] * len(first)), str(batch), f"{num_scores:,}",
          f"{times.min() * 1e3:.3f}", f"{np.median(times) * 1e3:.3f}",
          f"{times.min() / num_scores * 1e9:.1f}",
      )
  console = plain_console()
  console.width = max(console.width, 120)
  console.print(table)


def _time_scores(
    arrays: NgramArrays, tokens: np.ndarray, shape: tuple[int, int, int, int], repeats: int
) -> np.ndarray:
  """[repeats] seconds for all steps of a beam of this depth, batch, histories, k."""
  random, context = np.random.default_rng(0), arrays.order - 1
  depth, batch, num_histories, k = shape
  places = random.integers(0, len(tokens), [depth, batch, 1, 1]) + np.arange(context)
  history = np.repeat(tokens[places % len(tokens)], num_histories, axis=2)
  if context:
    history[..., -1] = random.choice(tokens, history.shape[:-1])
  candidates = random.choice(tokens, [depth, batch, k])

  @jax.jit
  def run_beam(arrays, history, candidates):
    def step(scores, x):
      # Each step waits for the one before it, as a beam's do.
      history = x[0] + (scores[..., :1] > 0).astype(jnp.int32)
      return log_probs(arrays, history, x[1]), None

    return jax.lax.scan(step, jnp.zeros(shape[1:]), (history, candidates))[0]

  inputs = arrays, jnp.asarray(history), jnp.asarray(candidates)
  jax.block_until_ready(run_beam(*inputs))
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(run_beam(*inputs))
    times.append(time.perf_counter() - began)
  return np.asarray(times)


def write_text(sources: Sequence[str], file: TextIO, *, side: str = "targets") -> None:
  """Writes a line of ids a sequence, for tools that count text; they close it themselves.

  Args:
    sources: token caches and JSONL files.
    file: what to write to.
    side: of a cache's examples.
  """
  read = [read_source(path, side) for path in sources]
  try:
    for source in read:
      for sequence in source.sequences:
        file.write(" ".join(map(str, sequence.tolist())) + "\n")
    file.flush()
  except BrokenPipeError:
    # Whoever read has enough. What is left must not be written when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def read_source(path: str, side: str, eos_id: int | None = None) -> Source:
  """Reads a token cache, or the `tokens` of a JSONL file; InputError where it is neither.

  Args:
    path: of either.
    side: of a cache's examples.
    eos_id: which ends sequences; by default a cache's own, and 1 of a file's.
  """
  place = local_path(path, "source")
  if place.is_dir():
    cache = TokenCache(place)
    eos_id = cache.eos_id if eos_id is None else eos_id
    if cache.eos_id != eos_id:
      raise InputError("eos_id", eos_id, f"{cache.eos_id}, that of token cache {path}")
    sequences = [cache[i][part] for i in range(len(cache)) for part in SIDES[side]]
    identity = cache.vocab_size, cache.vocabulary, cache.fingerprint
    source = Source(path, cache.name, sequences, *identity)
  elif place.exists():
    eos_id = 1 if eos_id is None else eos_id
    source = Source(path, path, list(_json_tokens(path)))
  else:
    raise InputError("source", path, "a token cache, or a JSONL file in UTF-8")
  without_eos = [x[:-1] if len(x) and x[-1] == eos_id else x for x in source.sequences]
  return dataclasses.replace(source, sequences=without_eos)


def _json_tokens(path: str) -> Iterator[np.ndarray]:
  """Token ids of every line."""
  for number, record in json_lines(read_text(path, "source"), path):
    tokens = record.get("tokens") if isinstance(record, dict) else None
    if not isinstance(tokens, list) or not all(type(x) is int for x in tokens):
      raise InputError(f"{path}:{number} tokens", str(tokens)[:40], "a list of token ids")
    yield np.asarray(tokens, np.int64)


def common_vocabulary(
    sources: Sequence[Source], vocab_size: int | None
) -> tuple[str | None, int]:
  """Fingerprint and size of the vocabulary of all sources.

  Args:
    sources: all.
    vocab_size: what was asked for.

  Raises:
    InputError: where sources have different vocabularies, or more ids than asked for,
      or none says how many there are.
  """
  if vocab_size is not None:
    check_count("vocab_size", vocab_size, 3)
  fingerprint, first = None, None
  for source in sources:
    if source.vocabulary is None:
      continue
    if fingerprint not in (None, source.vocabulary):
      raise InputError(
          f"{source.path} vocabulary", source.vocabulary, f"{fingerprint}, as {first} has it"
      )
    fingerprint, first = source.vocabulary, source.path
    if vocab_size is not None and vocab_size < source.vocab_size:
      raise InputError("vocab_size", vocab_size, f"at least {source.vocab_size}, as {first} has")
  sizes = [source.vocab_size for source in sources if source.vocab_size]
  if vocab_size is None and not sizes:
    raise InputError("vocab_size", None, "a number, --vocab-size N: no source says it")
  return fingerprint, vocab_size or max(sizes)


def check_new(to: str) -> None:
  """InputError where a model can't be written to a path, or would replace something."""
  for path in (local_path(to, "to"), info_path(to)):
    if os.path.lexists(path):
      raise InputError("to", str(path), "a path where nothing is yet")
  folder = local_path(to).absolute().parent
  if not folder.is_dir() or not os.access(folder, os.W_OK):
    raise InputError("to", to, f"a path in a folder that can be written, and {folder} can't")


def prune_model(
    model: BackOff, prune_to: int | None, threshold: float | None, say: Say
) -> BackOff:
  """Prunes as asked, if at all."""
  if prune_to is not None:
    return prune_to_count(model, prune_to, say)
  return model if threshold is None else prune_to_threshold(model, threshold, say)


def describe_pruning(prune_to: int | None, threshold: float | None) -> list[dict[str, Any]]:
  """For the JSON file."""
  asked = {"num_grams": prune_to, "threshold": threshold}
  asked = {name: value for name, value in asked.items() if value is not None}
  return [asked] if asked else []


@contextlib.contextmanager
def progress() -> Iterator[Say]:
  """A line on the terminal that says what is being done, and for how long already."""
  columns = SpinnerColumn(), description_column(), TimeElapsedColumn()
  console = plain_console(stderr=True)
  with Progress(
      *columns, console=console, transient=True, disable=not console.is_terminal
  ) as shown:
    task = shown.add_task("", total=None)
    yield lambda text: shown.update(task, description=text)


def print_model(to: str, model: BackOff, source: str, started: float) -> None:
  """Prints what was written, and from what."""
  with progress() as say:
    say("building the device form")
    num_bytes = device_arrays(model).num_bytes
  table = Table(box=box.SIMPLE_HEAD)
  table.add_column("order", justify="right")
  table.add_column("n-grams", justify="right")
  for n, num in enumerate(model.num_grams, start=1):
    table.add_row(str(n), f"{num:,}")
  total = sum(model.num_grams)
  table.add_row("all", f"{total:,}")
  plain_console().print(table)
  print(
      f"{to}: {local_path(to).stat().st_size / 1e6:,.1f} MB from {source}, "
      f"{time.monotonic() - started:,.0f} s; on the device {num_bytes / 1e6:,.1f} MB, "
      f"{num_bytes / total:.1f} bytes an n-gram"
  )


def print_perplexities(model: BackOff, tests: dict[str, np.ndarray]) -> None:
  """Prints a row a source: perplexity, and the share of tokens that each order answered."""
  if not tests:
    return
  table = Table(box=box.SIMPLE_HEAD)
  table.add_column("source")
  for column in ("tokens", "perplexity", *(f"by {n}-grams" for n in range(1, model.order + 1))):
    table.add_column(column, justify="right")
  for path, tokens in tests.items():
    _, used = model.score(tokens)
    used = used[tokens != model.start_id]
    shares = np.bincount(used, minlength=model.order + 1)[1:] / len(used)
    table.add_row(
        path, f"{len(used):,}", f"{model.perplexity(tokens):,.2f}",
        *(f"{share:.1%}" for share in shares),
    )
  console = plain_console()
  console.width = max(console.width, 120)
  console.print(table)


def main(argv: Sequence[str]) -> None:
  """Runs a command; see `--help`."""
  parser = Parser(
      prog="python -m bpd_jax.ngram", description=__doc__.splitlines()[0]
  )
  commands = parser.add_subparsers(dest="command", required=True)
  size = argparse.ArgumentParser(add_help=False)
  size.add_argument(
      "--vocab-size", type=int, metavar="N",
      help="ids that a token can have (default: as the token cache or the model's JSON says)",
  )
  side = argparse.ArgumentParser(add_help=False)
  side.add_argument(
      "--side", choices=SIDES, default="targets",
      help="which part of a cache's examples (default: targets)",
  )
  pruning = argparse.ArgumentParser(add_help=False)
  pruning.add_argument("--prune-to", type=int, metavar="N", help="n-grams to keep")
  pruning.add_argument(
      "--threshold", type=float, metavar="PART",
      help="leave out what raises perplexity by less than this part, such as 1e-8",
  )
  learn = commands.add_parser(
      "train", parents=[side, pruning, size], help="count, smooth and write a model"
  )
  learn.add_argument("sources", nargs="+", metavar="SOURCE", help="token cache, or JSONL file")
  learn.add_argument("--to", required=True, metavar="FILE", help="NAME.arpa or NAME.arpa.gz")
  learn.add_argument("--order", type=int, default=4, help="of the longest n-grams (default 4)")
  learn.add_argument("--smoothing", choices=SMOOTHINGS, default="kneser_ney",
                     help="default: kneser_ney")
  learn.add_argument(
      "--cutoffs", type=int, nargs="+", metavar="N",
      help=f"least count of an n-gram, for each order (default {' '.join(map(str, CUTOFFS))})",
  )
  learn.add_argument("--start-id", type=int, default=0, metavar="ID", help="default 0")
  learn.add_argument("--eos-id", type=int, default=1, metavar="ID", help="default 1")
  learn.add_argument(
      "--test", nargs="+", default=[], metavar="SOURCE", help="sources to print perplexities of"
  )
  cut = commands.add_parser("prune", parents=[pruning, size], help="write a smaller model")
  cut.add_argument("model", help="ARPA file")
  cut.add_argument("--to", required=True, metavar="FILE", help="NAME.arpa or NAME.arpa.gz")
  judge = commands.add_parser("perplexity", parents=[side, size], help="of sources, by a model")
  judge.add_argument("model", help="ARPA file")
  judge.add_argument("sources", nargs="+", metavar="SOURCE", help="token cache, or JSONL file")
  ask = commands.add_parser("query", parents=[size], help="show what each token of a text gets")
  ask.add_argument("model", help="ARPA file")
  ask.add_argument("words", nargs="+", metavar="TOKEN", help="ids, or text with --vocabulary")
  ask.add_argument("--vocabulary", metavar="FOLDER", help="a vocabulary's, to read text")
  clock = commands.add_parser("speed", parents=[side, size], help="time the device form")
  clock.add_argument("model", help="ARPA file")
  clock.add_argument("sources", nargs="+", metavar="SOURCE", help="token cache, or JSONL file")
  clock.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N",
                     help="default: 1 8 32")
  clock.add_argument("--repeats", type=int, default=200, metavar="N", help="default 200")
  text = commands.add_parser("text", parents=[side], help="write ids as text, for other tools")
  text.add_argument("sources", nargs="+", metavar="SOURCE", help="token cache, or JSONL file")
  args = vars(parser.parse_args(argv))
  # Building the device form needn't take an accelerator.
  jax.config.update("jax_platforms", "cpu")
  command = args.pop("command")
  if command == "train":
    train(**args)
  elif command == "text":
    write_text(args["sources"], sys.stdout, side=args["side"])
  else:
    chosen = {"prune": prune, "perplexity": perplexity, "query": query, "speed": speed}
    chosen[command](args.pop("model"), **args)


if __name__ == "__main__":
  run(main)
