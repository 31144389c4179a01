"""Drafts tried on a recording: the decode loop with a `Verify` that remembers.

With exact acceptance every accepted prefix is a prefix of greedy's output, so one
greedy pass with its hidden states answers for every drafter, scorer, search and width:
block efficiency without a decoder call. The loop is the one that decodes; nodes that
leave greedy's path answer -1, which no draft equals.
"""

from collections.abc import Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.checkpoints import params_fingerprint
from bpd_jax.decoding import tree as trees
from bpd_jax.decoding.accept import ExactMatch, NothingPasses
from bpd_jax.decoding.loop import DecodeState, Loop
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.types import (
    Cache,
    Drafting,
    Params,
    Policing,
    Prompt,
    Tree,
    Verified,
    Verify,
)
from bpd_jax.errors import InputError
from bpd_jax.generation import (
  batches,
  check_finite,
  fetch_state,
  Generation,
  Generator,
  input_bucket,
  read_row,
)
from bpd_jax.model.model import EncoderDecoder
from bpd_jax.programs import DecodeParams, DecodeSettings, drafter_probes, make_loop, row_keys
from bpd_jax.reader import make_cache, prefill
from bpd_jax.terminal import track

# Rows of a teacher-forced pass.
RECORD_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Recording:
  """Greedy decoding of some prompts, with what its heads read.

  Attributes:
    fingerprint: of the model's parameters.
    prompts: [rows, input length] int32, padded to the right.
    prompt_lengths: [rows] int32.
    tokens: [rows, max_length] int32, greedy's, valid below `lengths`.
    lengths: [rows] int32.
    hidden: [rows, max_length, d_model], the decoder's normed state from which greedy
      chose each token.
    margins: [rows, max_length] float32, by how much the chosen token's logit is above
      the second.
  """

  fingerprint: str
  prompts: np.ndarray
  prompt_lengths: np.ndarray
  tokens: np.ndarray
  lengths: np.ndarray
  hidden: np.ndarray
  margins: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)

  def rows(self, chosen: Sequence[int]) -> "Recording":
    """Some of the rows."""
    chosen = np.asarray(chosen, int)
    fields = {
        field.name: getattr(self, field.name) for field in dataclasses.fields(self)
    }
    return Recording(**{
        name: value[chosen] if isinstance(value, np.ndarray) else value
        for name, value in fields.items()
    })

  def save(self, path: str | Path) -> None:
    """Writes it as an .npz file."""
    fields = dataclasses.asdict(self)
    if self.hidden.dtype.itemsize < 4:
      # NumPy's files don't know bfloat16; nothing is lost.
      fields["hidden"] = self.hidden.astype(np.float32)
    with open(path, "wb") as file:
      np.savez(file, **fields)


def load_recording(path: str | Path, generator: Generator) -> Recording:
  """Reads a recording of this very model.

  Raises:
    InputError: naming the file where it isn't a recording, or another checkpoint's.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      fields = {name: file[name] for name in file.files}
    fields["hidden"] = fields["hidden"].astype(generator.config.dtype)
    recording = Recording(**(fields | {"fingerprint": str(fields["fingerprint"])}))
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError("recording", str(path), "a file of Recording.save") from error
  wanted = params_fingerprint(generator.params)
  if recording.fingerprint != wanted:
    raise InputError(
        "recording", f"{path} of checkpoint {recording.fingerprint}", f"one of {wanted}"
    )
  return recording


def record(
    generator: Generator, prompts: Sequence[Sequence[int]], greedy: Generation,
    max_length: int, *, input_length: int | None = None, has_progress: bool = False,
) -> Recording:
  """Reads the states behind greedy's output by one teacher-forced pass.

  Args:
    generator: the model.
    prompts: token ids, as `Generator.encode_prompts` gives them.
    greedy: what it made of them.
    max_length: most tokens of an output.
    input_length: to pad prompts to, as in decoding by default; recordings of one length
      share programs.
    has_progress: whether to show a progress bar.
  """
  config, rows = generator.config, len(prompts)
  if input_length is None:
    input_length = input_bucket(max(map(len, prompts)))
  inputs = np.full([rows, input_length], config.pad_id, np.int32)
  tokens = np.full([rows, max_length], config.pad_id, np.int32)
  for row, (prompt, output) in enumerate(zip(prompts, greedy.tokens, strict=True)):
    inputs[row, : len(prompt)] = prompt
    tokens[row, : len(output)] = output
  lengths = np.array([len(row) for row in greedy.tokens], np.int32)
  prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  model = EncoderDecoder(config, generator.partitioning)
  hidden, margins = [], []
  parts = range(0, rows, RECORD_ROWS)
  for first in track(parts, "record", is_shown=has_progress):
    part = [min(i, rows - 1) for i in range(first, first + RECORD_ROWS)]
    states, gaps = _teacher_force(
        model, generator.params, inputs[part], prompt_lengths[part], tokens[part]
    )
    hidden.append(np.asarray(states))
    margins.append(np.asarray(gaps))
  return Recording(
      params_fingerprint(generator.params), inputs, prompt_lengths, tokens, lengths,
      np.concatenate(hidden)[:rows], np.concatenate(margins)[:rows],
  )


@functools.partial(jax.jit, static_argnums=0)
def _teacher_force(model, params, inputs, input_lengths, tokens):
  """States [rows, length, d] that chose `tokens`, and margins [rows, length]."""
  apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
  mask = jnp.arange(inputs.shape[1]) < input_lengths[:, None]
  start = jnp.full_like(tokens[:, :1], model.config.start_id)
  before = jnp.concatenate([start, tokens[:, :-1]], axis=1)
  hidden = apply(apply(inputs, mask, method="encode"), mask, before, method="decode")
  best, _ = jax.lax.top_k(apply(hidden, method="logits"), 2)
  return hidden, best[..., 0] - best[..., 1]


@struct.dataclass
class RecordedRows:
  """Rows of a recording, as a program takes them.

  Attributes:
    tokens: [batch, length] int32, greedy's.
    hidden: [batch, length, d].
    limits: [batch] int32, tokens of each row; 0 for rows that only pad.
    prompt: the inputs, without keys.
    numbers: [batch] int32, of the rows.
  """

  tokens: jax.Array
  hidden: jax.Array
  limits: jax.Array
  prompt: Prompt
  numbers: jax.Array


def recorded_rows(recording: Recording, numbers: Sequence[int], num_live: int) -> RecordedRows:
  """Some rows of a recording, of which the first `num_live` count."""
  part = np.asarray(numbers)
  tokens = recording.tokens[part]
  prompt = Prompt(
      recording.prompts[part], recording.prompt_lengths[part], tokens.shape[1],
      references=tokens,
  )
  limits = np.where(np.arange(len(part)) < num_live, recording.lengths[part], 0)
  return RecordedRows(
      tokens, recording.hidden[part], limits.astype(np.int32), prompt, part.astype(np.int32)
  )


def recorded_verify(
    tokens: jax.Array, hidden: jax.Array, start_id: int, probes: jax.Array | None = None
) -> Verify:
  """`Verify` from a recording, for its rows.

  Args:
    tokens: [batch, length] int32, greedy's.
    hidden: [batch, length, d].
    start_id: the token at position 0.
    probes: [batch, length, k, d], of greedy's prefixes; None without.

  Returns:
    A function of (cache, tree); of the cache it reads the lengths.
  """
  length = tokens.shape[1]

  def verify(cache: Cache, tree: Tree) -> Verified:
    position = jnp.broadcast_to(cache.lengths[:, None] + tree.depth, tree.tokens.shape)
    here = jnp.minimum(position, length - 1)
    before = jnp.take_along_axis(tokens, jnp.maximum(here - 1, 0), axis=1)
    own = jnp.where(position == 0, start_id, before)
    is_right = (tree.tokens == own) & (position < length)
    off = trees.ancestors(tree) & ~is_right[:, None, :]
    is_on_path = ~off.any(-1)
    return Verified(
        choice=jnp.where(is_on_path, jnp.take_along_axis(tokens, here, axis=1), -1),
        hidden=jnp.take_along_axis(hidden, here[..., None], axis=1),
        keys=(), values=(),
        probes=None if probes is None else trees.gather_nodes(probes, here),
    )

  return verify


def recorded_loop(
    model: EncoderDecoder, settings: DecodeSettings, params: DecodeParams, rows: RecordedRows
) -> tuple[Loop, DecodeState]:
  """The loop over a recording, and its state before the first call; to be traced.

  What a method doesn't read of the encoder isn't computed.
  """
  config, batch = model.config, rows.tokens.shape[0]
  prompt = rows.prompt.replace(keys=row_keys(0, rows.numbers))
  context = prefill(model, params.base, prompt.tokens, prompt.lengths)
  start = jnp.full([batch], config.start_id, jnp.int32)
  probes = drafter_probes(settings.drafter, Params(params.base, params.own))
  states = None
  if probes is not None:
    # Of a node on greedy's path they follow from what is before it: one call has them all.
    before = jnp.concatenate([start[:, None], rows.tokens[:, :-1]], axis=1)
    length = before.shape[1]
    cache = make_cache(model, batch, 1)
    *_, states = model.apply(
        {"params": params.base}, before, np.arange(length, dtype=np.int32)[None],
        np.tri(length, dtype=bool)[None], tuple(zip(cache.keys, cache.values)), cache.lengths,
        context.cross, context.mask, probes, method="decode_block",
    )
  verify = recorded_verify(rows.tokens, rows.hidden, config.start_id, states)
  loop = make_loop(verify, settings, params, config.eos_id)
  return loop, loop.start(
      Cache((), (), jnp.zeros([batch], jnp.int32)), start, prompt, rows.limits, context,
      hidden=jnp.zeros_like(rows.hidden[:, 0]), num_nodes=settings.num_nodes,
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _replay(model, settings, params, rows):
  loop, state = recorded_loop(model, settings, params, rows)
  return loop.decode(state)


def replay(
    generator: Generator, recording: Recording, method: str | Drafting = "blockwise", *,
    batch_size: int = 16, scoring: Sequence[Scoring] = (), policing: Policing | None = None,
    **options: Any,
) -> Generation:
  """Decodes a recording's rows again, without the decoder.

  Args:
    generator: the recorded model.
    recording: of its greedy output.
    method: as of `Generator.generate`.
    batch_size: rows together, of like lengths; the last batch is filled with dead rows. Under
      a policy calls are those of decoding where this is decoding's.
    scoring: likewise.
    policing: likewise.
    **options: of `Generator.settings`: search, and an exact rule.

  Returns:
    Tokens, calls and traces as `Generator.generate` has them; no texts, no times.

  Raises:
    InputError: as `Generator.generate` does; for an approximate rule.
  """
  settings = generator.settings(method, scoring=scoring, policing=policing, **options)
  if not isinstance(settings.rule, ExactMatch | NothingPasses):
    raise InputError("rule", settings.rule, "exact acceptance, all that a recording can judge")
  params = generator.decode_params(method, scoring, policing)
  done: dict[int, tuple] = {}
  rows = len(recording)
  # A batch takes as many calls as its longest row. A policy sees whole batches, so that it
  # gets those of decoding, in their order.
  lengths = recording.lengths if policing is None else recording.prompt_lengths
  for batch in batches(lengths, batch_size):
    num_live, part = len(batch), np.array(batch + batch[-1:] * (batch_size - len(batch)))
    last = _replay(generator.model, settings, params, recorded_rows(recording, part, num_live))
    state = fetch_state(last)
    check_finite(generator.config, state, part)
    if policing is not None:
      params = params.replace(policy=policing.policy.remember(params.policy, last.policy))
    for slot in range(num_live):
      done[part[slot]] = read_row(state, slot)
  tokens, calls, traces = (list(column) for column in zip(*(done[i] for i in range(rows))))
  return Generation(tokens, calls, traces, None, [], [])


def count_calls(
    generator: Generator, recording: Recording, method: str | Drafting = "blockwise",
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and calls of each row, [rows] each: all that a sweep needs."""
  found = replay(generator, recording, method, **options)
  return np.array([len(row) for row in found.tokens]), np.array(found.calls)
