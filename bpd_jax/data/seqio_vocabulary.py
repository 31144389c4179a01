"""This package's vocabularies as SeqIO's: the same ids, whichever of them wrote a row.

SeqIO's own SentencePiece class finds a sentinel only after a space, and takes
that space with it; so ids come from the vocabulary that decoding uses.
"""

from collections.abc import Iterable

import numpy as np
import seqio
import tensorflow as tf

from bpd_jax.vocabulary import Vocabulary

UNKNOWN_ID = 2

# TensorFlow only reads data; left alone, it takes the whole memory of a GPU from JAX.
tf.config.set_visible_devices([], "GPU")


class SeqioVocabulary(seqio.Vocabulary):
  """Encodes and decodes as a `bpd_jax.vocabulary` does."""

  def __init__(self, vocabulary: Vocabulary):
    super().__init__()
    self._vocabulary = vocabulary

  @property
  def eos_id(self) -> int:
    return self._vocabulary.eos_id

  @property
  def sentinels(self) -> tuple[int, ...]:
    """The id of each `<extra_id_i>`, by i."""
    return self._vocabulary.sentinels

  @property
  def unk_id(self) -> int:
    return UNKNOWN_ID

  @property
  def bos_id(self) -> None:
    return None

  @property
  def _base_vocab_size(self) -> int:
    return self._vocabulary.size

  def _encode(self, s: str) -> list[int]:
    return self._vocabulary.encode(s)

  def _decode(self, ids: Iterable[int]) -> str:
    return self._vocabulary.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text: bytes) -> np.ndarray:
      return np.asarray(self._vocabulary.encode(text.decode("utf-8")), np.int32)

    return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(row: np.ndarray) -> bytes:
      return self._vocabulary.decode(row.tolist()).encode("utf-8")

    return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False), [])

  def __eq__(self, other: object) -> bool:
    return isinstance(other, SeqioVocabulary) and self._identity == other._identity

  def __hash__(self) -> int:
    return hash(self._identity)

  @property
  def _identity(self) -> tuple[str, int]:
    return self._vocabulary.fingerprint, self._vocabulary.eos_id
