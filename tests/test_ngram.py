"""The command that makes n-gram models: what it writes and prints, and when it refuses."""

import json
import math
import os
from pathlib import Path
import re
import subprocess
import sys

import ngram_reference as reference
import numpy as np
import pytest

from bpd_jax import ngram
from bpd_jax.data.token_cache import write_cache
from bpd_jax.errors import InputError
from bpd_jax.ngram_lm.arpa import read_arpa
from bpd_jax.ngram_lm.backoff import join_sequences
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.smoothing import katz
from bpd_jax.vocabulary import BYTES_CLASS, ByteVocabulary

ROOT = Path(__file__).resolve().parent.parent
VOCAB = ByteVocabulary.size
TEXTS = [f"the {a} {b} sat on the {c}." for a in ("old", "new") for b in ("cat", "dog")
         for c in ("mat", "cat", "rug")]
BYTES = json.dumps({"tokenizer_class": BYTES_CLASS})


class OtherVocabulary(ByteVocabulary):
  fingerprint = "other"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two caches, one of another vocabulary, JSONL files, a vocabulary, and a model."""
  folder = tmp_path_factory.mktemp("ngram")
  encode = lambda text: [*ByteVocabulary().encode(text), 1]
  examples = [(encode(f"say {text}"), encode(text)) for text in TEXTS]
  write_cache(folder / "train", examples, task="t", split="train", vocabulary=ByteVocabulary())
  write_cache(folder / "test", examples[:3], task="t", split="test", vocabulary=ByteVocabulary())
  write_cache(folder / "other", examples, task="t", split="o", vocabulary=OtherVocabulary())
  lines = [json.dumps({"tokens": targets[:-1]}) for _, targets in examples]
  (folder / "rows.jsonl").write_text("\n\n".join(lines))
  (folder / "broken.jsonl").write_text('{"tokens": [5]}\n{"tokens": [5, "6"]}\n')
  (folder / "text.jsonl").write_text("a line\n")
  (folder / "large.jsonl").write_text('{"tokens": [5]}\n{"tokens": [5, 999]}\n')
  (folder / "vocabulary").mkdir()
  (folder / "vocabulary" / "tokenizer_config.json").write_text(BYTES)
  ngram.main(["train", str(folder / "train"), "--to", str(folder / "lm.arpa")])
  return folder


def test_sequences_end_as_their_cache_says(tmp_path, capsys):
  """An EOS of 2 isn't a token of the text, for every command."""
  examples = [([5, 6, 2], [7, 8, 9, 2]), ([5, 2], [8, 9, 7, 2])]
  write_cache(
      tmp_path / "two", examples, task="t", split="x", vocabulary=ByteVocabulary(), eos_id=2
  )
  ngram.main(["text", str(tmp_path / "two")])
  assert capsys.readouterr().out == "7 8 9\n8 9 7\n"
  lm = str(tmp_path / "lm.arpa")
  ngram.main(["train", str(tmp_path / "two"), "--to", lm, "--order", "2", "--eos-id", "2",
              "--cutoffs", "1", "1"])
  for command in ("perplexity", "speed"):
    options = ["--batches", "1", "--repeats", "1"] if command == "speed" else []
    ngram.main([command, lm, str(tmp_path / "two"), *options])


def test_files_in_a_home(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "rows.jsonl").write_text((folder / "rows.jsonl").read_text())
  ngram.main(["train", "~/rows.jsonl", "--vocab-size", str(VOCAB), "--to", "~/lm.arpa"])
  assert "~/lm.arpa: " in capsys.readouterr().out and (tmp_path / "lm.arpa").is_file()


def test_a_model_is_that_of_the_caches_tokens(folder, tmp_path, capsys):
  to = tmp_path / "lm.arpa.gz"
  ngram.main([
      "train", str(folder / "train"), str(folder / "test"), "--side", "both", "--to", str(to),
      "--order", "3", "--smoothing", "katz", "--cutoffs", "1", "2", "3", "--test",
      str(folder / "test"),
  ])
  encode = lambda text: np.asarray(ByteVocabulary().encode(text))
  texts = [text for part in (TEXTS, TEXTS[:3]) for target in part
           for text in (f"say {target}", target)]
  tokens = join_sequences(map(encode, texts), VOCAB)
  wanted = katz(count_grams(tokens, 3, VOCAB), (1, 2, 3))
  found = read_arpa(to)
  assert found.num_grams == wanted.num_grams
  np.testing.assert_allclose(found.log_probs[2], wanted.log_probs[2], atol=1e-6)
  np.testing.assert_allclose(found.back_offs[1], wanted.back_offs[1], atol=1e-6)
  out = capsys.readouterr().out
  for n, num in enumerate(wanted.num_grams, start=1):
    assert re.search(rf"^ +{n} +{num:,} *$", out, re.MULTILINE)
  assert f"{to}: {to.stat().st_size / 1e6:,.1f} MB from {len(tokens) - len(texts):,} tokens" in out
  tests = join_sequences([encode(text) for target in TEXTS[:3] for text in (
      f"say {target}", target)], VOCAB)
  assert f" {wanted.perplexity(tests):,.2f} " in out
  info = json.loads((tmp_path / "lm.json").read_text())
  assert info["vocabulary"] == "bytes" and info["cutoffs"] == [1, 2, 3]
  assert [source["name"] for source in info["trained_on"]] == ["t.train", "t.test"]
  assert [source["sequences"] for source in info["trained_on"]] == [24, 6]


def test_json_rows_are_the_same_as_a_cache(folder, tmp_path):
  to = tmp_path / "lm.arpa"
  ngram.main(["train", str(folder / "rows.jsonl"), "--to", str(to), "--vocab-size", str(VOCAB)])
  assert to.read_text() == (folder / "lm.arpa").read_text()
  assert json.loads((tmp_path / "lm.json").read_text())["vocabulary"] is None


def test_pruned_models_say_how(folder, tmp_path, capsys):
  first, second = tmp_path / "first.arpa", tmp_path / "second.arpa.gz"
  ngram.main(["prune", str(folder / "lm.arpa"), "--to", str(first), "--threshold", "1e-3"])
  ngram.main(["prune", str(first), "--to", str(second), "--prune-to", "270"])
  assert re.search(r"^ +all +270 *$", capsys.readouterr().out, re.MULTILINE)
  model = read_arpa(second)
  assert sum(model.num_grams) == 270
  assert reference.Dictionary(model).probs((0,)).sum() == pytest.approx(1, abs=1e-6)
  info = json.loads((tmp_path / "second.json").read_text())
  assert info["pruned"] == [{"threshold": 1e-3}, {"num_grams": 270}]
  assert info["num_grams"] == model.num_grams and info["smoothing"] == "kneser_ney"


def test_perplexity_and_shares(folder, capsys):
  ngram.main(["perplexity", str(folder / "lm.arpa"), str(folder / "test")])
  model = read_arpa(folder / "lm.arpa")
  tokens = join_sequences(
      [np.asarray(ByteVocabulary().encode(text)) for text in TEXTS[:3]], VOCAB
  )
  scores, used = (x[tokens != 0] for x in model.score(tokens))
  row = next(line for line in capsys.readouterr().out.splitlines() if str(folder)[:20] in line)
  shares = [f"{(used == n).mean():.1%}" for n in range(1, 5)]
  assert row.split()[-6:] == [str(len(scores)), f"{math.exp(-scores.mean()):,.2f}", *shares]


def test_query_shows_every_token(folder, capsys):
  ngram.main(["query", str(folder / "lm.arpa"), "--vocabulary", str(folder / "vocabulary"), "at ["])
  rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
  model = read_arpa(folder / "lm.arpa")
  tokens = join_sequences([np.asarray(ByteVocabulary().encode("at ["))], VOCAB)
  scores, used = model.score(tokens)
  pieces = ["a", "t", "▁", "[", "</s>"]
  assert rows[2:-1] == [
      [str(token), piece, f"{score:.4f}", f"{math.exp(score):.3g}", str(n)]
      for token, piece, score, n in zip(tokens[1:], pieces, scores[1:], used[1:])
  ]
  assert set(used[1:]) >= {1, 2}
  by_text = rows[-1]
  ngram.main(["query", str(folder / "lm.arpa"), *map(str, tokens[1:-1])])
  rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
  assert rows[-1] == by_text and len(rows[2]) == 4


def test_speed_has_a_row_for_every_order_and_batch(folder, capsys):
  ngram.main(["speed", str(folder / "lm.arpa"), str(folder / "test"), "--batches", "1", "2",
              "--repeats", "2"])
  rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()][2:]
  num_grams = np.cumsum(read_arpa(folder / "lm.arpa").num_grams)
  assert [row[:2] for row in rows[::2]] == [
      [str(n), f"{num:,}"] for n, num in enumerate(num_grams, start=1)
  ]
  assert [row[-5:-3] for row in rows] == [["1", "2,048"], ["2", "4,096"]] * 4
  assert all(0 < float(row[-3]) <= float(row[-2]) for row in rows)


def test_text_is_ids_without_ends(folder, capsys):
  ngram.main(["text", str(folder / "test"), str(folder / "rows.jsonl")])
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
      " ".join(map(str, ByteVocabulary().encode(text))) for text in TEXTS[:3] + TEXTS
  ]


def test_every_command_takes_a_model_whose_top_orders_are_empty(tmp_path, capsys):
  # No sequence is as long as the orders that are asked for.
  rows = tmp_path / "rows.jsonl"
  rows.write_text('{"tokens": [2]}\n{"tokens": [3]}\n')
  options = ["--vocab-size", "8"]
  ngram.main(["train", str(rows), "--to", str(tmp_path / "own.arpa"), "--order", "5", *options,
              "--test", str(rows)])
  trained = read_arpa(tmp_path / "own.arpa")
  assert trained.order == 2 and "by 2-grams" in capsys.readouterr().out
  assert json.loads((tmp_path / "own.json").read_text())["order"] == 2
  # The same as another tool would write it.
  text = (tmp_path / "own.arpa").read_text()
  text = text.replace("\n\n\\1-", "\nngram 3=0\n\n\\1-").replace("\\end", "\\3-grams:\n\n\\end")
  path = str(tmp_path / "other.arpa")
  Path(path).write_text(text)
  tokens = join_sequences([np.asarray([2]), np.asarray([3])], 8)
  wanted = f"{trained.perplexity(tokens):,.2f}"
  ngram.main(["perplexity", path, str(rows), *options])
  out = capsys.readouterr().out
  assert wanted in out and "by 2-grams" in out and "by 3-grams" not in out
  ngram.main(["query", path, "2", *options])
  lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
  score = trained.score(join_sequences([np.asarray([2])], 8))[0][1]
  assert lines[2] == ["2", f"{score:.4f}", f"{math.exp(score):.3g}", "2"]
  ngram.main(["prune", path, "--to", str(tmp_path / "less.arpa"), "--threshold", "0", *options])
  assert read_arpa(tmp_path / "less.arpa").num_grams == trained.num_grams
  capsys.readouterr()
  ngram.main(["speed", path, str(rows), "--batches", "1", "--repeats", "1", *options])
  rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()][2:]
  assert [row[0] for row in rows] == ["1", "2"]


@pytest.mark.parametrize("arguments, message", [
    ("train {}/absent --to {}/new.arpa", "^source = '.*absent': allowed is a token cache, or"),
    ("train {}/vocabulary --to {}/new.arpa", "^file = .*cache.json"),
    ("train {}/broken.jsonl --to {}/new.arpa --vocab-size 9", "broken.jsonl:2 tokens = "),
    ("train {}/text.jsonl --to {}/new.arpa --vocab-size 9", "text.jsonl:1 = 'a line"),
    ("train {}/large.jsonl --to {}/new.arpa --vocab-size 9",
     "large.jsonl sequence 1 token = 999: allowed is 0 … 8, "),
    ("train {}/rows.jsonl --to {}/new.arpa", "^vocab_size = None: .*--vocab-size"),
    ("train {}/train --to {}/new.arpa --vocab-size 9", "^vocab_size = 9: allowed is at least 259"),
    ("train {}/train --to {}/new.arpa --vocab-size 0", "^vocab_size = 0"),
    ("train {}/train {}/other --to {}/new.arpa", "other vocabulary = 'other': allowed is bytes"),
    ("train {}/train --test {}/other --to {}/new.arpa", "other vocabulary = 'other'"),
    ("train {}/train --to {}/lm.arpa", "^to = '.*lm.arpa': allowed is a path where nothing"),
    ("train {}/train --to {}/lm.arpa.gz", "^to = '.*lm.json'"),
    ("train {}/train --to {}/absent/new.arpa", "^to = '.*absent/new.arpa': allowed is a path in"),
    ("train {}/train --to {}/new.arpa --order 6", "^order = 6: allowed is 1 … 5"),
    ("train {}/train --to {}/new.arpa --order 0", "^order = 0"),
    ("train {}/train --to {}/new.arpa --cutoffs 1 2", "^cutoffs = "),
    ("train {}/train --to {}/new.arpa --prune-to 5", "^n-grams = 5: allowed is 259 or more"),
    ("train {}/train --to {}/new.arpa --threshold -1", "^threshold = -1.0"),
    ("train {}/train --to {}/new.arpa --start-id 1", "start_id = 1"),
    ("train {}/train --to {}/new.arpa --eos-id 0", "eos_id = 0: allowed is 1, that of token cache"),
    ("train {}/train --to {}/new.arpa --eos-id 999", "eos_id = 999"),
    ("prune {}/lm.arpa --to {}/new.arpa", "^prune = None"),
    ("prune {}/lm.arpa --to {}/new.arpa --prune-to 5", "^n-grams = 5"),
    ("prune {}/lm.arpa --to {}/new.arpa --prune-to 300 --threshold 1", "^threshold = 1.0"),
    ("prune {}/lm.arpa --to {}/lm.arpa --prune-to 300", "^to = "),
    ("prune {}/absent.arpa --to {}/new.arpa --prune-to 300", "absent.arpa vocab_size = None"),
    ("prune {}/absent.arpa --to {}/new.arpa --prune-to 300 --vocab-size 9", "absent.arpa"),
    ("perplexity {}/lm.arpa {}/other", "lm.arpa vocabulary = 'bytes': allowed is other"),
    ("perplexity {}/lm.arpa {}/large.jsonl", "large.jsonl sequence 1 token = 999"),
    ("query {}/lm.arpa word", "^token = 'word': allowed is an id; for text add --vocabulary"),
    ("query {}/lm.arpa 999", "sequence 0 token = 999"),
    ("query {}/lm.arpa word --vocabulary {}/train", "^vocabulary = "),
    ("query {}/lm.arpa word --vocabulary bpd_jax/data/files/docstrings.model",
     "lm.arpa vocabulary = 'bytes': allowed is "),
    ("text {}/absent", "^source = "),
    ("speed {}/lm.arpa {}/test --batches 0", "^batch = 0"),
])
def test_bad_input_is_one_line_and_leaves_nothing(folder, arguments, message, monkeypatch):
  monkeypatch.chdir(ROOT)
  before = sorted(path.name for path in folder.rglob("*"))
  with pytest.raises(InputError, match=message) as caught:
    ngram.main([word.replace("{}", str(folder)) for word in arguments.split()])
  assert "\n" not in str(caught.value)
  assert sorted(path.name for path in folder.rglob("*")) == before


def test_the_command_is_quiet_and_ends_with_status_2(folder):
  def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bpd_jax.ngram", *arguments], cwd=ROOT, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )

  done = run("perplexity", str(folder / "lm.arpa"), str(folder / "absent"))
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
  assert done.stderr.startswith("error: source = '")
  done = run("perplexity", str(folder / "lm.arpa"), str(folder / "test"))
  assert (done.returncode, done.stderr) == (0, "")
