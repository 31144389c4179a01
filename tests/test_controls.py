"""What the two tasks give without a model."""

import numpy as np
import pytest
import small_corpus

from bpd_jax.data import docstrings, rows
from bpd_jax.evaluation import controls
from bpd_jax.evaluation.controls import convert, Repairer
from bpd_jax.evaluation.quality import floor_texts, word_similarity
from bpd_jax.vocabulary import SentencePieceVocabulary

TEXTS = ["The value of the array is returned to the caller.", "It has a value, if any."] * 5


@pytest.fixture(scope="module")
def repairer():
  return Repairer(TEXTS)


@pytest.fixture(scope="module")
def corpus():
  return docstrings.build(*small_corpus.make())


@pytest.mark.parametrize("typed, mended", [
    ("the value of the array", "The value of the array."),
    ("Teh valeu of the aray.", "The value of the array."),
    ("The valie of thhe array.", "The value of the array."),
    ("The valueof the array.", "The value of the array."),
    ("Th evalue oft he array.", "The value of the array."),
    ("it has a vlaue, if any", "It has a value, if any."),
    ("It has a value. if any", "It has a value. If any."),
    # Not what isn't letters, nor words with two errors.
    ("The arxry of x_1, np.valeu.", "The arxry of x_1, np.valeu."),
])
def test_repair(typed, mended, repairer):
  assert repairer.repair(typed) == mended


def test_the_word_before_decides():
  # "on" is more common, "or" follows "value".
  repairer = Repairer(["a value or it", "turned on it"] * 4 + ["on on on on"] * 9)
  assert repairer.repair("value ox it") == "Value or it."
  assert repairer.repair("turned ox it") == "Turned on it."


def test_rare_words_are_not_known():
  assert Repairer(["some words"] * 2).repair("some wrds") == "Some wrds."
  assert Repairer(["some words"] * 3).repair("some wrds") == "Some words."


def test_repairs_of_shipped_rows_are_above_the_floors(corpus):
  repairer = Repairer(
      row["targets"] for row in rows.task_rows("docstring_repair", corpus.records["train"])
  )
  found = rows.load_rows("docstring_repair", "validation")
  floors = floor_texts(found, rows.INSTRUCTION, SentencePieceVocabulary(rows.VOCABULARY_FILE))
  score = lambda texts: np.mean(
      [word_similarity(row["targets"], text) for row, text in zip(found, texts)]
  )
  repaired = score([repairer.repair(row["inputs"].partition(":\n")[2]) for row in found])
  assert 0.6 < score(floors["input_start"]) < repaired - 0.03 < 0.9


@pytest.mark.parametrize("split", rows.NUM_ROWS)
def test_the_rule_converts_every_shipped_row(split):
  for row in rows.load_rows("docstring_convert", split):
    assert convert(row["inputs"]) == row["targets"]
  assert convert("convert to numpy:\nNothing to convert.") is None


def test_command_prints_both(corpus, monkeypatch, capsys):
  monkeypatch.setattr(docstrings, "build", lambda: corpus)
  controls.main(["--split", "test"])
  lines = capsys.readouterr().out.splitlines()
  figures = {line.split()[1]: line.split() for line in lines if line.startswith("│")}
  assert figures["docstring_convert"][-4] == "1.000"
  start, control = (float(figures["docstring_repair"][i]) for i in (9, 11))
  assert 0.6 < start < control - 0.03 < 0.95
  num_described = sum(bool(record.parameters) for record in corpus.records["test"])
  assert f"describe parameters: {num_described};" in " ".join(lines)
