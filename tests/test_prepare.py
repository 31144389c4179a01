"""The command that writes caches: what is in them, when it refuses, what it prints."""

import errno
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small_corpus

from bpd_jax import prepare
from bpd_jax.data import docstrings, rows
from bpd_jax.data.grammar import grammar
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.token_cache import TokenCache
from bpd_jax.errors import InputError
from bpd_jax.vocabulary import BYTES_CLASS, SentencePieceVocabulary

BYTES = json.dumps({"tokenizer_class": BYTES_CLASS})
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def vocabulary():
  return SentencePieceVocabulary(rows.VOCABULARY_FILE)


@pytest.fixture(scope="module")
def small():
  return dict(zip(("manifest", "environment"), small_corpus.make()))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def corpus(small):
  return docstrings.build(**small)


def pairs(folder):
  cache = TokenCache(folder)
  return [tuple(side.tolist() for side in cache[i]) for i in range(len(cache))]


def encode(vocabulary, row):
  return tuple([*vocabulary.encode(row[side]), 1] for side in ("inputs", "targets"))


def test_caches_hold_the_tasks_rows_as_far_as_they_fit(
    tmp_path, data_dir, small, corpus, vocabulary, capsys
):
  tasks, splits = ("docstring_qa", "code_body"), ("train", "validation")
  prepare.cache(
      tasks, str(tmp_path / "to"), splits, data_dir=data_dir, max_input_length=120,
      max_target_length=30, **small,
  )
  out = capsys.readouterr().out.splitlines()
  assert sorted(path.name for path in (tmp_path / "to").iterdir()) == sorted(
      f"{task}.{split}" for task in tasks for split in splits
  )
  too_long = np.zeros(2, int)
  for task in tasks:
    for split in splits:
      folder = tmp_path / "to" / f"{task}.{split}"
      full = [
          encode(vocabulary, row) for row in rows.task_rows(task, corpus.records[split])
      ]
      fitting = [pair for pair in full if len(pair[1]) <= 30]
      expected = [
          (inputs if len(inputs) <= 120 else [*inputs[:119], 1], targets)
          for inputs, targets in fitting
      ]
      assert pairs(folder) == expected
      num_cut = sum(len(inputs) > 120 for inputs, _ in fitting)
      num_left_out = len(full) - len(fitting)
      too_long += num_cut, num_left_out
      line = next(line for line in out if line.startswith(f"{folder}: "))
      num_tokens = [sum(map(len, side)) for side in zip(*expected)]
      assert f" {len(expected):,} examples, {num_tokens[0]:,} + {num_tokens[1]:,} tokens" in line
      assert line.endswith(
          f"{num_cut:,} inputs cut to 120, {num_left_out:,} targets over 30 left out"
      )
      assert TokenCache(folder).vocabulary == vocabulary.fingerprint
  assert too_long.all()


def test_copies_of_text_follow_each_other(tmp_path, data_dir, small):
  task = "docstring_text_span_corruption"
  options = {
      "splits": ["validation"], "data_dir": data_dir, "max_input_length": 64,
      "max_target_length": 32, **small,
  }
  prepare.cache([task], str(tmp_path / "1"), **options)
  prepare.cache([task], str(tmp_path / "2"), copies=2, **options)
  once, twice = (pairs(tmp_path / name / f"{task}.validation") for name in "12")
  assert twice[: len(once)] == once
  assert len(twice) == 2 * len(once) and twice[len(once) :] != once


def test_some_examples_are_drawn_at_random_from_those_that_fit(tmp_path, capsys):
  def write(name, *more):
    prepare.main([
        "cache", "grammar", "--to", str(tmp_path / name), "--split", "validation",
        "--max-target-length", "40", *more,
    ])
    return pairs(tmp_path / name / "grammar.validation")

  full = write("all")
  some, again, other = (
      write(name, "--max-examples", "50", "--seed", seed)
      for name, seed in (("some", "0"), ("again", "0"), ("other", "1"))
  )
  assert len(some) == len(other) == 50 and some == again
  places = [full.index(pair) for pair in some]
  assert len(set(places)) == 50 and max(places) > len(full) / 2
  assert sorted(some) != sorted(other)
  assert write("most", "--max-examples", "9999") != full
  assert sorted(pairs(tmp_path / "most" / "grammar.validation")) == sorted(full)
  with pytest.raises(InputError, match="max_examples = 50: allowed is 60, as asked"):
    write("some", "--max-examples", "60")


def test_a_cache_that_is_there_is_left_alone_if_it_is_the_same(tmp_path, capsys):
  arguments = ["cache", "grammar", "--to", str(tmp_path), "--split", "validation"]
  prepare.main(arguments)
  folder = tmp_path / "grammar.validation"
  times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  capsys.readouterr()
  prepare.main([*arguments[:-1], "validation", "test"])
  out = capsys.readouterr().out.splitlines()
  assert out[0] == f"{folder}: is there and whole"
  assert out[1].startswith(f"{tmp_path / 'grammar.test'}: 2,000 examples, ")
  assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times

  def refused(message, more=()):
    with pytest.raises(InputError, match=message):
      prepare.main([*arguments, *more])

  refused(r"grammar.validation seed = 0: allowed is 1, as asked", ["--seed", "1"])
  refused(r"max_target_length = 128: allowed is 99,", ["--max-target-length", "99"])
  (tmp_path / "bytes.json").write_text(BYTES)
  refused("vocabulary = '.*': allowed is 'bytes'", ["--vocabulary", str(tmp_path / "bytes.json")])
  (folder / "prepare.json").unlink()
  refused("task = None: allowed is 'grammar'")
  (folder / "tokens.bin").write_bytes(b"")
  refused("^token cache = .*grammar.validation': allowed is one that is whole")
  shutil.rmtree(folder)
  folder.write_text("a file")
  refused("^token cache = .*grammar.validation'")


def test_bytes_are_a_vocabulary_too(tmp_path):
  (tmp_path / "tokenizer_config.json").write_text(BYTES)
  prepare.main([
      "cache", "grammar", "--to", str(tmp_path / "to"), "--split", "test", "--vocabulary",
      str(tmp_path), "--max-target-length", "300",
  ])
  inputs, _ = pairs(tmp_path / "to" / "grammar.test")[0]
  text = rows.load_rows("grammar", "test")[0]["inputs"]
  assert inputs == [byte + 3 for byte in text.encode()] + [1]


def test_rows_are_what_an_evaluation_reads(tmp_path, capsys):
  path = tmp_path / "rows.jsonl"
  prepare.main(["rows", "grammar", "--split", "test", "--to", str(path), "-n", "7"])
  found = JsonlTask("rows", str(path), targets="targets").rows()
  # The shipped rows are the first of the split.
  every = {example.inputs: example.targets for example in grammar("test", 2000)}
  assert len(found) == 7 == len({row["inputs"] for row in found})
  assert all(every[row["inputs"]] == row["targets"] for row in found)
  assert capsys.readouterr().out == f"{path}: 7 rows of grammar.test\n"
  with pytest.raises(InputError, match="^to = .*: allowed is a path where nothing is yet"):
    prepare.main(["rows", "grammar", "--to", str(path)])
  with pytest.raises(InputError, match="^to = .*: allowed is a path that can be written"):
    prepare.main(["rows", "grammar", "--to", str(tmp_path / "no/rows.jsonl"), "-n", "1"])
  assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
  from bpd_jax.data import seqio_cache

  def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(seqio_cache, "write_object", full)
  with pytest.raises(InputError, match="^folder = .*grammar.test.* \\(No space left"):
    prepare.main(["cache", "grammar", "--to", str(tmp_path), "--split", "test"])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["cache", "nothing"], r"^task = 'nothing': allowed is one of \['docstring_summary', "),
    (["cache", "docstring_tasks"], r"^task = 'docstring_tasks': .* mixture's are \['docstring_s"),
    (["cache", "grammar", "--split", "dev"], "^grammar split = 'dev': allowed is one of "
                                             r"\('train', 'validation', 'test'\)"),
    (["cache", "grammar", "--copies", "2"], "^copies = 2: allowed is 1 for grammar"),
    (["cache", "grammar", "--copies", "0"], "^copies = 0: allowed is a positive integer"),
    (["cache", "grammar", "--max-input-length", "0"], "^max_input_length = 0"),
    (["cache", "grammar", "--max-examples", "0"], "^max_examples = 0"),
    (["cache", "grammar", "--vocabulary", "absent"], "^vocabulary = 'absent': "),
    (["cache", "grammar", "--vocabulary", "tests"], "^vocabulary = 'tests': "),
    (["cache", "grammar", "--vocabulary", "setup.py"], "^vocabulary = 'setup.py': "),
    (["cache", "squad"], r"^squad data = '.*absent/squad/v1.1/3.0.0': allowed is a folder with "
                         r"TFDS's squad/v1.1:3.0.0; tfds build squad/v1.1:3.0.0 --data_dir=DIR$"),
    (["cache", "grammar", "xsum"], "^xsum data = .* says what to fetch by hand$"),
    (["examples", "xsum"], "^xsum data = "),
    (["examples", "grammar", "-n", "0"], "^n = 0"),
    (["rows", "grammar", "-n", "0", "--to", "absent.jsonl"], "^n = 0"),
    (["examples", "grammar", "--split", "dev"], "^grammar split = 'dev'"),
])
def test_bad_input_is_one_line_before_anything_is_written(
    tmp_path, monkeypatch, arguments, message
):
  monkeypatch.chdir(ROOT)
  where = ["--data-dir", str(tmp_path / "absent")]
  if arguments[0] == "cache":
    where += ["--to", str(tmp_path / "to")]
  with pytest.raises(InputError, match=message) as caught:
    prepare.main([*arguments, *where])
  assert "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--to", "--data-dir"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, option, small):
  (tmp_path / "file").write_text("")
  names = {"--to": str(tmp_path / "to"), "--data-dir": str(tmp_path / "data")}
  names[option] = str(tmp_path / "file" / "below")
  task = "grammar" if option == "--to" else "docstring_qa"
  with pytest.raises(InputError, match=r"file/below.*\(Not a directory\)"):
    prepare.cache([task], names["--to"], ["test"], data_dir=names["--data-dir"], **small)


def test_packages_that_differ_from_the_manifest_are_named(tmp_path, small):
  class Other(type(small["environment"])):
    def version(self, distribution):
      return "0.0" if distribution == "rich" else super().version(distribution)

  with pytest.raises(InputError, match="^corpus distribution rich = '0.0': allowed is version"):
    prepare.cache(
        ["docstring_qa"], str(tmp_path / "to"), data_dir=str(tmp_path / "data"),
        manifest=small["manifest"], environment=Other(),
    )
  assert not (tmp_path / "to").exists()


def test_examples_are_printed_as_text(data_dir, small, corpus, capsys):
  prepare.print_examples("docstring_lm", "validation", 3, data_dir=data_dir, **small)
  out = capsys.readouterr().out
  found = rows.task_rows("docstring_lm", corpus.records["validation"])
  shown = [
      i for i, row in enumerate(found) if f"{row['inputs']}\n--->\n{row['targets']}\n" in out
  ]
  assert len(shown) == out.count("--->") == 3
  assert shown != [0, 1, 2]


def test_the_list_says_what_is_here(tmp_path, data_dir, small, capsys):
  prepare.get_data("docstring_qa", register(data_dir, small)["docstring_qa"])
  for folder, state in ((data_dir, "here"), (str(tmp_path), "made on first use")):
    prepare.print_tasks(folder, **small)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert lines["code_body"].rstrip().endswith(state)
    assert lines["grammar"].rstrip().endswith("here")
    assert "not here: lambada:1.0.0" in lines["lambada"]
    assert "code_body 1" in lines["docstring_tasks"]


def register(data_dir, small):
  from bpd_jax.data import seqio_tasks

  return seqio_tasks.register(
      SentencePieceVocabulary(rows.VOCABULARY_FILE), data_dir=data_dir, **small
  )


@pytest.mark.slow  # Two processes that import TensorFlow.
def test_the_command_is_quiet_and_ends_with_status_2(tmp_path):
  def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bpd_jax.prepare", *arguments], cwd=ROOT, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )

  done = run("cache", "grammar", "nothing", "--to", str(tmp_path / "to"))
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("error: task = 'nothing': allowed is one of [")
  assert done.stderr.count("\n") == 1
  done = run("examples", "grammar", "-n", "1", "--split", "test")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.count("--->") == 1
