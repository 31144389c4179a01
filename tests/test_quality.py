"""Metrics, floors and the verdict on hand-computed cases, and bootstrap intervals."""

import re
import socket

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from bpd_jax.data.rows import INSTRUCTION, RowsTask, TASKS, VOCABULARY_FILE
from bpd_jax.errors import InputError
from bpd_jax.evaluation import quality
from bpd_jax.evaluation.bootstrap import mean_interval, ratio_interval
from bpd_jax.evaluation.quality import (
    check_metric,
    describe_quality,
    edit_distance,
    edit_similarity,
    exact_match,
    floor_texts,
    is_learned,
    is_looping,
    METRICS,
    repeated_share,
    rouge_l,
    word_similarity,
)
from bpd_jax.generation import Generation
from bpd_jax.vocabulary import ByteVocabulary, SentencePieceVocabulary

BYTES = ByteVocabulary()
EOS = 1


def generation_of(texts, vocabulary=BYTES, has_eos=True):
  """What greedy would have given, had it written these texts."""
  tokens = [np.array([*vocabulary.encode(text), *([EOS] if has_eos else [])]) for text in texts]
  return Generation(
      tokens, calls=[len(row) for row in tokens], traces=[[] for _ in tokens], texts=list(texts),
      seconds=[1.0], is_warm=[True],
  )


def describe(texts, rows, metric="rouge_l", **options):
  return describe_quality(generation_of(texts, **options), rows, metric, "", BYTES, EOS)


@pytest.mark.parametrize("reference, output, expected", [
    # Four words in common, in order: precision 4/4, recall 4/6.
    ("the cat sat on the mat", "the cat on mat", 0.8),
    # A longest common subsequence of one: 1/3 and 1/2.
    ("a b c", "c a", 0.4),
    ("The CAT.", "the, cat", 1.0),
    # Without stemming.
    ("one cat", "one cats", 0.5),
    ("one", "", 0.0),
    ("", "", 0.0),
    ("漢字", "漢字", 0.0),
    ("line one\nline two", "line one line two", 1.0),
])
def test_rouge_l(reference, output, expected):
  assert rouge_l(reference, output) == pytest.approx(expected)


def test_rouge_needs_neither_network_nor_nltk_data(monkeypatch):
  import nltk

  def refuse(*args, **options):
    raise AssertionError("the network was asked")

  monkeypatch.setattr(nltk.data, "path", [])
  monkeypatch.setattr(socket, "socket", refuse)
  quality._rouge_scorer.cache_clear()
  assert rouge_l("Two sentences. Here.", "Two sentences.") == pytest.approx(0.8)


def test_exact_match_ignores_white_space_at_the_ends_only():
  assert exact_match(" a b\n", "a b") == 1.0
  assert exact_match("a b", "a  b") == 0.0
  assert exact_match("a", "A") == 0.0


@pytest.mark.parametrize("one, other, distance", [
    ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "", 3), ("", "", 0),
    ("abc", "abc", 0), ("ab", "ba", 2), ("ü漢", "u漢", 1),
])
def test_edit_distance(one, other, distance):
  assert edit_distance(one, other) == distance
  longer = max(len(one), len(other))
  expected = 1 - distance / longer if longer else 1.0
  assert edit_similarity(one, other) == pytest.approx(expected)


def slow_distance(one, other):
  """The textbook's table."""
  table = np.zeros([len(one) + 1, len(other) + 1], int)
  table[:, 0], table[0] = range(len(one) + 1), range(len(other) + 1)
  for i, a in enumerate(one):
    for j, b in enumerate(other):
      table[i + 1, j + 1] = min(
          table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (a != b)
      )
  return table[-1, -1]


@pytest.mark.parametrize("reference, output, expected", [
    ("the cat sat on the mat", "the cat sat on a mat", 5 / 6),
    # Case and punctuation are part of a word, its place in a line isn't.
    ("The cat sat.", "the cat sat.", 2 / 3),
    ("The cat sat.", "The  cat\nsat", 2 / 3),
    # A word that is two costs two of four.
    ("one two three", "one tw o three", 0.5),
    ("one", "", 0.0),
    ("", "", 1.0),
])
def test_word_similarity(reference, output, expected):
  assert word_similarity(reference, output) == pytest.approx(expected)


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distance_is_the_textbooks(one, other):
  assert edit_distance(one, other) == slow_distance(one, other)


@pytest.mark.parametrize("num_rows, other", [
    (2, [1, 0]), (3, [1, 2, 0]), (4, [2, 3, 0, 1]), (5, [2, 3, 4, 0, 1]),
])
def test_floor_of_another_reference(num_rows, other):
  rows = [{"inputs": "x", "targets": f"target {i}"} for i in range(num_rows)]
  texts = floor_texts(rows, "", BYTES)["another_reference"]
  assert texts == [f"target {i}" for i in other]


def test_floor_of_the_inputs_start():
  rows = [
      {"inputs": "do this:\nsome long text", "targets": "four"},
      {"inputs": "do that:\nab", "targets": "longer than the input"},
      {"inputs": "plain, do this:\nagain", "targets": "üx"},
  ]
  texts = floor_texts(rows, r"do (this|that):\n", BYTES)
  # "üx" is three bytes.
  assert texts["input_start"] == ["some", "ab", "pla"]
  # A text to repair is longer than the repaired one, and all of it is the floor.
  rows = [{"inputs": "abcdefghi"[:length], "targets": "123456"} for length in (9, 8, 6, 2)]
  assert floor_texts(rows, "", BYTES)["input_start"] == [
      "abcdefghi", "abcdefgh", "abcdef", "ab"
  ]
  rows = [{"inputs": "abcdefghij", "targets": "123456"}]
  assert floor_texts(rows, "", BYTES)["input_start"] == ["abcdef"]


def test_floor_of_the_inputs_start_has_no_instruction():
  rows = [
      {"inputs": "do this:\nsome long text", "targets": "four"},
      {"inputs": "do that:\nab", "targets": "longer than the input"},
      {"inputs": "plain, do this:\nagain", "targets": "üx"},
  ]
  assert floor_texts(rows, "", BYTES)["input_start"] == ["do t", "do that:\nab", "pla"]
  assert list(floor_texts(rows[:1], "", BYTES)) == ["input_start"]


@pytest.mark.parametrize("name", TASKS)
def test_every_shipped_input_has_an_instruction_and_a_known_metric(name):
  task = RowsTask(name)
  check_metric(name, task.main_metric)
  for row in task.rows():
    assert re.match(INSTRUCTION, row["inputs"]), row["inputs"]
    # Something is left to copy.
    assert re.sub(INSTRUCTION, "", row["inputs"], count=1).strip()


def test_unknown_metric_is_named():
  with pytest.raises(InputError, match=r"^mine main_metric = 'bleu': allowed is one of \('rouge"):
    check_metric("mine", "bleu")


def test_interval_of_a_mean_is_the_binomials():
  # 30 of 100: resampled, that is Binomial(100, 0.3), whose quantiles are 21 and 39.
  low, high = mean_interval(np.array([1.0] * 30 + [0.0] * 70))
  assert low == pytest.approx(0.21, abs=0.011) and high == pytest.approx(0.39, abs=0.011)
  assert mean_interval(np.full(7, 0.25)) == [0.25, 0.25]


def test_interval_of_a_ratio_weighs_rows_by_their_calls():
  # One of two rows: 20/10 alone, 2/2 alone, or both.
  low, high = ratio_interval(np.array([20, 2]), np.array([10, 2]))
  assert (low, high) == (1.0, 2.0)
  # The mean of the ratios would be 1.5.
  low, high = ratio_interval(np.array([20, 2] * 500), np.array([10, 2] * 500))
  assert low < 22 / 12 < high and low > 1.7


def test_intervals_hold_the_truth_95_times_in_100():
  rng = np.random.default_rng(4)
  held = 0
  for _ in range(300):
    low, high = mean_interval(rng.exponential(1.0, 60))
    held += low < 1.0 < high
  assert 0.89 <= held / 300 <= 0.98


def test_interval_narrows_with_rows_and_holds_the_estimate():
  rng = np.random.default_rng(1)
  calls = rng.integers(5, 20, 400)
  tokens = calls * 2 + rng.integers(-3, 4, 400)
  widths = []
  for rows in (25, 400):
    low, high = ratio_interval(tokens[:rows], calls[:rows])
    assert low < tokens[:rows].sum() / calls[:rows].sum() < high
    widths.append(high - low)
  assert widths[1] < widths[0] / 2


def test_learned_is_above_both_floors_beyond_chance():
  rows = 100
  scores = np.tile([0.3, 0.5], rows // 2)
  low, high = np.full(rows, 0.1), np.full(rows, 0.45)
  assert is_learned(scores, {"a": low, "b": low}, 0.0, 0.0)
  assert not is_learned(scores, {"a": low, "b": high}, 0.0, 0.0)
  assert not is_learned(scores, {"a": high, "b": low}, 0.0, 0.0)
  # Equal to a floor isn't above it.
  assert not is_learned(scores, {"a": low, "b": scores}, 0.0, 0.0)
  # 0.01 above on average, with a standard error of 0.04.
  noise = np.tile([0.41, -0.39], rows // 2)
  assert not is_learned(scores + noise, {"a": low, "b": scores}, 0.0, 0.0)
  # The same 0.01 on every row: rows are compared with their own floors.
  assert is_learned(scores + 0.01, {"a": low, "b": scores}, 0.0, 0.0)


def test_learned_has_a_limit_of_loops_beyond_the_references():
  scores, floors = np.full(50, 0.5), {"a": np.zeros(50)}
  assert is_learned(scores, floors, 0.1, 0.0)
  assert not is_learned(scores, floors, 0.12, 0.0)
  assert is_learned(scores, floors, 0.3, 0.25)


def test_repetition():
  assert repeated_share([1, 2]) == 0.0
  assert repeated_share([1, 2, 3, 4]) == 0.0
  assert repeated_share([1, 1, 1, 1]) == 0.5
  assert is_looping([1, 2, 3, 1, 2, 3]) and not is_looping(list(range(50)))
  # Of 10 3-grams one came before: 10 % isn't more than 10 %.
  assert not is_looping([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2])
  assert is_looping([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2])


def test_description_by_hand():
  rows = [
      {"inputs": "ab cd ef", "targets": "one two"},
      {"inputs": "one xx yy", "targets": "three four"},
  ]
  found = describe(["one two", "three five aaaaaa"], rows)
  assert found == {
      # Two rows: 1 and 2·(1/3·1/2)/(5/6) = 0.4.
      "main_metric": "rouge_l",
      "quality": {
          "rouge_l": pytest.approx(0.7), "exact_match": 0.5,
          # "four" becomes "five aaaaaa": 10 edits over 17 characters.
          "edit_similarity": pytest.approx((1 + 1 - 10 / 17) / 2),
          # One word of three is right.
          "word_similarity": pytest.approx((1 + 1 / 3) / 2),
      },
      "quality_interval": [pytest.approx(0.4), 1.0],
      "quality_floors": {"another_reference": 0.0, "input_start": 0.0},
      "learned": False,
      "repetition": {
          # Of 16 3-grams of 18 tokens, "aaa" comes 4 times.
          "outputs": pytest.approx(3 / 16 / 2), "references": 0.0,
          "looping_rows": 0.5, "reference_looping_rows": 0.0,
      },
      "unfinished_rows": 0.0,
  }


WORDS = [f"{a}{b}" for a in "bcdfgh" for b in "aeiou"]
ROWS = [
    {"inputs": f"say {word}", "targets": f"the {word} eats a {i + 10} number"}
    for i, word in enumerate(WORDS)
]
REFERENCES = [row["targets"] for row in ROWS]


def test_references_as_outputs_are_learned():
  found = describe(REFERENCES, ROWS, "exact_match")
  assert found["learned"] is True and found["quality"]["exact_match"] == 1.0
  assert set(found["quality"]) == set(METRICS)


def test_one_phrase_for_everything_is_not_learned():
  # Fluent, never looping, and worth no more than another row's reference.
  found = describe([REFERENCES[0]] * len(ROWS), ROWS)
  assert found["repetition"]["looping_rows"] == 0.0
  assert found["quality_floors"]["another_reference"] > 0.2
  assert found["learned"] is False


def test_copies_of_the_input_are_not_learned():
  starts = floor_texts(ROWS, "", BYTES)["input_start"]
  assert describe(starts, ROWS, "edit_similarity")["learned"] is False


def test_loops_after_the_reference_are_not_learned():
  found = describe([text + "r" * 12 for text in REFERENCES], ROWS)
  assert found["quality"]["rouge_l"] > found["quality_floors"]["another_reference"] + 0.1
  assert found["repetition"]["looping_rows"] == 1.0 and found["learned"] is False


def test_code_that_repeats_itself_as_its_references_do_is_learned():
  vocabulary = SentencePieceVocabulary(VOCABULARY_FILE)
  task = RowsTask("code_format", max_examples=100)
  rows = task.rows()
  outputs = generation_of([row["targets"] for row in rows], vocabulary)
  found = describe_quality(
      outputs, rows, task.main_metric, task.instruction, vocabulary, EOS
  )
  assert found["repetition"]["looping_rows"] > 0.2
  assert 0.7 < found["quality_floors"]["input_start"] < 0.85
  assert found["learned"] is True


def test_without_references_nothing_is_said():
  found = describe(["one", "aaaaaaaa"], [{"inputs": "x"}, {"inputs": "y"}], has_eos=False)
  repetition = found.pop("repetition")
  # Of 6 3-grams "aaa" 6 times.
  assert repetition == {
      "outputs": pytest.approx(5 / 6 / 2), "references": None, "looping_rows": 0.5,
      "reference_looping_rows": None,
  }
  assert found.pop("unfinished_rows") == 1.0
  assert set(found) == {
      "learned", "main_metric", "quality", "quality_interval", "quality_floors"
  }
  assert all(value is None for value in found.values())


def test_length_limit_shows_in_unfinished_rows():
  outputs = generation_of(["one", "two"])
  outputs.tokens[1] = outputs.tokens[1][:-1]
  rows = [{"inputs": "x", "targets": "one"}] * 2
  assert describe_quality(outputs, rows, "rouge_l", "", BYTES, EOS)["unfinished_rows"] == 0.5
