"""Sizes and numerics of a T5-style encoder-decoder."""

import dataclasses
from typing import Any

from bpd_jax.errors import InputError

ACTIVATIONS = ("gelu", "relu", "silu")
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that fixes the parameters' shapes and the arithmetic.

  The defaults are T5 1.1's. T5 1.0 is `activation="relu"`, `is_gated=False`,
  `is_tied=True`.

  Attributes:
    vocab_size: rows of the embedding table.
    d_model: width of the residual stream.
    d_ff: width inside the feed-forward layers.
    d_kv: features of one attention head.
    num_heads: attention heads.
    num_encoder_layers: layers of the encoder.
    num_decoder_layers: layers of the decoder.
    activation: of the feed-forward layers, and of parallel heads.
    is_gated: whether the feed-forward layers multiply by a second projection.
    is_tied: whether the output projection is the embedding table, after a
      scale of d_model ** -0.5.
    relpos_buckets: buckets of the relative position bias.
    relpos_max_distance: distance from which all share a bucket.
    norm_epsilon: added to the mean square in RMS norm.
    dropout_rate: during training only.
    scan_unroll: layers that the scan over a stack goes through at a time. On a
      CPU a training step is a fifth faster where that is all of them, and
      compiles for longer.
    pad_id: fills rows.
    eos_id: ends a row.
    start_id: the decoder's first input; `pad_id` by default, as in T5.
    dtype: of activations and matrix products.
    param_dtype: of stored parameters.
    accum_dtype: of norm statistics, attention scores, softmax, logits and
      log-probabilities: float64 where `dtype` is, else float32 at least. In fewer
      bits a mean square overflows, and masked scores aren't finite.
  """

  vocab_size: int = 32128
  d_model: int = 512
  d_ff: int = 1024
  d_kv: int = 64
  num_heads: int = 6
  num_encoder_layers: int = 8
  num_decoder_layers: int = 8
  activation: str = "gelu"
  is_gated: bool = True
  is_tied: bool = False
  relpos_buckets: int = 32
  relpos_max_distance: int = 128
  norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  scan_unroll: int = 1
  pad_id: int = 0
  eos_id: int = 1
  start_id: int | None = None
  dtype: str = "float32"
  param_dtype: str = "float32"
  accum_dtype: str = "float32"

  def __post_init__(self):
    for name in (
        "vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_encoder_layers",
        "num_decoder_layers", "scan_unroll",
    ):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"ModelConfig.{name}", value, "a positive integer")
    if self.activation not in ACTIVATIONS:
      raise InputError("ModelConfig.activation", self.activation, f"one of {ACTIVATIONS}")
    if self.relpos_buckets < 4 or self.relpos_buckets % 4:
      raise InputError(
          "ModelConfig.relpos_buckets", self.relpos_buckets, "a positive multiple of 4"
      )
    if self.relpos_max_distance <= self.relpos_buckets // 2:
      raise InputError(
          "ModelConfig.relpos_max_distance", self.relpos_max_distance,
          f"more than half of relpos_buckets, {self.relpos_buckets // 2}",
      )
    if not 0 <= self.dropout_rate < 1:
      raise InputError("ModelConfig.dropout_rate", self.dropout_rate, "from 0 to below 1")
    if self.start_id is None:
      object.__setattr__(self, "start_id", self.pad_id)
    for name in ("pad_id", "eos_id", "start_id"):
      if not 0 <= getattr(self, name) < self.vocab_size:
        raise InputError(
            f"ModelConfig.{name}", getattr(self, name), f"an id below {self.vocab_size}"
        )
    for name in ("dtype", "param_dtype"):
      if getattr(self, name) not in DTYPES:
        raise InputError(
            f"ModelConfig.{name}", getattr(self, name), "bfloat16, float16, float32 or float64"
        )
    if self.accum_dtype not in (accum_dtype_of(self.dtype), "float64"):
      allowed = "float64, as dtype is" if self.dtype == "float64" else "float32 or float64"
      raise InputError("ModelConfig.accum_dtype", self.accum_dtype, allowed)

  def replace(self, **changes: Any) -> "ModelConfig":
    """A copy with some fields changed."""
    return dataclasses.replace(self, **changes)

  @property
  def special_ids(self) -> dict[str, int]:
    """What rows are made with: EOS, padding and the decoder's first input, by field."""
    return {name: getattr(self, name) for name in ("eos_id", "pad_id", "start_id")}

  def with_dtype(self, dtype: str) -> "ModelConfig":
    """A copy that stores and computes in one dtype, but for what `accum_dtype` says."""
    return self.replace(dtype=dtype, param_dtype=dtype, accum_dtype=accum_dtype_of(dtype))

  def to_dict(self) -> dict[str, Any]:
    """The fields, ready for JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
    """The inverse of `to_dict`.

    A folder may ask for fewer bits of `accum_dtype` than there are to be; it gets these.

    Raises:
      InputError: for a field that doesn't exist.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    for name, value in fields.items():
      if name not in known:
        raise InputError(f"ModelConfig.{name}", value, f"one of the fields {sorted(known)}")
    if fields.get("accum_dtype") in DTYPES[:2]:
      fields = fields | {"accum_dtype": accum_dtype_of(fields.get("dtype", cls.dtype))}
    return cls(**fields)


def accum_dtype_of(dtype: str) -> str:
  """The least `accum_dtype` of a model that computes in `dtype`."""
  return "float64" if dtype == "float64" else "float32"
