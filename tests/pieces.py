"""Small SentencePiece models, trained on the shipped rows."""

import functools
import io

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from bpd_jax.data import rows

USER_DEFINED = 4


@functools.cache
def text_rows():
  """Some prose and code."""
  return [
      row["inputs"] for task in ("docstring_lm", "code_body")
      for row in rows.load_rows(task, "validation")[:60]
  ]


def train_pieces(vocab_size, **options):
  """The content of a model file with T5's special ids; options are the trainer's."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(text_rows()), model_writer=out, vocab_size=vocab_size,
      minloglevel=2, **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options,
  )
  return out.getvalue()


def with_sentinels(content):
  """A model file whose last 100 pieces are `▁<extra_id_99>` … `▁<extra_id_0>`, as mT5's."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(content)
  for i in reversed(range(100)):
    proto.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=USER_DEFINED)
  return proto.SerializeToString()
