"""ARPA files: read back, by kenlm, as SRILM writes them, and every way to be wrong."""

import errno
import gzip
import json
import math
from pathlib import Path

import jax
import ngram_reference as reference
import numpy as np
import pytest

from bpd_jax.errors import InputError
from bpd_jax.ngram_lm import arpa, arrays
from bpd_jax.ngram_lm.backoff import BackOff, gram_tokens, join_sequences, LOG_ZERO
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.pruning import prune_to_count
from bpd_jax.ngram_lm.smoothing import katz, kneser_ney

TESTDATA = Path(__file__).parent / "testdata"
VOCAB = 40
# As SRILM writes them: weights of what isn't a context left out, orders of words by text.
SMALL = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-0.5\t</s>
-99\t<s>\t-0.25
-1.5\t<unk>
-0.75\t4\t-0.125
-1\t3

\\2-grams:
-0.1\t<s> 4
-0.2\t4 3
-0.3\t4 </s>

\\end\\
"""


def counted(order, seed=0, num=200):
  tokens = join_sequences(reference.random_sequences(seed, VOCAB, num), VOCAB)
  return count_grams(tokens, order, VOCAB)


def models():
  yield kneser_ney(counted(4), (1, 1, 1, 1))
  yield katz(counted(3), (1, 1, 2))
  yield prune_to_count(kneser_ney(counted(5), (1, 1, 1, 1, 1)), 300)
  yield katz(counted(2))


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_what_is_written_is_read(tmp_path, name, monkeypatch):
  monkeypatch.setattr(arpa, "READ_CHUNK", 7)
  monkeypatch.setattr(arpa, "CHUNK", 11)
  for model in [*models(), kneser_ney(counted(1))]:
    arpa.write_arpa(tmp_path / name, model, {"vocabulary": "abc"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "lm.json"])
    info = json.loads((tmp_path / "lm.json").read_text())
    assert info == {
        "order": model.order, "num_grams": model.num_grams, "vocab_size": VOCAB,
        "start_id": 0, "eos_id": 1, "vocabulary": "abc",
    }
    found = arpa.read_arpa(tmp_path / name)
    for n in range(model.order):
      for field in ("context", "token", "suffix"):
        np.testing.assert_array_equal(
            getattr(found.orders[n], field), getattr(model.orders[n], field)
        )
      np.testing.assert_allclose(found.log_probs[n], model.log_probs[n], atol=2e-7)
      np.testing.assert_allclose(found.back_offs[n], model.back_offs[n], atol=2e-7)
    slow = reference.Dictionary(found)
    for history in [(), (0,), (2,), (0, 2), (5, 3, 2)]:
      assert slow.probs(history).sum() == pytest.approx(1, abs=1e-6)


def test_a_file_of_other_tools_is_read(tmp_path):
  path = tmp_path / "small.arpa"
  path.write_text("written by hand\n\n" + SMALL.replace("\\1-", "\n\n\\1-"))
  model = arpa.read_arpa(path, 6)
  ln = math.log(10)
  # Id 2 and 5 aren't listed: <unk>.
  wanted = np.asarray([LOG_ZERO / ln, -0.5, -1.5, -1, -0.75, -1.5])
  np.testing.assert_allclose(model.log_probs[0] / ln, wanted)
  assert (model.back_offs[0] / ln).tolist() == pytest.approx([-0.25, 0, 0, 0, -0.125, 0])
  assert gram_tokens(model.orders, 2).T.tolist() == [[0, 4], [4, 1], [4, 3]]
  assert (model.log_probs[1] / ln).tolist() == pytest.approx([-0.1, -0.3, -0.2])
  history = np.asarray([[[0], [4], [5], [-1]]], np.int32)
  scores = jax.jit(arrays.log_probs)(
      arrays.device_arrays(model), history, np.arange(6, dtype=np.int32)[None]
  )[0] / ln
  np.testing.assert_allclose(scores[0], [*(wanted - 0.25)[:4], -0.1, -1.75], rtol=1e-6)
  np.testing.assert_allclose(scores[1], [-99.125, -0.3, -1.625, -0.2, -0.875, -1.625], rtol=1e-6)
  np.testing.assert_allclose(scores[2:], [wanted, wanted], rtol=1e-6)
  # Without <unk>, with other special ids.
  path.write_text(SMALL.replace("-1.5\t<unk>\n", "").replace("1=5", "1=4"))
  model = arpa.read_arpa(path, 6, start_id=5, eos_id=2)
  assert (model.log_probs[0] / ln).tolist() == pytest.approx([-99, -99, -0.5, -1, -0.75, -99])
  assert (model.start_id, model.eos_id) == (5, 2)


@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize("empty, order", [((3,), 2), ((3, 4), 2), ((2, 3), 1), ((1, 2), 1)])
def test_an_empty_top_order_is_no_order(tmp_path, empty, order, is_zipped):
  # Orders below have weights then, which lead nowhere.
  text = SMALL.replace("-0.1\t<s> 4", "-0.1\t<s> 4\t-0.5")
  for n in empty:
    if n > 2:
      text = text.replace("\n\n\\1-", f"\nngram {n}=0\n\n\\1-")
      text = text.replace("\\end", f"\\{n}-grams:\n\n\\end")
    else:
      before, header, after = text.partition(f"\\{n}-grams:\n")
      text = before + header + "\n" + after.partition("\n\n")[2]
      text = text.replace(f"ngram {n}={5 if n == 1 else 3}", f"ngram {n}=0")
  path = tmp_path / "lm.arpa"
  path.write_bytes(gzip.compress(text.encode()) if is_zipped else text.encode())
  model = arpa.read_arpa(path, 6)
  assert model.order == order == len(model.log_probs) == len(model.back_offs)
  assert not model.back_offs[-1].any()
  tokens = join_sequences([[4, 3, 4], [4], [3, 5]], 6)
  scores, used = model.score(tokens)
  slow = reference.Dictionary(model)
  for end in range(len(tokens)):
    if tokens[end] == 0:
      continue
    start = max(i for i in range(end) if tokens[i] == 0)
    probs = slow.probs(tuple(tokens[start:end].tolist()))
    assert scores[end] == pytest.approx(math.log(probs[tokens[end]]))
  assert used[tokens != 0].max() == order
  np.testing.assert_allclose(device_scores(model, tokens), scores[tokens != 0], rtol=1e-5)
  # Written, it is a file that every tool reads.
  arpa.write_arpa(tmp_path / "again.arpa", model, {})
  assert f"ngram {order + 1}=" not in (tmp_path / "again.arpa").read_text()
  assert arpa.read_arpa(tmp_path / "again.arpa").order == order


@pytest.mark.parametrize("old, new, line, message", [
    ("-0.2\t4 3", "-0.2\t4", 14, r"'-0.2\\t4': allowed is a log10 probability, 2 words"),
    ("-0.2\t4 3", "-0.2\t4 3\t-1", 14, "allowed is a log10 probability, 2 words$"),
    ("-0.75\t4\t-0.125", "-0.75\t4\t-0.125\t1", 9, "2 words|a back-off weight or none"),
    ("-0.2\t4 3", "-0.2\t4 6", 14, "'6': allowed is an id from 0 to 5 but 0 and 1, which are <s>"),
    ("-0.2\t4 3", "-0.2\t4 03", 14, "'03'"),
    ("-0.2\t4 3", "-0.2\t4 3.0", 14, "'3.0'"),
    ("-0.2\t4 3", "-0.2\t4 the", 14, "'the'"),
    ("-0.2\t4 3", "-0.2\t4 0", 14, "'0'"),
    ("-0.2\t4 3", "-0.2\t4 1", 14, "'1'"),
    ("-0.2\t4 3", "-0.2\t4 <unk>", 14, "'<unk>'"),
    ("-0.2\t4 3", "nan\t4 3", 14, "'nan': allowed is a finite number, at most 0"),
    ("-0.2\t4 3", "-inf\t4 3", 14, "'-inf'"),
    ("-0.2\t4 3", "0.2\t4 3", 14, "'0.2'"),
    ("-0.2\t4 3", "x\t4 3", 14, "'x'"),
    ("-0.25", "inf", 7, "'inf': allowed is a finite number$"),
    ("-0.2\t4 3", "-0.2\t4 </s>", 15, r"'-0.3\\t4 </s>': allowed is an n-gram that isn't there"),
    ("-1\t3", "-1\t4", 10, r"'-1\\t4': allowed is an id that isn't there yet"),
    ("-1\t3", "-1\t<unk>", 10, "allowed is an id that isn't there yet"),
    ("2=3", "2=2", 15, r"allowed is \\end\\, after as many lines as"),
    ("2=3", "2=4", 16, "'': allowed is a 2-gram, as .* says that there are more"),
    ("1=5", "1=4", 10, r"allowed is \\2-grams:, after as many"),
    ("1=5", "1=6", 11, "'': allowed is a 1-gram, as"),
    ("ngram 2=3", "ngram 3=3", 3, "allowed is ngram 2=COUNT"),
    ("ngram 2=3", "ngram 2=-3", 3, "allowed is ngram 2=COUNT"),
    ("\\2-grams:", "\\3-grams:", 12, r"allowed is \\2-grams:"),
    ("\n\\end\\\n", "", 15, "'end of file': allowed is more lines, up to"),
    ("-0.3\t4 </s>\n\n\\end\\\n", "", 14, "'end of file': allowed is 1 more 2-grams"),
    ("\\data\\", "data", 17, r"None: allowed is \\data\\"),
    (SMALL, "", 0, "None"),
])
@pytest.mark.parametrize("is_zipped", [False, True])
def test_a_file_that_is_wrong_is_named_with_its_line(
    tmp_path, old, new, line, message, is_zipped
):
  assert SMALL.count(old) == 1
  text = SMALL.replace(old, new)
  path = tmp_path / "small.arpa"
  path.write_bytes(gzip.compress(text.encode()) if is_zipped else text.encode())
  with pytest.raises(InputError, match=message) as caught:
    arpa.read_arpa(path, 6)
  assert str(caught.value).startswith(f"{path}:{line} = ") and "\n" not in str(caught.value)


def test_ngrams_whose_context_is_not_there_are_named(tmp_path):
  path = tmp_path / "lm.arpa"
  arpa.write_arpa(path, kneser_ney(counted(4), (1, 1, 1, 1)), {})
  lines = path.read_text().splitlines(keepends=True)
  begin = lines.index("\\3-grams:\n")
  gone = next(i for i in range(begin + 1, len(lines)) if lines[i].split()[1:4] == ["<s>", "2", "2"])
  number = int(lines[3].partition("=")[2])
  lines[3] = f"ngram 3={number - 1}\n"
  del lines[gone]
  path.write_text("".join(lines))
  first = next(i for i, line in enumerate(lines) if line.split()[1:4] == ["<s>", "2", "2"])
  with pytest.raises(InputError, match=f"lm.arpa:{first + 1} = .* one of the 3-grams first"):
    arpa.read_arpa(path)


@pytest.mark.parametrize("cut", [10, -3, -9])
def test_half_a_gzip_file_is_refused(tmp_path, cut):
  path = tmp_path / "small.arpa.gz"
  path.write_bytes(gzip.compress(SMALL.encode())[:cut])
  with pytest.raises(InputError, match="^file = .*small.arpa.gz.* a gzip file that is whole"):
    arpa.read_arpa(path, 6)


def test_files_that_are_not_text_are_named(tmp_path):
  path = tmp_path / "small.arpa"
  with pytest.raises(InputError, match="^file = .*small.arpa.*No such file"):
    arpa.read_arpa(path, 6)
  path.write_bytes(b"\xff\xfe" + SMALL.encode())
  with pytest.raises(InputError, match="^file = .*small.arpa.* UTF-8 text"):
    arpa.read_arpa(path, 6)
  with pytest.raises(InputError, match="^file = .*absent/lm.arpa.*No such file"):
    arpa.write_arpa(tmp_path / "absent" / "lm.arpa", kneser_ney(counted(2)), {})


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_file_that_is_not_finished_leaves_nothing(tmp_path, monkeypatch, error):
  def stop(*arguments):
    raise error

  monkeypatch.setattr(arpa, "write_object", stop)
  expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
  with pytest.raises(expected, match="lm.arpa.*No space left" if expected is InputError else None):
    arpa.write_arpa(tmp_path / "lm.arpa", kneser_ney(counted(2)), {})
  assert not list(tmp_path.iterdir())
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="file/lm.arpa.*Not a directory"):
    arpa.write_arpa(tmp_path / "file" / "lm.arpa", kneser_ney(counted(2)), {})


def test_what_the_json_says_counts(tmp_path):
  path = tmp_path / "small.arpa"
  path.write_text(SMALL)
  with pytest.raises(InputError, match="small.arpa vocab_size = None: .* no .*small.json"):
    arpa.read_arpa(path)
  assert arpa.info_path(tmp_path / "small.arpa.gz") == arpa.info_path(path)
  info = {"vocab_size": 6, "start_id": 0, "eos_id": 1, "vocabulary": "abc"}
  beside = tmp_path / "small.json"
  beside.write_text(json.dumps(info))
  assert arpa.read_arpa(path, vocabulary="abc").vocab_size == 6
  assert arpa.read_arpa(path, 9).vocab_size == 9
  with pytest.raises(InputError, match="small.arpa vocabulary = 'abc': allowed is xyz, whose"):
    arpa.read_arpa(path, vocabulary="xyz")
  with pytest.raises(InputError, match="small.arpa eos_id = 1: allowed is 3"):
    arpa.read_arpa(path, eos_id=3)
  beside.write_text(json.dumps(info | {"start_id": "0"}))
  with pytest.raises(InputError, match="small.json start_id = '0'"):
    arpa.read_arpa(path)
  beside.write_text("[]")
  with pytest.raises(InputError, match="small.json"):
    arpa.read_arpa(path)


def test_kneser_ney_is_lmplzs():
  """testdata/lmplz.arpa.gz is by lmplz of kenlm 0.3.0, from these sequences as lines.

  lmplz -o 3 --discount_fallback --prune 0 0 1. To be made again when the sequences are
  others, and then with one id that doesn't occur, which lmplz has as <unk>.
  """
  found = arpa.read_arpa(TESTDATA / "lmplz.arpa.gz", 24)
  sequences = [x[x != 23] for x in reference.random_sequences(0, 24, 120)]
  model = kneser_ney(count_grams(join_sequences(sequences, 24), 3, 24), (1, 1, 2))
  for n in range(3):
    np.testing.assert_array_equal(found.orders[n].keys, model.orders[n].keys)
    np.testing.assert_allclose(found.log_probs[n], model.log_probs[n], atol=1e-6)
    np.testing.assert_allclose(found.back_offs[n], model.back_offs[n], atol=1e-6)


def kenlm_scores(path, sequences):
  kenlm = pytest.importorskip("kenlm")
  config = kenlm.Config()
  config.show_progress = False
  model = kenlm.Model(str(path), config)
  texts = [" ".join(map(str, sequence)) for sequence in sequences]
  return np.asarray([x[0] for text in texts for x in model.full_scores(text)]) * math.log(10)


def device_scores(model: BackOff, tokens):
  """Of every token of joined sequences but the starts, by the device form."""
  is_start = tokens == model.start_id
  number = np.cumsum(is_start)
  history = np.full([len(tokens), 1, model.order - 1], -1, np.int32)
  for back in range(1, model.order):
    is_same = number[back:] == number[:-back]
    history[back:, 0, -back] = np.where(is_same, tokens[:-back], -1)
  scores = jax.jit(arrays.log_probs)(arrays.device_arrays(model), history, tokens[:, None])
  return np.asarray(scores)[~is_start, 0, 0]


def test_every_token_of_new_text_scores_as_in_kenlm(tmp_path):
  # Also ids that the counts never saw, and sequences without tokens.
  sequences = [*reference.random_sequences(9, VOCAB, 200), np.asarray([VOCAB - 1] * 5)]
  tokens = join_sequences(sequences, VOCAB)
  for model in models():
    arpa.write_arpa(tmp_path / "lm.arpa", model, {})
    wanted = kenlm_scores(tmp_path / "lm.arpa", sequences)
    scores, _ = model.score(tokens)
    np.testing.assert_allclose(scores[tokens != 0], wanted, atol=1e-5)
    np.testing.assert_allclose(device_scores(model, tokens), wanted, atol=1e-5)


def test_a_file_of_other_tools_scores_as_in_kenlm(tmp_path):
  path = tmp_path / "small.arpa"
  path.write_text(SMALL)
  sequences = [[4, 3, 4], [4, 5, 2], [], [3, 3, 4]]
  tokens = join_sequences(sequences, 6)
  wanted = kenlm_scores(path, sequences)
  np.testing.assert_allclose(device_scores(arpa.read_arpa(path, 6), tokens), wanted, atol=1e-5)
