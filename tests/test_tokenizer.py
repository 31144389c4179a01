"""Vocabularies have the ids that transformers' AutoTokenizer has, read, imported and exported."""

import json

import pytest

transformers = pytest.importorskip("transformers")

from pieces import text_rows, train_pieces, with_sentinels

from bpd_jax.data import rows
from bpd_jax.errors import InputError
from bpd_jax.interchange.tokenizer import transformers_files
from bpd_jax.model.config import ModelConfig
from bpd_jax.vocabulary import (
    check_added_tokens,
    copy_vocabulary,
    load_vocabulary,
    open_vocabulary,
    read_vocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    vocabulary_path,
)

TEXTS = [
    "walks in <extra_id_0> park", "the <extra_id_0> of a <extra_id_1>.", "  two  spaces ",
    "no model of é 日 ☃ ﬁ", "line\nbreaks\tand { braces }", *text_rows()[:40],
]


@pytest.fixture
def unigram(tmp_path):
  """A folder of transformers with a spiece.model of T5's kind."""
  (tmp_path / "spiece.model").write_bytes(train_pieces(300))
  write_config(tmp_path)
  return tmp_path


def write_config(folder, **fields):
  (folder / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 512} | fields))


def write_files(folder, path, config):
  """A folder as export makes it."""
  folder.mkdir()
  write_config(folder)
  for name, content in transformers_files(path, config).items():
    (folder / name).write_bytes(content)
  return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same_ids(vocabulary, tokenizer, texts=TEXTS):
  for text in texts:
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert vocabulary.encode(text) == expected, text


def test_t5s_pieces_are_read_alike(unigram):
  tokenizer = transformers.AutoTokenizer.from_pretrained(unigram)
  vocabulary = load_vocabulary(unigram, 512)
  assert_same_ids(vocabulary, tokenizer)
  assert vocabulary.sentinels == tuple(399 - i for i in range(100))
  assert vocabulary.sentinels[3] == tokenizer.convert_tokens_to_ids("<extra_id_3>")


def test_sentinels_among_the_pieces_are_the_vocabularys(unigram):
  """mT5's model ends with `▁<extra_id_99>` … `▁<extra_id_0>`, and nothing follows it."""
  path = unigram / "spiece.model"
  plain = SentencePieceVocabulary(path)
  path.write_bytes(with_sentinels(path.read_bytes()))
  assert load_vocabulary(unigram, 512).size == 400
  assert_same_ids(
      load_vocabulary(unigram, 512), transformers.AutoTokenizer.from_pretrained(unigram)
  )
  (unigram / "tokenizer_config.json").write_text(
      json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
  )
  vocabulary = load_vocabulary(unigram, 512)
  assert vocabulary.size == 400 and vocabulary.sentinels == tuple(399 - i for i in range(100))
  ids = vocabulary.encode("walks in <extra_id_0> park")
  assert 399 in ids and max(ids) == 399
  assert "<extra_id_0>" in vocabulary.decode(ids)
  assert vocabulary.fingerprint != plain.fingerprint
  assert_same_ids(vocabulary, transformers.AutoTokenizer.from_pretrained(unigram))
  exported = write_files(unigram / "out", path, ModelConfig(vocab_size=512))
  assert_same_ids(vocabulary, exported)


def test_folder_without_sentinels(unigram):
  """MADLAD-400's table has a row for each piece and none for sentinels."""
  (unigram / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
  vocabulary = open_vocabulary(unigram / "spiece.model", 300, has_sentinels=True)
  assert (vocabulary.size, vocabulary.sentinels) == (300, ())
  assert max(vocabulary.encode("a <extra_id_0> b")) < 300
  (unigram / "model").mkdir()
  copy_vocabulary(unigram / "spiece.model", unigram / "model")
  copied = load_vocabulary(unigram / "model", 300)
  assert (copied.size, copied.fingerprint) == (300, vocabulary.fingerprint)
  (unigram / "tokenizer_config.json").write_text(json.dumps({"extra_ids": "0"}))
  with pytest.raises(InputError, match="extra_ids = '0': allowed is 0 … 100"):
    load_vocabulary(unigram, 512)


def test_model_has_a_row_for_each_sentinel_that_training_may_meet(unigram):
  path = unigram / "spiece.model"
  assert open_vocabulary(path, 300).size == 400
  with pytest.raises(InputError, match="vocab_size = 300: allowed is at least 400, 300 pieces"):
    open_vocabulary(path, 300, has_sentinels=True)
  with pytest.raises(InputError, match="size = 400: allowed is at most 299"):
    open_vocabulary(path, 299, has_sentinels=True)


def test_tokenizer_json_alone(unigram, tmp_path):
  """What transformers 5 saves."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(unigram)
  tokenizer.save_pretrained(tmp_path / "saved")
  assert not (tmp_path / "saved" / "spiece.model").exists()
  vocabulary = load_vocabulary(tmp_path / "saved", 512)
  assert isinstance(vocabulary, TokenizerVocabulary)
  assert (vocabulary.size, vocabulary.eos_id) == (400, 1)
  assert vocabulary.sentinels == tuple(399 - i for i in range(100))
  assert_same_ids(vocabulary, tokenizer)
  text = "the tokens of a block"
  assert vocabulary.decode(vocabulary.encode(text)) == text
  (tmp_path / "model").mkdir()
  copy_vocabulary(vocabulary_path(tmp_path / "saved"), tmp_path / "model")
  assert load_vocabulary(tmp_path / "model", 512).fingerprint == vocabulary.fingerprint
  exported = write_files(
      tmp_path / "out", tmp_path / "model" / "tokenizer.json", ModelConfig(vocab_size=512)
  )
  assert_same_ids(vocabulary, exported)
  assert exported.encode(text) == [*vocabulary.encode(text), 1]
  with pytest.raises(InputError, match="size = 400: allowed is at most 399"):
    load_vocabulary(tmp_path / "saved", 399)


def test_added_tokens_are_read_or_refused(unigram, tmp_path):
  tokenizer = transformers.AutoTokenizer.from_pretrained(unigram)
  tokenizer.save_pretrained(tmp_path / "plain")
  (unigram / "tokenizer.json").write_bytes((tmp_path / "plain" / "tokenizer.json").read_bytes())
  # A tokenizer.json that says no more than the SentencePiece model changes nothing.
  assert vocabulary_path(unigram).name == "spiece.model"
  check_added_tokens(unigram, load_vocabulary(unigram, 512))
  tokenizer.add_tokens(["{", "}", "⏎"])
  tokenizer.save_pretrained(unigram)
  assert vocabulary_path(unigram).name == "tokenizer.json"
  vocabulary = load_vocabulary(unigram, 512)
  assert_same_ids(vocabulary, tokenizer, [*TEXTS, "the { value }", "a⏎b"])
  ids = vocabulary.encode("the { value }")
  assert {400, 401} <= {*ids}
  assert "{" in vocabulary.decode(ids) and "⁇" not in vocabulary.decode(ids)
  check_added_tokens(unigram, vocabulary)
  # What transformers 4's slow tokenizer saves has the tokens in another file alone.
  (unigram / "tokenizer.json").unlink()
  (unigram / "tokenizer_config.json").unlink()
  (unigram / "added_tokens.json").write_text(json.dumps({"{": 400, "<extra_id_0>": 399}))
  with pytest.raises(InputError, match=r"added tokens = \['\{'\]: allowed is those of a tok"):
    check_added_tokens(unigram, load_vocabulary(unigram, 512))


def test_tokens_added_to_bytes_are_refused(tmp_path):
  transformers.ByT5Tokenizer().save_pretrained(tmp_path)
  bytes_alone = load_vocabulary(tmp_path, 384)
  check_added_tokens(tmp_path, bytes_alone)
  tokenizer = transformers.ByT5Tokenizer.from_pretrained(tmp_path)
  tokenizer.add_tokens(["NEWTOK"])
  tokenizer.save_pretrained(tmp_path)
  with pytest.raises(InputError, match=r"added tokens = \['NEWTOK'\]: allowed is those of a tok"):
    check_added_tokens(tmp_path, bytes_alone)


def test_padding_beyond_the_pieces_is_no_t5s(unigram, tmp_path):
  config = ModelConfig(vocab_size=512, pad_id=450)
  files = transformers_files(unigram / "spiece.model", config)
  assert "spiece.model" not in files


def test_bad_files_are_one_line(unigram):
  path = unigram / "spiece.model"
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 791656\n")
  with pytest.raises(InputError, match="spiece.model'.*git-LFS pointer, for `git lfs pull`"):
    load_vocabulary(unigram, 512)
  path.rename(unigram / "tokenizer.json")
  with pytest.raises(InputError, match="tokenizer.json'.*git-LFS pointer"):
    load_vocabulary(unigram, 512)
  (unigram / "tokenizer.json").write_text('{"model": 3}')
  with pytest.raises(InputError, match="tokenizer.json': allowed is a tokenizer.json"):
    load_vocabulary(unigram, 512)


def test_shipped_byte_pairs_are_exported_alike(tmp_path):
  vocabulary = SentencePieceVocabulary(rows.VOCABULARY_FILE)
  exported = write_files(tmp_path / "out", rows.VOCABULARY_FILE, ModelConfig(vocab_size=4096))
  texts = [row["inputs"] for task in rows.TASKS for row in rows.load_rows(task)[:20]]
  assert_same_ids(vocabulary, exported, [*TEXTS, *texts])
  assert exported.encode("a") == [*vocabulary.encode("a"), 1]
  ids = vocabulary.encode(texts[0])
  assert exported.decode(ids) == texts[0] == vocabulary.decode(ids)
  assert (exported.pad_token_id, exported.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"model_type": "bpe", "byte_fallback": True, "vocab_size": 600},
        {"normalization_rule_name": "identity"},
        {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    ],
)
def test_other_pieces_are_exported_alike(tmp_path, options):
  path = tmp_path / "spiece.model"
  path.write_bytes(train_pieces(**({"vocab_size": 300} | options)))
  exported = write_files(tmp_path / "out", path, ModelConfig(vocab_size=1024))
  assert_same_ids(read_vocabulary(path), exported)


def test_ids_that_no_file_gives_transformers_are_refused(tmp_path):
  """Whole words, and symbols after a space that SentencePiece puts before a text."""
  path = tmp_path / "spiece.model"
  path.write_bytes(train_pieces(300, user_defined_symbols=["{", "}"]))
  with pytest.raises(InputError, match="= '{': allowed is texts that the tokenizers library"):
    transformers_files(path, ModelConfig(vocab_size=1024))
  path.write_bytes(train_pieces(60, model_type="word"))
  with pytest.raises(InputError, match="model_type = 3: allowed is unigram or BPE"):
    transformers_files(path, ModelConfig(vocab_size=1024))
