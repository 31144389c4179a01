"""ARPA files: read and written line by line, plain or gzipped.

Words are token ids in decimal, with `<s>` for the start, `</s>` for EOS and `<unk>`
for ids that aren't listed, so kenlm, SRILM and OpenGrm read and write the same files
where their corpus is ids. A file written here lists every id. NAME.json beside
NAME.arpa says what the model is and whose ids these are.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import gzip
import itertools
import math
from pathlib import Path
from typing import Any, NoReturn, TextIO
import zlib

import numpy as np

from bpd_jax.errors import InputError
from bpd_jax.folders import local_path, new_file, PathLike, read_object, write_object
from bpd_jax.ngram_lm.backoff import BackOff, gram_tokens, LOG_ZERO, sorted_grams, unigrams
from bpd_jax.ngram_lm.counts import MAX_ORDER

START, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
# Lines that are formatted at once, and taken apart at once: a list a line, few enough
# that the garbage collector isn't called among them, which takes three times as long.
CHUNK = 1 << 16
READ_CHUNK = 256

Say = Callable[[str], None]


def info_path(path: PathLike) -> Path:
  """NAME.json for NAME.arpa and NAME.arpa.gz."""
  path = local_path(path)
  name = path.name.removesuffix(".gz").removesuffix(".arpa")
  return path.with_name(f"{name}.json")


def write_arpa(
    path: PathLike, model: BackOff, about: Mapping[str, Any], say: Say = lambda text: None
) -> None:
  """Writes a model and, beside it, what it is; the file appears whole or not at all.

  Args:
    path: gzipped where it ends in ".gz".
    model: what to write.
    about: fields for the JSON file beside those of the model itself: order, n-grams,
      vocab_size, special ids. `vocabulary` is the fingerprint that `read_arpa` compares.
    say: is told what begins.

  Raises:
    InputError: where the file can't be written.
  """
  path = local_path(path)
  words = [str(i) for i in range(model.vocab_size)]
  words[model.start_id], words[model.eos_id] = START, EOS
  is_zipped = path.suffix == ".gz"
  try:
    with new_file(path) as partial:
      with (
          gzip.open(partial, "wt", compresslevel=5, encoding="utf-8") if is_zipped
          else open(partial, "w", encoding="utf-8")
      ) as file:
        file.write("\\data\\\n")
        for n, num in enumerate(model.num_grams, start=1):
          file.write(f"ngram {n}={num + (n == 1)}\n")
        for n in range(1, model.order + 1):
          say(f"writing {n}-grams")
          file.write(f"\n\\{n}-grams:\n")
          if n == 1:
            weight = "" if model.order == 1 else "\t0"
            file.write(f"{LOG_ZERO / math.log(10):.8g}\t{UNKNOWN}{weight}\n")
          for begin in range(0, model.num_grams[n - 1], CHUNK):
            file.writelines(_lines(model, n, slice(begin, begin + CHUNK), words))
        file.write("\n\\end\\\n")
      own = {
          "order": model.order,
          "num_grams": model.num_grams,
          "vocab_size": model.vocab_size,
          "start_id": model.start_id,
          "eos_id": model.eos_id,
      }
      write_object(info_path(path), {**own, **about, **own})
  except OSError as error:
    raise InputError(
        "file", str(path), f"a path that can be written ({error.strerror})"
    ) from error


def _lines(model: BackOff, n: int, part: slice, words: list[str]) -> Iterator[str]:
  """Lines of a part of the n-grams of order n."""
  tokens = gram_tokens(model.orders, n, part).tolist()
  texts = map(" ".join, zip(*(map(words.__getitem__, column) for column in tokens)))
  # Rounding may have brought a probability above 1, which kenlm refuses.
  log_probs = np.minimum(model.log_probs[n - 1][part] / math.log(10), 0) + 0.0
  if n == model.order:
    return map("%.8g\t%s\n".__mod__, zip(log_probs.tolist(), texts))
  back_offs = model.back_offs[n - 1][part] / math.log(10) + 0.0
  return map("%.8g\t%s\t%.8g\n".__mod__, zip(log_probs.tolist(), texts, back_offs.tolist()))


def read_info(path: PathLike) -> dict[str, Any] | None:
  """What the JSON file beside an ARPA file says, None where there is none."""
  beside = info_path(path)
  if not beside.is_file():
    return None
  info = read_object(beside)
  for field in ("vocab_size", "start_id", "eos_id"):
    if not isinstance(info.get(field), int):
      raise InputError(f"{beside} {field}", info.get(field), "a whole number")
  return info


def check_vocabulary(path: PathLike, vocabulary: str | None) -> None:
  """InputError where the JSON beside a file names another vocabulary's fingerprint."""
  info = read_info(path) or {}
  known = info.get("vocabulary")
  if vocabulary is not None and known is not None and known != vocabulary:
    raise InputError(f"{path} vocabulary", known, f"{vocabulary}, whose ids are to be scored")


def read_arpa(
    path: PathLike,
    vocab_size: int | None = None,
    *,
    vocabulary: str | None = None,
    start_id: int | None = None,
    eos_id: int | None = None,
    say: Say = lambda text: None,
) -> BackOff:
  """Reads a model.

  Ids that aren't listed have the probability of `<unk>`, each of them, as in kenlm;
  10^-99 where that isn't listed either. The start's own probability is 10^-99.

  Args:
    path: an ARPA file.
    vocab_size: ids that a token can have; what the JSON file says by default.
    vocabulary: a fingerprint, which must be that of the JSON file, where it has one.
    start_id: what `<s>` is; by the JSON file, else 0.
    eos_id: what `</s>` is; by the JSON file, else 1.
    say: is told what begins.

  Raises:
    InputError: naming the file, and the line where it is one that is wrong.
  """
  path = local_path(path)
  check_vocabulary(path, vocabulary)
  info = read_info(path) or {}
  vocab_size = vocab_size or info.get("vocab_size")
  if vocab_size is None:
    raise InputError(f"{path} vocab_size", None, f"a number, as there is no {info_path(path)}")
  special = {"start_id": (start_id, 0), "eos_id": (eos_id, 1)}
  for field, (given, default) in special.items():
    known = info.get(field, default if given is None else given)
    if given is not None and given != known:
      raise InputError(f"{path} {field}", known, f"{given}, the model's")
    special[field] = known
  try:
    with _open(path) as file:
      return _Reader(path, file, vocab_size, special, say).read()
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise InputError("file", str(path), f"a gzip file that is whole ({error})") from error
  except UnicodeDecodeError as error:
    raise InputError("file", str(path), f"UTF-8 text ({error})") from error
  except OSError as error:
    raise InputError("file", str(path), f"one that can be read ({error.strerror})") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[TextIO]:
  with open(path, "rb") as file:
    is_zipped = file.read(2) == b"\x1f\x8b"
  with gzip.open(path, "rt", encoding="utf-8") if is_zipped else open(
      path, encoding="utf-8"
  ) as file:
    yield file


class _Reader:
  """One pass over a file."""

  def __init__(
      self, path: Path, file: TextIO, vocab_size: int, special: Mapping[str, int], say: Say
  ):
    self._path, self._file, self._say = path, file, say
    self._line = 0
    self._vocab_size, self._special = vocab_size, special
    self._ids = {str(i): i for i in range(vocab_size)}
    for word, field in ((START, "start_id"), (EOS, "eos_id")):
      del self._ids[str(special[field])]
      self._ids[word] = special[field]
    self._first_ids = {**self._ids, UNKNOWN: -1}

  def read(self) -> BackOff:
    """All sections."""
    sizes = self._sizes()
    orders, log_probs, back_offs = [], [], []
    for n, size in enumerate(sizes, start=1):
      self._say(f"reading {n}-grams")
      header = self._next_line()
      if header != f"\\{n}-grams:":
        self._fail(header, f"\\{n}-grams:, after as many lines as \\data\\ says")
      first = self._line + 1
      tokens, log_prob, back_off = self._section(n, size, n == len(sizes))
      if n == 1:
        grams, log_prob, back_off = self._unigrams(tokens[0], log_prob, back_off, first)
      else:
        context = tokens[0]
        for below, token in zip(orders[1:], tokens[1:-1]):
          context = below.find(context, token)
        if (context < 0).any():
          self._fail_in_section(first, np.argmax(context < 0), f"one of the {n - 1}-grams first")
        grams, place = sorted_grams(context, tokens[-1], orders)
        log_prob, back_off = log_prob[place], back_off[place]
        is_twice = np.diff(grams.keys) == 0
        if is_twice.any():
          again = np.sort(place[np.argmax(is_twice) :][:2])[1]
          self._fail_in_section(first, again, "an n-gram that isn't there yet")
      orders.append(grams)
      log_probs.append(log_prob * math.log(10))
      back_offs.append(back_off * math.log(10))
    end = self._next_line()
    if end != "\\end\\":
      self._fail(end, "\\end\\, after as many lines as \\data\\ says")
    for _ in self._file:
      pass  # Only at its end does gzip know that a file is whole.
    return BackOff(
        tuple(orders), tuple(log_probs), tuple(back_offs), self._special["start_id"],
        self._special["eos_id"],
    )

  def _sizes(self) -> list[int]:
    """How many n-grams of each order `\\data\\` announces."""
    for text in self._file:
      self._line += 1
      if text.strip() == "\\data\\":
        break
    else:
      self._fail(None, "\\data\\")
    sizes = []
    for text in self._file:
      self._line += 1
      text = text.strip()
      if not text:
        if sizes:
          break
        continue
      n, _, size = text.removeprefix("ngram").strip().partition("=")
      if not text.startswith("ngram ") or n.strip() != f"{len(sizes) + 1}" or not _is_count(size):
        self._fail(text, f"ngram {len(sizes) + 1}=COUNT")
      sizes.append(int(size))
    if not 1 <= len(sizes) <= MAX_ORDER:
      self._fail(f"{len(sizes)} orders", f"1 … {MAX_ORDER} lines ngram N=COUNT, then an empty one")
    return sizes

  def _next_line(self) -> str:
    """The next line that isn't empty."""
    for text in self._file:
      self._line += 1
      if text.strip():
        return text.strip()
    self._fail("end of file", "more lines, up to \\end\\")

  def _section(
      self, n: int, size: int, is_last: bool
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids [n, size], log10 probabilities and log10 back-off weights."""
    parts = []
    while size:
      lines = list(itertools.islice(self._file, min(size, READ_CHUNK)))
      if not lines:
        self._fail("end of file", f"{size:,} more {n}-grams, by \\data\\")
      parts.append(self._parse(lines, n, is_last))
      self._line += len(lines)
      size -= len(lines)
    if not parts:
      return np.zeros([n, 0], np.int32), np.zeros(0), np.zeros(0)
    tokens, log_probs, back_offs = zip(*parts)
    return np.concatenate(tokens, axis=1), np.concatenate(log_probs), np.concatenate(back_offs)

  def _parse(
      self, lines: list[str], n: int, is_last: bool
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Takes lines apart, a column at a time; line by line where something is wrong."""
    rows = [line.split() for line in lines]
    lengths = set(map(len, rows))
    if not is_last and lengths == {n + 1, n + 2}:
      # SRILM leaves out the weight of what isn't a context.
      rows = [row if len(row) == n + 2 else [*row, "0"] for row in rows]
      lengths = {n + 2}
    if len(lengths) == 1 and lengths <= ({n + 1} if is_last else {n + 1, n + 2}):
      columns = list(zip(*rows))
      ids = self._first_ids if n == 1 else self._ids
      try:
        tokens = [list(map(ids.__getitem__, column)) for column in columns[1 : n + 1]]
        numbers = [np.asarray(list(map(float, columns[0])))]
        numbers += [np.asarray(list(map(float, column))) for column in columns[n + 1 :]]
      except (KeyError, ValueError):
        pass
      else:
        if (numbers[0] <= 0).all() and all(np.isfinite(column).all() for column in numbers):
          back_offs = numbers[1] if len(numbers) == 2 else np.zeros(len(rows))
          return np.asarray(tokens, np.int32), numbers[0], back_offs
    for text in lines:
      self._line += 1
      self._check(text.strip(), n, is_last)
    raise AssertionError(f"{self._path}: lines are right one by one, and not together")

  def _check(self, text: str, n: int, is_last: bool) -> None:
    """Raises for the line it has come to, if that is wrong."""
    if not text or text.startswith("\\"):
      self._fail(text, f"a {n}-gram, as \\data\\ says that there are more")
    row = text.split()
    if len(row) not in ({n + 1} if is_last else {n + 1, n + 2}):
      weight = "" if is_last else ", and a back-off weight or none"
      self._fail(text, f"a log10 probability, {n} word{'s' * (n > 1)}{weight}")
    for word in row[1 : n + 1]:
      if word not in self._ids and (word, n) != (UNKNOWN, 1):
        special = sorted(self._special.values())
        self._fail(
            word, f"an id from 0 to {self._vocab_size - 1} but {special[0]} and {special[1]}, "
            f"which are {START} and {EOS}; {UNKNOWN} only by itself"
        )
    for i in (0, *range(n + 1, len(row))):
      try:
        value = float(row[i])
      except ValueError:
        value = math.nan
      if not math.isfinite(value) or (i == 0 and value > 0):
        self._fail(row[i], "a finite number" + ("" if i else ", at most 0"))

  def _unigrams(self, tokens, log_probs, back_offs, first):
    """The table of order 1, and its values at each id's place."""
    is_known = tokens >= 0
    times = np.bincount(tokens[is_known], minlength=self._vocab_size)
    if (times > 1).any() or (~is_known).sum() > 1:
      by_token = np.argsort(tokens, kind="stable")
      again = by_token[1:][np.diff(tokens[by_token]) == 0].min()
      self._fail_in_section(first, again, "an id that isn't there yet")
    unknown = log_probs[~is_known]
    default = unknown[0] if len(unknown) else LOG_ZERO / math.log(10)
    all_probs, all_weights = np.full(self._vocab_size, default), np.zeros(self._vocab_size)
    all_probs[tokens[is_known]] = log_probs[is_known]
    all_weights[tokens[is_known]] = back_offs[is_known]
    all_probs[self._special["start_id"]] = LOG_ZERO / math.log(10)
    return unigrams(self._vocab_size), all_probs, all_weights

  def _fail_in_section(self, first: int, place: int, allowed: str) -> NoReturn:
    with _open(self._path) as file:
      text = next(itertools.islice(file, first + int(place) - 1, None)).strip()
    self._line = first + int(place)
    self._fail(text, allowed)

  def _fail(self, text: str | None, allowed: str) -> NoReturn:
    text = text if text is None or len(text) <= 60 else text[:60] + " …"
    raise InputError(f"{self._path}:{self._line}", text, allowed)


def _is_count(text: str) -> bool:
  return text.strip().isdecimal() and text.strip().isascii()
