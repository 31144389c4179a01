"""Whether outputs say something, without which no block efficiency means anything.

A model that nobody trained enough repeats itself or writes one phrase for
everything, and heads guess both easily. So outputs are compared with references
(`METRICS`), and with what the same metric gives to texts that need no model
(`floor_texts`); `describe_quality` gives the figures and the verdict.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import re
from types import MappingProxyType
from typing import Any

import numpy as np

from bpd_jax.errors import InputError
from bpd_jax.evaluation.bootstrap import mean_interval
from bpd_jax.generation import Generation
from bpd_jax.vocabulary import Vocabulary

# A row loops where more than this share of its 3-grams came before in the row.
LOOPING_SHARE = 0.1
# A task isn't learned where looping rows are more than the references' share
# and this. References loop as well, code above all: 28 % of `code_format`.
MAX_LOOPING = 0.1
# Up to this many times the reference's tokens an input is a floor as a whole.
WHOLE_INPUT = 1.5


@functools.cache
def _rouge_scorer():
  # Here, as it takes 1.5 s to import.
  from rouge_score import rouge_scorer

  return rouge_scorer.RougeScorer(["rougeL"])


def rouge_l(reference: str, output: str) -> float:
  """F-measure of the longest common subsequence of words (Lin 2004), 0 … 1.

  Words are runs of a-z and 0-9 of the lower-cased text, without stemming; a
  text that has none scores 0.
  """
  return float(_rouge_scorer().score(reference, output)["rougeL"].fmeasure)


def exact_match(reference: str, output: str) -> float:
  """1 where the texts are equal but for white space at their ends."""
  return float(reference.strip() == output.strip())


def edit_similarity(reference: str, output: str) -> float:
  """1 - edit distance of the characters / length of the longer text, 0 … 1."""
  longer = max(len(reference), len(output))
  return 1 - edit_distance(reference, output) / longer if longer else 1.0


def word_similarity(reference: str, output: str) -> float:
  """1 - edit distance of the words / number of words of the longer text, 0 … 1.

  Words are what stands between white space, case and punctuation included: 1 - the
  word error rate, if the output is no longer than the reference.
  """
  words = reference.split(), output.split()
  longer = max(map(len, words))
  return 1 - edit_distance(*words) / longer if longer else 1.0


METRICS: Mapping[str, Callable[[str, str], float]] = MappingProxyType({
    metric.__name__: metric for metric in (rouge_l, exact_match, edit_similarity, word_similarity)
})


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
  """Fewest characters, or words of lists, to insert, delete or change (Levenshtein)."""
  ids = {}
  one, other = ([ids.setdefault(item, len(ids)) for item in items] for items in (one, other))
  items = np.array(other, np.int64)
  places = np.arange(len(other) + 1)
  row = places
  for i, item in enumerate(one, start=1):
    kept = row[:-1] + (items != item)
    row = np.concatenate([[i], np.minimum(kept, row[1:] + 1)])
    # Insertions: the least of row[j] + (k - j) over all j <= k.
    row = np.minimum.accumulate(row - places) + places
  return int(row[-1])


def check_metric(task: str, metric: str) -> None:
  """Raises InputError where a task asks for a metric that isn't there."""
  if metric not in METRICS:
    raise InputError(f"{task} main_metric", metric, f"one of {tuple(METRICS)}")


def floor_texts(
    rows: Sequence[Mapping[str, str]], instruction: str, vocabulary: Vocabulary
) -> dict[str, list[str]]:
  """Outputs that need no model, one list a floor.

  `another_reference` is the reference of the row half the list away, none
  where there is one row only. `input_start` is the beginning of the row's own
  input after its instruction, as many tokens as the reference has, or all of
  it where that is at most `WHOLE_INPUT` as many: a text with errors is longer than
  the text that it was.

  Args:
    rows: with `inputs` and `targets`.
    instruction: of the task.
    vocabulary: in which tokens are counted.
  """
  references = [row["targets"] for row in rows]
  texts = {}
  if len(rows) > 1:
    half = len(rows) // 2
    texts["another_reference"] = references[half:] + references[:half]
  starts = []
  for row in rows:
    content = re.sub(f"\\A(?:{instruction})", "", row["inputs"])
    tokens, length = vocabulary.encode(content), len(vocabulary.encode(row["targets"]))
    is_short = len(tokens) <= WHOLE_INPUT * length
    starts.append(content if is_short else vocabulary.decode(tokens[:length]))
  texts["input_start"] = starts
  return texts


def is_learned(
    scores: np.ndarray, floors: Mapping[str, np.ndarray], looping_rows: float,
    reference_looping_rows: float,
) -> bool:
  """Whether greedy's outputs are worth measuring a block efficiency on.

  The mean difference to every floor must be above 0 by the bootstrap's 95 %
  interval, row by row; and looping rows must be at most `MAX_LOOPING` more than
  among the references.

  Args:
    scores: [rows] main metric of the outputs.
    floors: the same metric of each floor's texts, [rows].
    looping_rows: share of outputs that loop.
    reference_looping_rows: share of references that loop.
  """
  is_above = all(mean_interval(scores - floor)[0] > 0 for floor in floors.values())
  return is_above and looping_rows <= reference_looping_rows + MAX_LOOPING


def describe_quality(
    generation: Generation, rows: Sequence[Mapping[str, str]], main_metric: str,
    instruction: str, vocabulary: Vocabulary, eos_id: int,
) -> dict[str, Any]:
  """What greedy's outputs on a task's rows are worth.

  Args:
    generation: greedy's, with texts.
    rows: with `inputs`, and `targets` where there are references.
    main_metric: one of `METRICS`.
    instruction: of the task.
    vocabulary: of floors and of repetition in references.
    eos_id: by which an output ends.

  Returns:
    `learned`, `main_metric`, `quality` (every metric's mean), `quality_interval`
    and `quality_floors` (of the main metric), all None without references;
    `repetition`; and `unfinished_rows`, the share that the length limit cut.
  """
  tokens = [row.tolist() for row in generation.tokens]
  looping_rows = float(np.mean([is_looping(row) for row in tokens]))
  repetition = {
      "outputs": float(np.mean([repeated_share(row) for row in tokens])),
      "references": None,
      "looping_rows": looping_rows,
      "reference_looping_rows": None,
  }
  described = {
      "learned": None, "main_metric": None, "quality": None, "quality_interval": None,
      "quality_floors": None, "repetition": repetition,
      "unfinished_rows": float(np.mean([eos_id not in row for row in tokens])),
  }
  if "targets" not in rows[0]:
    return described
  references = [row["targets"] for row in rows]
  encoded = [vocabulary.encode(reference) for reference in references]
  repetition["references"] = float(np.mean([repeated_share(row) for row in encoded]))
  repetition["reference_looping_rows"] = float(np.mean([is_looping(row) for row in encoded]))
  scores = {name: _scores(name, references, generation.texts) for name in METRICS}
  floors = {
      name: _scores(main_metric, references, texts)
      for name, texts in floor_texts(rows, instruction, vocabulary).items()
  }
  return described | {
      "learned": is_learned(
          scores[main_metric], floors, looping_rows, repetition["reference_looping_rows"]
      ),
      "main_metric": main_metric,
      "quality": {name: float(values.mean()) for name, values in scores.items()},
      "quality_interval": mean_interval(scores[main_metric]),
      "quality_floors": {name: float(values.mean()) for name, values in floors.items()},
  }


def repeated_share(tokens: Sequence[int], n: int = 3) -> float:
  """Share of a row's n-grams that stood earlier in the same row; 0 below n + 1 tokens."""
  grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_looping(tokens: Sequence[int]) -> bool:
  """Whether a row repeats itself; see `LOOPING_SHARE`."""
  return repeated_share(tokens) > LOOPING_SHARE


def _scores(metric: str, references: Sequence[str], texts: Sequence[str]) -> np.ndarray:
  return np.array([METRICS[metric](*pair) for pair in zip(references, texts, strict=True)])
