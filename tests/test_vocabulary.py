"""Vocabularies, and text in and out of a loaded model."""

import io
import json

import jax
import pytest
import sentencepiece

import bpd_jax
from bpd_jax.addons.folder import save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.errors import InputError
from bpd_jax.evaluation.scoring import NgramSource
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device
from bpd_jax.train import model_identity
from bpd_jax.vocabulary import (
    ByteVocabulary,
    load_vocabulary,
    SentencePieceVocabulary,
    vocabulary_path,
)

CONFIG = ModelConfig(
    vocab_size=384, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=2,
    num_decoder_layers=2,
)
HEADS = Heads(3, 16)


@pytest.fixture(scope="module")
def pieces():
  """The bytes of a small SentencePiece model."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([bpd_jax.__doc__, bpd_jax.Generator.generate.__doc__] * 20),
      model_writer=out, vocab_size=150, hard_vocab_limit=False, minloglevel=2,
      pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
  )
  return out.getvalue()


@pytest.fixture
def sentencepiece_file(tmp_path, pieces):
  path = tmp_path / "spiece.model"
  path.write_bytes(pieces)
  return path


@pytest.fixture
def byte_file(tmp_path):
  path = tmp_path / "tokenizer_config.json"
  path.write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
  return path


def test_sentencepiece_is_the_library_and_sentinels_come_last(sentencepiece_file):
  vocabulary = SentencePieceVocabulary(sentencepiece_file)
  plain = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
  size = plain.get_piece_size() + 100
  assert vocabulary.size == size
  assert vocabulary.encode("the tokens") == plain.encode("the tokens")
  assert vocabulary.decode(plain.encode("the tokens")) == "the tokens"
  ids = vocabulary.encode("the <extra_id_0> of <extra_id_99>")
  assert [i for i in ids if i >= size - 100] == [size - 1, size - 100]
  assert vocabulary.decode(ids) == "the<extra_id_0>of<extra_id_99>"
  assert vocabulary.decode([*plain.encode("the"), size + 3]) == "the"


def test_bytes_are_those_of_byt5():
  transformers = pytest.importorskip("transformers")
  tokenizer, vocabulary = transformers.ByT5Tokenizer(), ByteVocabulary()
  text = "naïve\n\ttext — 日本"
  assert vocabulary.encode(text) == tokenizer.encode(text, add_special_tokens=False)
  assert vocabulary.decode(vocabulary.encode(text)) == text
  assert vocabulary.decode([0, *vocabulary.encode("a"), 1, 300, 3 + 0xE6]) == "a"


def test_pieces_show_spaces_bytes_and_special_ids(sentencepiece_file):
  vocabulary = SentencePieceVocabulary(sentencepiece_file)
  size = vocabulary.size
  ids = vocabulary.encode("the tokens")
  assert "".join(map(vocabulary.piece, ids)) == "▁the▁tokens"
  assert [vocabulary.piece(i) for i in (0, 1, 2)] == ["<pad>", "</s>", "<unk>"]
  assert [vocabulary.piece(i) for i in (size - 1, size)] == ["<extra_id_0>", f"<{size}>"]
  pieces = [ByteVocabulary().piece(i) for i in (0, 1, 2, 3 + 0x20, 3 + 0x41, 3 + 0xC3, 259)]
  assert pieces == ["<pad>", "</s>", "<unk>", "▁", "A", "<0xC3>", "<259>"]


def test_folder_without_and_with_a_vocabulary(tmp_path, sentencepiece_file):
  assert load_vocabulary(tmp_path / "absent", 384) is None
  assert vocabulary_path(tmp_path) == sentencepiece_file
  with pytest.raises(InputError, match=r"spiece.model size = \d+: allowed is at most 20"):
    load_vocabulary(tmp_path, 20)
  sentencepiece_file.write_bytes(b"no pieces")
  with pytest.raises(InputError, match="allowed is a SentencePiece model file"):
    load_vocabulary(tmp_path, 384)


def test_other_tokenizer_configurations_are_no_vocabulary(tmp_path, byte_file):
  assert isinstance(load_vocabulary(tmp_path, 384), ByteVocabulary)
  for text in ('{"tokenizer_class": "T5Tokenizer"}', "[]", "{"):
    byte_file.write_text(text)
    assert load_vocabulary(tmp_path, 384) is None


@pytest.mark.parametrize("kind", ["sentencepiece_file", "byte_file"])
def test_loaded_model_takes_and_gives_text(tmp_path, kind, request):
  file = request.getfixturevalue(kind)
  params, own = (
      init(CONFIG, single_device(), jax.random.key(0)) for init in (init_params, HEADS.begin)
  )
  save_model_with(tmp_path / "model", CONFIG, params, file, HEADS, own)
  assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes()
  model = bpd_jax.load(tmp_path / "model")
  assert model.own_heads[0] == HEADS
  text = "the tokens of a block"
  out = model.generate([text, "a"], "blockwise", max_length=12, batch_size=2)
  by_id = model.generate([[*model.vocabulary.encode(text), 1]], "greedy", max_length=12,
                         batch_size=2)
  assert out.tokens[0].tolist() == by_id.tokens[0].tolist()
  assert len(out.texts) == 2 and all(isinstance(x, str) for x in out.texts)
  ids = [int(t) for t in out.tokens[0] if t > 1]
  assert out.texts[0] == model.vocabulary.decode(ids)


def test_load_says_what_is_wrong(tmp_path):
  with pytest.raises(InputError, match="model folder = .*: allowed is a folder that exists"):
    bpd_jax.load(tmp_path / "absent")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(InputError, match="python -m bpd_jax.import_checkpoint"):
    bpd_jax.load(tmp_path)


def test_references_beyond_the_embedding_table_are_refused():
  model = bpd_jax.Generator(CONFIG, None)
  with pytest.raises(InputError, match=r"references\[0\] token = 384: allowed is 0 … 383"):
    model.generate([[5, 1]], ReferenceDrafter(3), references=[[7, 384]])


def test_ngrams_of_another_start_or_end_are_refused(tmp_path):
  path = tmp_path / "one.arpa"
  path.write_text(
      "\\data\\\nngram 1=3\n\n\\1-grams:\n-99\t<s>\n-0.3\t</s>\n-0.3\t5\n\n\\end\\\n"
  )
  source = NgramSource(str(path))
  assert source.make(bpd_jax.Generator(CONFIG, None)).scorer.start_id == 0
  for changes, name in (({"start_id": 3}, "start_id"), ({"eos_id": 2}, "eos_id")):
    with pytest.raises(InputError, match=rf"one.arpa {name} = [01]: allowed is [23], the model"):
      source.make(bpd_jax.Generator(CONFIG.replace(**changes), None))


def test_configs_from_before_there_was_a_start_id():
  """Imports took a start that is padding, whatever id that was; their runs go on too."""
  fields = CONFIG.replace(pad_id=3, start_id=3).to_dict()
  del fields["start_id"]
  assert ModelConfig.from_dict(fields).start_id == 3
  assert "start_id" not in model_identity(ModelConfig.from_dict(fields))
  assert model_identity(CONFIG.replace(start_id=5))["start_id"] == 5
