"""Text to token ids and back: SentencePiece as T5 has it, or ByT5's bytes.

A vocabulary doesn't add EOS; who builds a row does. `load_vocabulary` finds the
one that lies in a model folder.
"""

from collections.abc import Iterable
import hashlib
import json
import os
from pathlib import Path
import re

from bpd_jax.errors import InputError
from bpd_jax.folders import local_path, PathLike

SENTENCEPIECE_FILE = "spiece.model"
BYTES_FILE = "tokenizer_config.json"
BYTES_CLASS = "ByT5Tokenizer"
NUM_SENTINELS = 100

_SENTINEL = re.compile(r"<extra_id_(\d{1,2})>")


class SentencePieceVocabulary:
  """A SentencePiece model followed by T5's 100 sentinels, `<extra_id_99>` … `<extra_id_0>`.

  Attributes:
    size: ids that text can become: pieces and sentinels.
    fingerprint: a hash of the model, the same for the same ids.
  """

  def __init__(self, path: PathLike):
    import sentencepiece

    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
    except (OSError, RuntimeError) as error:
      raise InputError("vocabulary", str(path), "a SentencePiece model file") from error
    self._num_pieces = self._model.get_piece_size()
    self.size = self._num_pieces + NUM_SENTINELS
    self.fingerprint = hashlib.sha256(self._model.serialized_model_proto()).hexdigest()[:16]

  def encode(self, text: str) -> list[int]:
    """Token ids of a text."""
    ids = []
    # Odd parts are the numbers of sentinels.
    for i, part in enumerate(_SENTINEL.split(text)):
      ids += [self.size - 1 - int(part)] if i % 2 else self._model.encode(part)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids; ids beyond the sentinels, which no text becomes, are left out."""
    texts, pieces = [], []
    for token in ids:
      if token < self._num_pieces:
        pieces.append(int(token))
      elif token < self.size:
        texts += [self._model.decode(pieces), f"<extra_id_{self.size - 1 - token}>"]
        pieces = []
    return "".join([*texts, self._model.decode(pieces)])

  def piece(self, token: int) -> str:
    """What one id stands for, "▁" for a space; special ids and bytes in angle brackets."""
    if token < self._num_pieces:
      return self._model.id_to_piece(int(token))
    return self.decode([token]) or f"<{token}>"


class ByteVocabulary:
  """ByT5's: a byte of UTF-8 is its value + 3, after padding, EOS and unknown.

  Attributes:
    size: ids that text can become, bytes and special ids.
    fingerprint: of every vocabulary of this kind.
  """

  fingerprint = "bytes"
  offset = 3
  size = 256 + 3

  def encode(self, text: str) -> list[int]:
    """Token ids of a text."""
    return [byte + self.offset for byte in text.encode("utf-8")]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids; ids that aren't bytes and bytes that aren't UTF-8 are left out."""
    data = bytes(token - self.offset for token in ids if self.offset <= token < self.size)
    return data.decode("utf-8", errors="ignore")

  def piece(self, token: int) -> str:
    """What one id stands for, "▁" for a space; special ids and bytes in angle brackets."""
    character = self.decode([token])
    if character:
      return character.replace(" ", "▁")
    names = ("<pad>", "</s>", "<unk>")
    if token < self.offset:
      return names[token]
    return f"<0x{token - self.offset:02X}>" if token < self.size else f"<{token}>"


Vocabulary = SentencePieceVocabulary | ByteVocabulary


def vocabulary_path(folder: PathLike) -> Path | None:
  """The file that holds a folder's vocabulary, None where it has none."""
  folder = local_path(folder)
  sentencepiece, byte = (folder / name for name in (SENTENCEPIECE_FILE, BYTES_FILE))
  if sentencepiece.is_file():
    return sentencepiece
  return byte if _is_bytes(byte) else None


def load_vocabulary(folder: PathLike, vocab_size: int) -> Vocabulary | None:
  """Reads a folder's vocabulary.

  Args:
    folder: a model folder.
    vocab_size: rows of the model's embedding table.

  Returns:
    The vocabulary, None where the folder has none.

  Raises:
    InputError: where the file can't be read or has more pieces than the model.
  """
  path = vocabulary_path(folder)
  return None if path is None else open_vocabulary(path, vocab_size)


def open_vocabulary(path: PathLike, vocab_size: int) -> Vocabulary:
  """Reads a vocabulary file for a model.

  Args:
    path: a SentencePiece model, or ByT5's tokenizer_config.json.
    vocab_size: rows of the model's embedding table.

  Raises:
    InputError: where the file can't be read or has more pieces than the model.
  """
  path = local_path(path, "vocabulary")
  if _is_bytes(path):
    vocabulary, num_ids = ByteVocabulary(), ByteVocabulary.size
  else:
    vocabulary = SentencePieceVocabulary(path)
    num_ids = vocabulary.size - NUM_SENTINELS
  if num_ids > vocab_size:
    raise InputError(f"{path} size", num_ids, f"at most {vocab_size}, the model's vocab_size")
  return vocabulary


def stored_name(path: PathLike) -> str:
  """The name that a vocabulary file gets in a model folder."""
  return BYTES_FILE if _is_bytes(local_path(path)) else SENTENCEPIECE_FILE


def _is_bytes(path: Path) -> bool:
  """Whether a file is a tokenizer configuration that asks for ByT5's bytes."""
  if path.suffix != ".json" or not path.is_file():
    return False
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    return False
  return isinstance(fields, dict) and fields.get("tokenizer_class") == BYTES_CLASS
