"""Near ties: when float32 outputs may differ from greedy's, and when they may not.

The same weights in one call over a block and in single calls give float32
logits that differ in their last bits, so that two tokens of all but equal
logits can swap. A row that differs is legal only where a re-score in float64
puts the two tokens of the first difference next to each other. Anything after
that follows from it. `find_differences` lists them, `check_differences` judges.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import EncoderDecoder
from bpd_jax.partitioning import single_device

# Rows that are re-scored together.
MAX_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Difference:
  """The first place at which a row isn't greedy's.

  Attributes:
    row: index of the prompt.
    position: index of the token, 0 for the first one of the output.
    greedy_token: greedy's token there, EOS where greedy's row had ended.
    token: the other method's, likewise.
    margin: how far apart the two tokens' logits are in float64, at least 0;
      infinite after an EOS, where no token may follow.
    is_near_tie: whether the margin is within the tolerance.
  """

  row: int
  position: int
  greedy_token: int
  token: int
  margin: float
  is_near_tie: bool

  def __str__(self) -> str:
    verdict = "near tie" if self.is_near_tie else "NOT a near tie"
    return (
        f"row {self.row}, position {self.position}: token {self.token}, "
        f"greedy {self.greedy_token}, margin {self.margin:.1e}, {verdict}"
    )


def find_differences(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    greedy: Sequence[Sequence[int] | np.ndarray],
    tokens: Sequence[Sequence[int] | np.ndarray],
    tolerance: float = 1e-3,
) -> list[Difference]:
  """Finds the rows whose tokens aren't greedy's and re-scores them in float64.

  Args:
    config: of the model, of any dtype.
    params: stored parameters (not the decode view), of any dtype.
    prompts: token ids as the model saw them, EOS included.
    greedy: greedy's tokens of each prompt, EOS included where it came.
    tokens: another method's, decoded with the same limits.
    tolerance: largest margin of a near tie.

  Returns:
    The first difference of each row that differs, in the order of the rows.
  """
  found = []
  for row, (one, other) in enumerate(zip(greedy, tokens, strict=True)):
    one, other = np.asarray(one, np.int32), np.asarray(other, np.int32)
    if np.array_equal(one, other):
      continue
    shorter = min(len(one), len(other))
    unequal = np.flatnonzero(one[:shorter] != other[:shorter])
    position = int(unequal[0]) if unequal.size else shorter
    pair = [int(x[position]) if position < len(x) else config.eos_id for x in (one, other)]
    found.append((row, one[:position], pair))
  if not found:
    return []
  margins = _margins(
      config, params, [prompts[row] for row, _, _ in found],
      [prefix for _, prefix, _ in found], [pair for _, _, pair in found],
  )
  differences = []
  for (row, prefix, pair), margin in zip(found, margins):
    margin = float("inf") if config.eos_id in prefix else float(margin)
    differences.append(Difference(row, len(prefix), *pair, margin, margin <= tolerance))
  return differences


def check_differences(
    differences: Sequence[Difference], num_rows: int, max_share: float = 0.005
) -> bool:
  """Whether float32 outputs with these differences count as greedy's.

  Every difference must be a near tie, and fewer than `max_share` of the rows
  may differ. A single near tie is legal however few the rows are: one among 60
  is 1.7 % and says nothing, as honest ones come about once in 40,000 tokens.

  Args:
    differences: from `find_differences`.
    num_rows: rows that were compared.
    max_share: largest legal share of rows that differ, itself excluded.
  """
  if not all(difference.is_near_tie for difference in differences):
    return False
  return len(differences) <= 1 or len(differences) < max_share * num_rows


def host_device() -> jax.Device:
  """Where rows are scored again: the host's CPU, so that an accelerator needn't hold all
  parameters in float64 beside its own, or have a float64 at all. The first device where
  `JAX_PLATFORMS` leaves no CPU.
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return jax.local_devices()[0]


def on_host(params: Any) -> Any:
  """Parameters in float64 on `host_device`, leaf by leaf; where float64 is enabled."""
  put = lambda leaf: jax.device_put(np.asarray(leaf, np.float64), host_device())
  return jax.tree.map(put, params)


def _margins(config, params, prompts, prefixes, pairs) -> list[np.ndarray]:
  """Distance of two tokens' float64 logits after each prefix, one number a row."""
  host, batch_size = host_device(), min(MAX_BATCH, len(prompts))
  input_length = max(map(len, prompts))
  length = 1 + max(map(len, prefixes))
  with jax.enable_x64(True), jax.default_device(host):
    wide = config.with_dtype("float64")
    params = on_host(params)
    model = EncoderDecoder(wide, single_device(host))

    @jax.jit
    def score(params, inputs, lengths, targets, position, pairs):
      variables = {"params": params}
      mask = jnp.arange(input_length) < lengths[:, None]
      encoded = model.apply(variables, inputs, mask, method="encode")
      hidden = model.apply(variables, encoded, mask, targets, method="decode")
      last = jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
      logits = model.apply(variables, last, method="logits")  # [batch, vocab]
      both = jnp.take_along_axis(logits, pairs, axis=1)
      return jnp.abs(both[:, 0] - both[:, 1])

    margins = []
    for start in range(0, len(prompts), batch_size):
      inputs = np.full([batch_size, input_length], config.pad_id, np.int32)
      targets = np.full([batch_size, length], config.pad_id, np.int32)
      targets[:, 0] = config.start_id
      lengths, position = np.ones([batch_size], np.int32), np.zeros([batch_size], np.int32)
      both = np.zeros([batch_size, 2], np.int32)
      rows = range(start, min(start + batch_size, len(prompts)))
      for slot, row in enumerate(rows):
        inputs[slot, : len(prompts[row])] = prompts[row]
        targets[slot, 1 : 1 + len(prefixes[row])] = prefixes[row]
        lengths[slot], position[slot] = len(prompts[row]), len(prefixes[row])
        both[slot] = pairs[row]
      scored = score(params, inputs, lengths, targets, position, both)
      margins.extend(np.asarray(scored)[: len(rows)])
    return margins
