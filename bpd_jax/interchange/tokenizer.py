"""A vocabulary as the files from which transformers' AutoTokenizer reads the same ids.

transformers reads a spiece.model as T5's: a unigram model with T5's normalisation and
special ids. Any other SentencePiece model becomes a tokenizer.json, whose ids are
compared with the model's own before anything is written.

Entry point: `transformers_files`.
"""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

import numpy as np

from bpd_jax.errors import InputError
from bpd_jax.folders import PathLike
from bpd_jax.model.config import ModelConfig
from bpd_jax.vocabulary import (
  ByteVocabulary,
  NUM_SENTINELS,
  read_vocabulary,
  SENTENCEPIECE_FILE,
  SentencePieceVocabulary,
  SETTINGS_FILE,
  TOKENIZER_FILE,
  TokenizerVocabulary,
)

UNIGRAM, BPE = 1, 2
CONTROL, USER_DEFINED = 3, 4
# Texts of random pieces on which a converted vocabulary must agree, beside each piece.
NUM_TEXTS = 500


def transformers_files(path: PathLike, config: ModelConfig) -> dict[str, bytes]:
  """What a folder of transformers needs for a vocabulary, by file name.

  Args:
    path: a SentencePiece model, a tokenizer.json, or ByT5's tokenizer_config.json.
    config: of the model, for its special ids.

  Raises:
    InputError: where the file can't be read, or no file gives transformers its ids.
  """
  path, vocabulary = Path(path), read_vocabulary(path)
  if isinstance(vocabulary, ByteVocabulary):
    return {SETTINGS_FILE: path.read_bytes()}
  if isinstance(vocabulary, TokenizerVocabulary):
    return {
        TOKENIZER_FILE: path.read_bytes(), SETTINGS_FILE: _settings(vocabulary, config)
    }
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.proto)
  if _is_t5s(proto, vocabulary, config):
    files = {SENTENCEPIECE_FILE: path.read_bytes()}
    if vocabulary.num_appended != NUM_SENTINELS:
      fields = {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.num_appended}
      files[SETTINGS_FILE] = _json(fields)
    return files
  tokenizer = _convert(proto, vocabulary, config, path)
  for text in _texts(proto, vocabulary):
    found = tokenizer.encode(text, add_special_tokens=False).ids
    if found != vocabulary.encode(text):
      raise InputError(
          f"vocabulary {path}", text[:40],
          f"texts that the tokenizers library splits alike; it makes {found[:8]} of "
          f"{vocabulary.encode(text)[:8]}",
      )
  content = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)
  return {
      TOKENIZER_FILE: content.encode("utf-8"), SETTINGS_FILE: _settings(vocabulary, config)
  }


def _is_t5s(proto: Any, vocabulary: SentencePieceVocabulary, config: ModelConfig) -> bool:
  """Whether transformers' T5Tokenizer reads a SentencePiece model as it is meant."""
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  special = {config.pad_id: "<pad>", config.eos_id: "</s>", 2: "<unk>"}
  symbols = {
      i for i, piece in enumerate(proto.pieces)
      if piece.type == USER_DEFINED and i not in vocabulary.sentinels
  }
  return (
      trainer.model_type == UNIGRAM
      and trainer.unk_id == 2
      and not trainer.byte_fallback
      and not trainer.treat_whitespace_as_suffix
      and normalizer.add_dummy_prefix
      and normalizer.remove_extra_whitespaces
      and bool(normalizer.precompiled_charsmap)
      and not symbols
      and all(
          i < len(proto.pieces) and proto.pieces[i].piece == piece for i, piece in special.items()
      )
  )


def _convert(
    proto: Any, vocabulary: SentencePieceVocabulary, config: ModelConfig, path: Path
) -> Any:
  """A SentencePiece model as a `tokenizers.Tokenizer`."""
  from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    processors,
    Regex,
    Tokenizer,
  )

  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  is_bytes = trainer.byte_fallback
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  if trainer.model_type == UNIGRAM:
    model = models.Unigram(pieces, trainer.unk_id, is_bytes)
  elif trainer.model_type == BPE:
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    model = models.BPE(
        ids, _merges(proto, ids), unk_token=pieces[trainer.unk_id][0], fuse_unk=True,
        byte_fallback=is_bytes,
    )
  else:
    raise InputError(f"vocabulary {path} model_type", trainer.model_type, "unigram or BPE")
  tokenizer = Tokenizer(model)
  steps, ends = [], []
  if normalizer.precompiled_charsmap:
    steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
  if normalizer.remove_extra_whitespaces:
    # Spaces alone: the library's own Strip takes line breaks too.
    steps += [
        normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")
    ]
  if normalizer.add_dummy_prefix:
    steps.append(normalizers.Prepend("▁"))
    ends.append(decoders.Strip(" ", 1, 0))
  tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
  tokenizer.decoder = decoders.Sequence([
      decoders.Replace("▁", " "), *([decoders.ByteFallback()] if is_bytes else []),
      decoders.Fuse(), *ends,
  ])
  # SentencePiece looks for its symbols after normalisation, and for sentinels nothing does.
  tokenizer.add_tokens([
      AddedToken(piece.piece, normalized=True, special=False)
      for piece in proto.pieces if piece.type == USER_DEFINED
  ])
  tokenizer.add_special_tokens([
      AddedToken(f"<extra_id_{i}>", normalized=False, special=True)
      for i in reversed(range(vocabulary.num_appended))
  ])
  end = vocabulary.piece(config.eos_id)
  tokenizer.post_processor = processors.TemplateProcessing(
      single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, config.eos_id)]
  )
  return tokenizer


def _merges(proto: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
  """Pairs of pieces that BPE joins, those of the best piece first."""
  is_joined = {piece.piece for piece in proto.pieces if piece.type == 1}
  pairs = [
      (word[:i], word[i:]) for word in is_joined for i in range(1, len(word))
      if word[:i] in is_joined and word[i:] in is_joined
  ]
  rank = lambda pair: (-proto.pieces[ids[pair[0] + pair[1]]].score, ids[pair[0]], ids[pair[1]])
  return sorted(pairs, key=rank)


def _texts(proto: Any, vocabulary: SentencePieceVocabulary) -> Iterator[str]:
  """Texts that show where two readings of a vocabulary differ."""
  pieces = [
      piece.piece.replace("▁", " ") for piece in proto.pieces if piece.type in (1, USER_DEFINED)
  ]
  yield from pieces
  rng = np.random.default_rng(0)
  rare = [" ", "  ", "\n", "\t", "é", "日", "ﬁ", "☃", "{", "}"]
  rare += [f"<extra_id_{i}>" for i in range(0, vocabulary.num_appended, 7)]
  for _ in range(NUM_TEXTS):
    words = [pieces[i] for i in rng.integers(len(pieces), size=12)]
    words += [rare[i] for i in rng.integers(len(rare), size=3)]
    yield "".join(words[i] for i in rng.permutation(len(words)))


def _settings(
    vocabulary: SentencePieceVocabulary | TokenizerVocabulary, config: ModelConfig
) -> bytes:
  """The tokenizer_config.json under which AutoTokenizer reads a tokenizer.json as it is."""
  return _json({
      "tokenizer_class": "PreTrainedTokenizerFast",
      "eos_token": vocabulary.piece(config.eos_id),
      "pad_token": vocabulary.piece(config.pad_id),
  })


def _json(fields: dict[str, Any]) -> bytes:
  return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
