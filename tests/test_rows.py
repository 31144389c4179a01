"""The rows and the vocabulary that the package ships."""

import gzip
import shutil
import subprocess
import sys

import pytest

from bpd_jax.data import docstrings, rows
from bpd_jax.data.extraction import Record
from bpd_jax.data.manifest import read_manifest
from bpd_jax.errors import InputError
from bpd_jax.vocabulary import SentencePieceVocabulary

CASES = [(task, split) for task in rows.TASKS for split in rows.NUM_ROWS]


@pytest.fixture(scope="module")
def vocabulary():
  return SentencePieceVocabulary(rows.VOCABULARY_FILE)


@pytest.mark.parametrize("task, split", CASES)
def test_shipped_rows_fit_and_round_trip(task, split, vocabulary):
  found = rows.load_rows(task, split)
  assert len(found) == rows.NUM_ROWS[split]
  assert len({row["inputs"] for row in found}) == len(found)
  for row in found:
    assert set(row) == {"inputs", "targets", "source"}
    for name, most in (("inputs", 256), ("targets", 128)):
      ids = vocabulary.encode(row[name])
      assert vocabulary.decode(ids) == row[name]
      assert 0 < len(ids) < most


@pytest.mark.parametrize("split", rows.NUM_ROWS)
def test_shipped_rows_are_of_the_splits_distributions(split):
  allowed = {entry.distribution for entry in read_manifest().entries if entry.split == split}
  sources = {
      row["source"].split("/")[0] for task in rows.RECORD_TASKS
      for row in rows.load_rows(task, split)
  }
  assert sources == allowed


def test_notice_names_what_is_shipped():
  notice = rows.FILES.parents[2].joinpath("NOTICE").read_text()
  for entry in read_manifest().entries:
    assert f"{entry.distribution} {entry.version} ({entry.licence})" in notice


@pytest.mark.parametrize("text", [
    "def f(x):\n    if x:\n            return  x\n\n\n", "  \n \n", "\n\n\n\nx", " " * 40 + "x",
    "tab\tand ünïcode 漢字 🙂", "", " leading and trailing ", "x" * 300,
])
def test_vocabulary_keeps_every_character(text, vocabulary):
  assert vocabulary.decode(vocabulary.encode(text)) == text


def test_vocabulary_has_t5s_special_ids_and_a_power_of_two(vocabulary):
  model = vocabulary._model
  assert [model.pad_id(), model.eos_id(), model.unk_id()] == [0, 1, 2]
  assert vocabulary.size == 4096
  assert vocabulary.encode("a<extra_id_0>")[-1] == 4095
  assert len(vocabulary.encode("\n        return x")) == 4


def test_vocabulary_is_trained_alike_twice(tmp_path):
  records = [
      Record("d", "p.py", i, "f", "function", f"def f{i}(x):", f"    return x + {i}",
             f"Return the number {i} more than the one that is given, whichever.")
      for i in range(60)
  ]
  one, two = (docstrings.train_vocabulary(given, 400, 40) for given in (records, records[::-1]))
  assert one == two
  (tmp_path / "small.model").write_bytes(one)
  small = SentencePieceVocabulary(tmp_path / "small.model")
  text = "def f(x):\n    return  é"
  assert small.decode(small.encode(text)) == text


def test_fingerprint_is_of_inputs_and_targets():
  found = rows.load_rows("grammar", "test")[:3]
  expected = rows.rows_fingerprint(found)
  assert expected == rows.rows_fingerprint([{**row, "source": "other"} for row in found])
  assert expected != rows.rows_fingerprint(found[::-1])
  assert expected != rows.rows_fingerprint([*found[:2], {**found[2], "targets": "x"}])


@pytest.mark.parametrize("task, split, message", [
    ("nothing", "test", r"^task = 'nothing': allowed is one of \('docstring_summary', "),
    ("grammar", "train", "^split = 'train': allowed is one of"),
])
def test_unknown_task_or_split(task, split, message):
  with pytest.raises(InputError, match=message):
    rows.load_rows(task, split)


def test_folder_without_rows_is_one_line(tmp_path):
  with pytest.raises(InputError, match="^rows = .*grammar.test.jsonl.gz"):
    rows.load_rows("grammar", "test", tmp_path)
  shutil.copy(rows.FILES / "grammar.test.jsonl.gz", tmp_path)
  assert rows.load_rows("grammar", "test", tmp_path) == rows.load_rows("grammar", "test")
  with gzip.open(tmp_path / "grammar.test.jsonl.gz", "wt") as file:
    file.write("{")
  with pytest.raises(InputError, match="^rows = "):
    rows.load_rows("grammar", "test", tmp_path)


def test_choice_drops_training_targets_and_what_does_not_fit(vocabulary):
  def record(line, body):
    return Record("d", "p.py", line, f"f{line}", "function", f"def f{line}(x):", body,
                  "Says what is done.")

  records = [
      record(1, "    return first(x, x + 1, x + 2)"),
      record(2, "    return second(x, x + 1, x + 2)"),
      record(3, "    return second(x, x + 1, x + 2)"), record(4, "    return '" + "漢" * 60 + "'"),
  ]
  assert [row["source"] for row in rows.task_rows("code_body", records)] == [
      "d/p.py:1", "d/p.py:2", "d/p.py:4"
  ]
  chosen = rows.choose_rows("code_body", "test", records, {records[0].body}, vocabulary)
  assert [row["source"] for row in chosen] == ["d/p.py:2"]


def test_examples_are_printed():
  out = subprocess.run(
      [sys.executable, "-m", "bpd_jax.data.docstrings", "examples", "code_format", "-n", "2"],
      check=True, capture_output=True, text=True,
  ).stdout
  row = rows.load_rows("code_format", "test")[0]
  assert f"{row['inputs']}\n--->\n{row['targets']}\n" in out
  assert out.count("--->") == 2
