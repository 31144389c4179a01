"""What `docstring_repair` and `docstring_convert` give without any model.

  python -m bpd_jax.evaluation.controls [--split test]

`Repairer` mends spelling, spaces, capitals and full stops by what words the training
split has and how often, `convert` is the rule that `docstring_convert`'s targets
are made by. Their figures stand beside a model's, see docs/data.md.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import itertools
import math
import re

import numpy as np
from rich.table import Table

from bpd_jax.data import conventions, docstrings
from bpd_jax.data.rows import (
  INSTRUCTION,
  load_rows,
  MAIN_METRICS,
  NUM_ROWS,
  Row,
  task_rows,
  VOCABULARY_FILE,
)
from bpd_jax.evaluation.bootstrap import mean_interval
from bpd_jax.evaluation.quality import floor_texts, METRICS
from bpd_jax.launch import Parser, run
from bpd_jax.terminal import plain_console
from bpd_jax.vocabulary import SentencePieceVocabulary

# A word is known that occurs this often; rarer ones may be typing errors themselves.
MIN_COUNT = 3
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TOKEN = re.compile(r"(\W*)(.*?)(\W*)")


class Repairer:
  """Mends a text word by word, by counts of words and of pairs of them."""

  def __init__(self, texts: Iterable[str]):
    """Counts.

    Args:
      texts: without errors.
    """
    words, pairs = Counter(), Counter()
    for text in texts:
      cores = ["", *(_TOKEN.fullmatch(token)[2].lower() for token in text.split())]
      words.update(cores)
      pairs.update(itertools.pairwise(cores))
    self._words = {word: count for word, count in words.items() if count >= MIN_COUNT}
    self._pairs = pairs
    self._total = max(1, sum(self._words.values()))

  def repair(self, text: str) -> str:
    """The text with a capital at the start of sentences and a full stop at the end.

    Where a letter is on the wrong side of a space, it moves. A word of letters that
    isn't known then becomes the likeliest of: itself, two known words, or a known
    word that is one letter less, more or other, or has two in another order.
    """
    tokens = text.split()
    mended, previous = [], ""
    for i in range(len(tokens)):
      before, core, after = _TOKEN.fullmatch(tokens[i]).groups()
      moved = [] if after or i + 1 == len(tokens) else list(self._moved(core, tokens[i + 1]))
      if moved:
        best, tokens[i + 1] = max(moved, key=lambda pair: self._score(previous, pair))
        best = (best,)
      elif self._is_known(core):
        best = (core,)
      else:
        options = [(core,), *((word,) for word in self._near(core))]
        options += [parts for parts in _splits(core) if all(map(self._is_known, parts))]
        best = max(options, key=lambda words: self._score(previous, words))
      if core[:1].isupper():
        best = (best[0][:1].upper() + best[0][1:], *best[1:])
      mended.append(before + " ".join(best) + after)
      previous = best[-1].lower()
    text = re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), " ".join(mended))
    return text if text.endswith((".", "!", "?")) else text.rstrip(",;:") + "."

  def _is_known(self, word: str) -> bool:
    """Whether it is in the list; what isn't letters is no matter of spelling."""
    return not word.isalpha() or word.lower() in self._words

  def _near(self, word: str) -> list[str]:
    """Known words at one typing error from a word of letters."""
    lower = word.lower()
    halves = [(lower[:i], lower[i:]) for i in range(1, len(lower) + 1)]
    found = {a + b[1:] for a, b in halves if b}
    found |= {a + b[1] + b[0] + b[2:] for a, b in halves if len(b) > 1}
    found |= {a + letter + b[1:] for a, b in halves if b for letter in _LETTERS}
    found |= {a + letter + b for a, b in halves for letter in _LETTERS}
    return [near for near in sorted(found) if near in self._words]

  def _moved(self, core: str, following: str) -> Iterator[tuple[str, str]]:
    """Both words with the space one letter earlier or later, where that makes both known."""
    before, second, after = _TOKEN.fullmatch(following).groups()
    if before or (self._is_known(core) and self._is_known(second)):
      return
    for one, other in ((core[:-1], core[-1:] + second), (core + second[:1], second[1:])):
      if one and other and self._is_known(one) and self._is_known(other):
        yield one, other + after

  def _score(self, previous: str, words: Sequence[str]) -> float:
    """Log of the words' probability after another, by stupid back-off."""
    score = 0.0
    for word in words:
      word = _TOKEN.fullmatch(word)[2].lower()
      pair, seen = self._pairs[previous, word], self._words.get(previous, 0)
      if pair and seen and word in self._words:
        score += math.log(pair / seen)
      else:
        # A word that was never seen is less likely than two that were.
        score += math.log(0.4 * self._words.get(word, 1e-6) / self._total)
      previous = word
    return score


def convert(inputs: str) -> str | None:
  """The target for an input of `docstring_convert`; None where the rule can't read it."""
  instruction, _, docstring = inputs.partition(":\n")
  outline = conventions.parse(docstring)
  return None if outline is None else conventions.render(outline, instruction.split()[-1])


def _splits(word: str) -> list[tuple[str, str]]:
  return [(word[:i], word[i:]) for i in range(1, len(word))]


def main(argv: Sequence[str]) -> None:
  """Builds the corpus and prints a table of floors and controls."""
  parser = Parser(
      prog="python -m bpd_jax.evaluation.controls", description=__doc__.splitlines()[0]
  )
  parser.add_argument("--split", choices=NUM_ROWS, default="test")
  args = parser.parse_args(argv)
  records = docstrings.build().records
  vocabulary = SentencePieceVocabulary(VOCABULARY_FILE)
  repairer = Repairer(row["targets"] for row in task_rows("docstring_repair", records["train"]))
  controls = {
      "docstring_repair": lambda inputs: repairer.repair(inputs.partition(":\n")[2]),
      "docstring_convert": lambda inputs: convert(inputs) or "",
  }
  table = Table("task", "rows", "metric", "another reference", "input's start", "control", "95 %")
  for task, control in controls.items():
    rows = load_rows(task, args.split)
    scores = functools.partial(_scores, METRICS[MAIN_METRICS[task]], rows)
    floors = floor_texts(rows, INSTRUCTION, vocabulary)
    found = scores([control(row["inputs"]) for row in rows])
    low, high = mean_interval(found)
    table.add_row(
        task, f"{len(rows)}", MAIN_METRICS[task],
        *(f"{scores(floors[name]).mean():.3f}" for name in ("another_reference", "input_start")),
        f"{found.mean():.3f}", f"{low:.3f}–{high:.3f}",
    )
  console = plain_console(width=120)
  console.print(table)
  described = [record for record in records[args.split] if record.parameters]
  outlines = [conventions.parse(record.docstring) for record in described]
  num_whole = sum(
      outline is not None and len(outline.parameters) == len(record.parameters)
      for outline, record in zip(outlines, described)
  )
  console.print(
      f"docstrings of {args.split} that describe parameters: {len(described):,}; the rule reads "
      f"{sum(outline is not None for outline in outlines):,} of them, {num_whole:,} with every "
      "parameter"
  )


def _scores(
    metric: Callable[[str, str], float], rows: Sequence[Row], texts: Sequence[str]
) -> np.ndarray:
  return np.array([metric(row["targets"], text) for row, text in zip(rows, texts, strict=True)])


if __name__ == "__main__":
  run(main)
