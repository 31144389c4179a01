"""What decoding costs by counting: operations, and bytes of weights and of the cache.

Kim et al. 2024, Table 13, count the same. A count isn't a time: measured times stand
beside it wherever it is shown.
"""

from collections.abc import Sequence
import dataclasses

import jax.numpy as jnp

from bpd_jax.decoding.cache import cache_length
from bpd_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Cost:
  """Work on one device.

  Attributes:
    flops: operations, a multiply-add being two.
    parameter_bytes: of weights, read.
    cache_bytes: of keys and values, read and written.
  """

  flops: float
  parameter_bytes: float
  cache_bytes: float

  @property
  def bytes(self) -> float:
    """Between the device and its memory."""
    return self.parameter_bytes + self.cache_bytes

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(*(x + y for x, y in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def __truediv__(self, number: float) -> "Cost":
    return Cost(*(x / number for x in dataclasses.astuple(self)))


def call_cost(
    config: ModelConfig, nodes: int, rows: int, output_length: int, input_length: int,
    split: int = 1, num_heads: int = 0, head_d_ff: int = 0,
) -> Cost:
  """Cost of one decoder call, the heads that draft included.

  Counted are matrix products; the weights, read once (the output projection
  twice where heads draft, before and after the decoder); the whole buffers of
  the cache and of the encoder's keys and values, and the nodes' own, written.
  Activations and logits are taken to stay on the chip.

  Args:
    config: of the model; `dtype` is that of weights, cache and products.
    nodes: of the call.
    rows: of the batch, on this device.
    output_length: most tokens of a row, which sizes the cache.
    input_length: of the encoder.
    split: devices that share the heads, the feed-forward layers and the
      vocabulary.
    num_heads: heads after the base model that draft.
    head_d_ff: width inside each.
  """
  joined = config.num_heads * config.d_kv
  slots = cache_length(output_length, num_heads)
  layer = (6 * joined + (2 + config.is_gated) * config.d_ff) * config.d_model
  layers = config.num_decoder_layers * layer
  head = 2 * config.d_model * head_d_ff
  project = config.d_model * config.vocab_size
  attend = 2 * config.num_decoder_layers * joined * (slots + nodes + input_length)
  products = rows * (nodes * (layers + project + attend) + num_heads * (head + project))
  weights = layers + num_heads * head + project * (2 if num_heads else 1)
  stored = rows * 2 * config.num_decoder_layers * joined * (slots + input_length + nodes)
  size = jnp.dtype(config.dtype).itemsize
  return Cost(2 * products // split, size * weights // split, size * stored // split)


def token_cost(
    config: ModelConfig, nodes: int, depth: int, block_efficiency: float, *,
    output_length: int, input_length: int, scorers: Sequence[ModelConfig] = (),
    num_prefixes: int = 1, head_d_ff: int | None = None,
) -> Cost:
  """Cost of one emitted token at batch 1.

  A small model that re-scores reads the tokens that became certain in one call, and
  the newest token of each prefix in one more for each step of the lattice after the
  first; its output projection is counted at every node, what it keeps of the draft isn't.
  n-grams and searches are taken to be free, as they read no weights.

  Args:
    config: of the model.
    nodes: of a call.
    depth: steps of the lattice; 0 for greedy decoding.
    block_efficiency: tokens a call.
    output_length: tokens in the cache.
    input_length: of the encoder.
    scorers: of the small models.
    num_prefixes: that the search keeps.
    head_d_ff: width inside the heads that draft, one a step; None where something else
      drafts, which isn't counted.
  """
  heads = {} if head_d_ff is None else {"num_heads": depth, "head_d_ff": head_d_ff}
  cost = call_cost(config, nodes, 1, output_length, input_length, **heads)
  for small in scorers:
    for width in (depth + 1, *[num_prefixes] * (depth - 1)):
      cost += call_cost(small, width, 1, output_length, input_length)
  return cost / block_efficiency
