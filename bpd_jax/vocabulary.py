"""Text to token ids and back: SentencePiece as T5 has it, `tokenizer.json`, or ByT5's bytes.

A vocabulary doesn't add EOS; who builds a row does. `load_vocabulary` finds the
one that lies in a model folder, or in a folder of transformers.
"""

from collections.abc import Iterable
import contextlib
import hashlib
import json
import os
from pathlib import Path
import re
import shutil
from typing import Any

from bpd_jax.errors import brief, InputError
from bpd_jax.folders import local_path, PathLike

SENTENCEPIECE_FILE = "spiece.model"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
BYTES_CLASS = "ByT5Tokenizer"
NUM_SENTINELS = 100

_SENTINEL = re.compile(r"<extra_id_(\d{1,2})>")
_LFS_POINTER = b"version https://git-lfs"


class SentencePieceVocabulary:
  """A SentencePiece model, with T5's sentinels `<extra_id_99>` … `<extra_id_0>`.

  T5's 100 follow the pieces. A model that holds them as pieces, as mT5's does, gets no
  others; nor does one beside which a tokenizer_config.json says `"extra_ids": 0`.

  Attributes:
    size: ids that text can become: pieces and sentinels.
    num_pieces: of the model, in which mT5's sentinels are.
    sentinels: the id of each `<extra_id_i>`, by i.
    eos_id: the model's own, 1 where it has none.
    fingerprint: a hash of the model, the same for the same ids.
  """

  def __init__(self, path: PathLike):
    import sentencepiece

    _check_fetched(path, "a SentencePiece model file")
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
    except (OSError, RuntimeError) as error:
      raise InputError("vocabulary", str(path), "a SentencePiece model file") from error
    self.num_pieces = self._model.get_piece_size()
    self.sentinels = _sentinels(self._piece_id)
    self.num_appended = 0 if self.sentinels else _extra_ids(Path(path).parent / SETTINGS_FILE)
    self.size = self.num_pieces + self.num_appended
    self.sentinels += tuple(self.size - 1 - i for i in range(self.num_appended))
    self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else 1
    content = self._model.serialized_model_proto()
    if self.num_appended != NUM_SENTINELS:
      # The same model with 100 sentinels behind it has other ids for them.
      content += f" and {self.num_appended} sentinels".encode()
    self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

  @property
  def proto(self) -> bytes:
    """The content of the model's file."""
    return self._model.serialized_model_proto()

  def encode(self, text: str) -> list[int]:
    """Token ids of a text."""
    if not self.num_appended:
      return self._model.encode(text)
    ids = []
    # Odd parts are the numbers of sentinels.
    for i, part in enumerate(_SENTINEL.split(text)):
      if i % 2 == 0:
        ids += self._model.encode(part)
      elif int(part) < self.num_appended:
        ids.append(self.sentinels[int(part)])
      else:
        ids += self._model.encode(f"<extra_id_{part}>")
    return ids

  def token_id(self, token: str) -> int | None:
    """The id of a piece or sentinel; None where it has none."""
    match = _SENTINEL.fullmatch(token)
    if match and int(match[1]) < len(self.sentinels):
      return self.sentinels[int(match[1])]
    return self._piece_id(token)

  def _piece_id(self, piece: str) -> int | None:
    token = self._model.piece_to_id(piece)
    return token if self._model.id_to_piece(token) == piece else None

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids; ids beyond the sentinels, which no text becomes, are left out."""
    texts, pieces = [], []
    for token in ids:
      if token < self.num_pieces:
        pieces.append(int(token))
      elif token < self.size:
        texts += [self._model.decode(pieces), f"<extra_id_{self.size - 1 - token}>"]
        pieces = []
    return "".join([*texts, self._model.decode(pieces)])

  def piece(self, token: int) -> str:
    """What one id stands for, "▁" for a space; special ids and bytes in angle brackets."""
    if token < self.num_pieces:
      return self._model.id_to_piece(int(token))
    return self.decode([token]) or f"<{token}>"


class TokenizerVocabulary:
  """What the `tokenizers` library reads from a tokenizer.json, added tokens included.

  Attributes:
    size: ids up to the largest.
    sentinels: the id of each `<extra_id_i>`, by i.
    eos_id: what its post-processor ends a text with, else that of `</s>`, else 1.
    fingerprint: a hash of what the file says.
  """

  def __init__(self, path: PathLike):
    import tokenizers

    _check_fetched(path, "a tokenizer.json")
    try:
      content = json.loads(Path(path).read_text(encoding="utf-8"))
      self._model = tokenizers.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # The library raises a bare Exception.
      raise InputError(
          "vocabulary", str(path), f"a tokenizer.json ({brief(error)})"
      ) from error
    # A folder may have been saved with those of some batch.
    self._model.no_padding()
    self._model.no_truncation()
    content = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
    self.size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
    self.sentinels = _sentinels(self._model.token_to_id)
    ends = self._model.encode("", add_special_tokens=True).ids
    end = ends[-1] if ends else self._model.token_to_id("</s>")
    self.eos_id = 1 if end is None else end
    text = json.dumps(content, sort_keys=True).encode("utf-8")
    self.fingerprint = hashlib.sha256(text).hexdigest()[:16]

  def encode(self, text: str) -> list[int]:
    """Token ids of a text."""
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids; ids beyond the vocabulary are left out."""
    known = [int(token) for token in ids if token < self.size]
    return self._model.decode(known, skip_special_tokens=False)

  def piece(self, token: int) -> str:
    """What one id stands for, as the file has it."""
    return self._model.id_to_token(int(token)) or f"<{token}>"

  def token_id(self, token: str) -> int | None:
    """The id of a token; None where it has none."""
    return self._model.token_to_id(token)


class ByteVocabulary:
  """ByT5's: a byte of UTF-8 is its value + 3, after padding, EOS and unknown.

  Attributes:
    size: ids that text can become, bytes and special ids.
    sentinels: the last byte values, which span corruption takes for them as ByT5 did (Xue
      et al. 2022, §3.1); no text becomes one.
    eos_id: 1.
    fingerprint: of every vocabulary of this kind.
  """

  fingerprint = "bytes"
  offset = 3
  size = 256 + 3
  sentinels = tuple(range(size - 1, size - 1 - NUM_SENTINELS, -1))
  eos_id = 1

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

  def token_id(self, token: str) -> int | None:
    """The id of a byte's character; None of anything else."""
    data = token.encode("utf-8")
    return data[0] + self.offset if len(data) == 1 else None


Vocabulary = SentencePieceVocabulary | TokenizerVocabulary | ByteVocabulary


def vocabulary_path(folder: PathLike) -> Path | None:
  """The file that holds a folder's vocabulary, None where it has none.

  A folder of transformers may have a spiece.model and a tokenizer.json. transformers
  reads the second; so does this where they differ, as after tokens were added.
  """
  folder = local_path(folder)
  pieces, tokenizer, settings = (
      folder / name for name in (SENTENCEPIECE_FILE, TOKENIZER_FILE, SETTINGS_FILE)
  )
  if pieces.is_file():
    if tokenizer.is_file() and not _is_repeated(pieces, tokenizer):
      return tokenizer
    return pieces
  if _is_bytes(settings):
    return settings
  return tokenizer if tokenizer.is_file() else None


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


def open_vocabulary(
    path: PathLike, vocab_size: int, *, has_sentinels: bool = False
) -> Vocabulary:
  """Reads a vocabulary file for a model.

  Args:
    path: a SentencePiece model, a tokenizer.json, or ByT5's tokenizer_config.json.
    vocab_size: rows of the model's embedding table.
    has_sentinels: whether those that follow the pieces must have a row too. Who decodes
      looks at the ids of each prompt and needs none for a sentinel that nobody writes.

  Raises:
    InputError: where the file can't be read or has more ids than the model.
  """
  vocabulary = read_vocabulary(path)
  num_ids = vocabulary.size
  if isinstance(vocabulary, SentencePieceVocabulary):
    if not has_sentinels:
      num_ids = vocabulary.num_pieces
    elif num_ids > vocab_size >= vocabulary.num_pieces:
      raise InputError(
          "vocab_size", vocab_size,
          f"at least {num_ids}, {vocabulary.num_pieces} pieces of {path} and "
          f'{vocabulary.num_appended} sentinels; {SETTINGS_FILE} beside it with "extra_ids": 0 '
          "is for none",
      )
  if num_ids > vocab_size:
    raise InputError(f"{path} size", num_ids, f"at most {vocab_size}, the model's vocab_size")
  return vocabulary


def read_vocabulary(path: PathLike) -> Vocabulary:
  """Reads a vocabulary file, whatever model it is for; InputError where it can't be read."""
  path = local_path(path, "vocabulary")
  name = stored_name(path)
  if name == SETTINGS_FILE:
    return ByteVocabulary()
  return TokenizerVocabulary(path) if name == TOKENIZER_FILE else SentencePieceVocabulary(path)


def stored_name(path: PathLike) -> str:
  """The name that a vocabulary file gets in a model folder."""
  path = local_path(path)
  if _is_bytes(path):
    return SETTINGS_FILE
  return TOKENIZER_FILE if path.suffix == ".json" else SENTENCEPIECE_FILE


def copy_vocabulary(path: PathLike, folder: PathLike) -> None:
  """Puts a vocabulary file into a model folder, so that `vocabulary_path` finds it there."""
  name = stored_name(path)
  shutil.copyfile(path, Path(folder) / name)
  settings = Path(path).parent / SETTINGS_FILE
  if name == SENTENCEPIECE_FILE and _extra_ids(settings) != NUM_SENTINELS:
    fields = {"extra_ids": _extra_ids(settings)}
    (Path(folder) / SETTINGS_FILE).write_text(json.dumps(fields) + "\n", encoding="utf-8")


def check_added_tokens(folder: PathLike, vocabulary: Vocabulary) -> None:
  """InputError where a folder of transformers adds tokens that its vocabulary lacks.

  They stand in added_tokens.json or tokenizer_config.json. What writes those writes a
  tokenizer.json too, or can be made to: `AutoTokenizer` reads and saves the folder.
  """
  folder = local_path(folder)
  added = dict(_read_fields(folder / ADDED_FILE))
  decoder = _read_fields(folder / SETTINGS_FILE).get("added_tokens_decoder")
  for token, fields in (decoder if isinstance(decoder, dict) else {}).items():
    if isinstance(fields, dict) and token.isdecimal():
      added[fields.get("content")] = int(token)
  if isinstance(vocabulary, ByteVocabulary):
    # ByT5's own special tokens, which no text becomes here.
    added = {
        token: number for token, number in added.items()
        if number >= vocabulary.offset and not re.fullmatch(r"<extra_id_\d+>", str(token))
    }
  lost = [token for token, number in added.items() if vocabulary.token_id(token) != number]
  if lost:
    raise InputError(
        "added tokens", lost[:5],
        f"those of a {TOKENIZER_FILE} in {folder}, which AutoTokenizer's save_pretrained writes",
    )


def _sentinels(token_id) -> tuple[int, ...]:
  """Ids of the sentinels that a vocabulary holds as tokens, by number."""
  ids = []
  for i in range(NUM_SENTINELS):
    found = [token_id(f"{space}<extra_id_{i}>") for space in ("", "\u2581")]
    found = [token for token in found if token is not None]
    if not found:
      break
    ids.append(found[0])
  return tuple(ids)


def _is_repeated(pieces: Path, tokenizer: Path) -> bool:
  """Whether a tokenizer.json says no more than the SentencePiece model beside it."""
  fields = _read_fields(tokenizer)
  model, added = fields.get("model"), fields.get("added_tokens") or []
  table = model.get("vocab") if isinstance(model, dict) else None
  if not isinstance(table, list):
    return False
  vocabulary = SentencePieceVocabulary(pieces)
  listed = [(token, i) for i, (token, _) in enumerate(table)]
  listed += [(token["content"], token["id"]) for token in added]
  # The tokenizers library looks for tokens that aren't special in another way.
  if not all(token["special"] for token in added):
    return False
  return len(table) >= vocabulary.num_pieces and all(
      vocabulary.token_id(token) == number for token, number in listed
  )


def _extra_ids(settings: Path) -> int:
  """How many sentinels a tokenizer_config.json has follow the pieces."""
  count = _read_fields(settings).get("extra_ids")
  if count is None:
    return NUM_SENTINELS
  is_count = isinstance(count, int) and not isinstance(count, bool)
  if not is_count or not 0 <= count <= NUM_SENTINELS:
    raise InputError(f"{settings} extra_ids", count, f"0 … {NUM_SENTINELS}")
  return count


def _check_fetched(path: PathLike, allowed: str) -> None:
  """InputError where git-LFS left a pointer in place of a file."""
  with contextlib.suppress(OSError), open(path, "rb") as file:
    if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
      raise InputError(
          "vocabulary", str(path), f"{allowed}; this is a git-LFS pointer, for `git lfs pull`"
      )


def _is_bytes(path: Path) -> bool:
  """Whether a file is a tokenizer configuration that asks for ByT5's bytes."""
  return path.suffix == ".json" and _read_fields(path).get("tokenizer_class") == BYTES_CLASS


def _read_fields(path: Path) -> dict[str, Any]:
  """A JSON object; empty where the file isn't there or holds none."""
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return fields if isinstance(fields, dict) else {}
