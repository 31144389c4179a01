"""What makes a corpus honest: no duplicates, no package too large, no leakage.

Leakage is counted in 13-grams of lower-case words, as is usual for language
models: the share of a row's 13-grams that are found anywhere in training.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import hashlib
import re

import numpy as np

from bpd_jax.data.extraction import Record

NGRAM = 13
MAX_SEEN = 0.2
MAX_FIRST_LINES = 5
MAX_SHARE = 0.15

_WORD = re.compile(r"\w+")


def drop_duplicates(records: Iterable[Record]) -> list[Record]:
  """Keeps the first record of each docstring, compared without case and layout."""
  seen, kept = set(), []
  for record in records:
    text = " ".join(record.docstring.lower().split())
    if text not in seen:
      seen.add(text)
      kept.append(record)
  return kept


def drop_common_first_lines(
    records: Sequence[Record], limit: int = MAX_FIRST_LINES
) -> list[Record]:
  """Drops all records whose docstring's first line occurs more than `limit` times."""
  first_lines = [record.docstring.split("\n", 1)[0].lower() for record in records]
  counts = Counter(first_lines)
  return [record for record, line in zip(records, first_lines) if counts[line] <= limit]


def cap_distributions(records: Sequence[Record], share: float = MAX_SHARE) -> list[Record]:
  """Keeps of each distribution at most `share` of the records that remain.

  Which of them go is decided by a hash of their keys, so that no part of a
  package is preferred and another environment decides alike. Where there are
  too few distributions for the share, they end up equal.
  """
  counts = Counter(record.distribution for record in records)
  limit = _cap(list(counts.values()), share)
  places = {name: [] for name in counts}
  for place, record in enumerate(records):
    places[record.distribution].append((stable_hash(record.key), place))
  kept = sorted(
      place for ranked in places.values() for _, place in sorted(ranked)[:limit]
  )
  return [records[place] for place in kept]


def _cap(counts: Sequence[int], share: float) -> int:
  """The most that a distribution may keep such that it has at most its share."""
  fits = [
      limit for limit in range(1, max(counts, default=0) + 1)
      if limit <= share * sum(min(count, limit) for count in counts)
  ]
  return max(fits, default=min(counts, default=0))


class NgramSet:
  """The 13-grams of a list of records, docstrings and code alike."""

  def __init__(self, records: Iterable[Record]):
    self._words: dict[str, int] = {}
    grams = [gram for record in records for gram in self._grams(record)]
    self._seen = np.unique(np.concatenate([np.zeros([0], np.uint64), *grams]))

  def seen_share(self, record: Record) -> float:
    """The larger of the shares seen of a record's docstring and of its code.

    A docstring of fewer than 13 words counts as one n-gram; code that short
    has none, since `return self._name` is nobody's secret.
    """
    return max(self._share(grams) for grams in self._grams(record))

  def _share(self, grams: np.ndarray) -> float:
    if not grams.size or not self._seen.size:
      return 0.0
    places = np.minimum(np.searchsorted(self._seen, grams), self._seen.size - 1)
    return float(np.mean(self._seen[places] == grams))

  def _grams(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of docstring and code, [n] uint64 each."""
    docstring = self._word_hashes(record.docstring)
    code = self._word_hashes(f"{record.signature}\n{record.body}")
    return _hash_windows(docstring, min(NGRAM, docstring.size)), _hash_windows(code, NGRAM)

  def _word_hashes(self, text: str) -> np.ndarray:
    """Of a text's words in lower case, [words] uint64."""
    words = _WORD.findall(text.lower())
    for word in words:
      if word not in self._words:
        self._words[word] = stable_hash(word)
    return np.array([self._words[word] for word in words], np.uint64)


def _hash_windows(hashes: np.ndarray, width: int) -> np.ndarray:
  """Polynomial hashes of all windows of a width, modulo 2**64."""
  if not 0 < width <= hashes.size:
    return hashes[:0]
  base = 0x9E3779B97F4A7C15  # Odd, so that no word's bits are shifted out.
  powers = np.array([pow(base, i + 1, 2**64) for i in range(width)], np.uint64)
  return np.lib.stride_tricks.sliding_window_view(hashes, width) @ powers


def stable_hash(text: str) -> int:
  """64 bits that are the same in every process."""
  return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
