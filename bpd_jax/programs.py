"""What is compiled to decode a batch: the encoder, an empty cache, and the loop.

Here the model meets `decoding/`, which neither imports the other's parts.
"""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from bpd_jax.decoding import accept
from bpd_jax.decoding.cache import cache_length
from bpd_jax.decoding.loop import DecodeState, Loop
from bpd_jax.decoding.rescoring import Rescorer, RescorerParams
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import (
    AcceptanceRule,
    Cache,
    Context,
    Drafter,
    Params,
    Policy,
    Prompt,
    Verify,
)
from bpd_jax.decoding.verify import model_verify
from bpd_jax.errors import InputError
from bpd_jax.model.model import decode_view, EncoderDecoder
from bpd_jax.model.probes import ProbeSpec
from bpd_jax.reader import make_cache, prefill


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
  """What is fixed when a decode loop is compiled.

  Attributes:
    drafter: what drafts.
    rule: which drafted tokens pass.
    search: which paths through a lattice are verified.
    rescorer: what else than the drafter's scores a path is worth.
    policy: how many tokens each row drafts; None for all that the drafter can.
  """

  drafter: Drafter
  rule: AcceptanceRule = accept.ExactMatch()
  search: SearchSettings = SearchSettings()
  rescorer: Rescorer = Rescorer()
  policy: Policy | None = None

  @property
  def num_nodes(self) -> int:
    """Nodes a call verifies."""
    return self.search.nodes(self.drafter.depth)

  @property
  def widths(self) -> tuple[int, ...]:
    """Block sizes that calls are compiled for, rising."""
    most = self.drafter.depth + 1
    return (most,) if self.policy is None else tuple(sorted({1, most, *self.policy.widths}))

  @property
  def reads_references(self) -> bool:
    """Whether `Prompt.references` must be there."""
    return any(part.reads_references for part in (self.drafter, *self.rescorer.scorers))

  def __post_init__(self):
    for name, least in (("depth", 0), ("num_candidates", 1)):
      if getattr(self.drafter, name) < least:
        raise InputError(
            f"drafter.{name}", getattr(self.drafter, name), f"an integer of at least {least}"
        )
    self.search.check(self.drafter.depth, self.drafter.num_candidates)
    if self.widths[0] < 1 or self.widths[-1] > self.drafter.depth + 1:
      raise InputError(
          "policy.widths", self.policy.widths,
          f"1 … {self.drafter.depth + 1}, the tokens that the drafter lets a call emit",
      )
    if len(self.widths) > 2 and self.search.name != "chain":
      # How many nodes a tree of fewer steps has isn't said anywhere.
      raise InputError("search", self.search.name, "'chain' with a policy of several widths")


@struct.dataclass
class DecodeParams:
  """What a decode loop reads, all of it traced.

  Attributes:
    base: the base model's decode view.
    own: the drafter's.
    rescorer: the scorers' and their weights.
    policy: the policy's.
  """

  base: Any
  own: Any = ()
  rescorer: RescorerParams = RescorerParams()
  policy: Any = ()


def make_loop(
    verify: Verify, settings: DecodeSettings, params: DecodeParams, eos_id: int
) -> Loop:
  """The loop of some settings; what it reads may be traced."""
  return Loop(
      verify, settings.drafter, Params(params.base, params.own), settings.search, eos_id,
      settings.rescorer, params.rescorer, settings.policy, params.policy, settings.widths,
      settings.rule,
  )


def drafter_probes(drafter: Drafter, params: Params) -> ProbeSpec | None:
  """What a drafter hangs on the nodes; InputError where it isn't what it says it has."""
  probes = drafter.probes(params)
  found = 0 if probes is None else probes.per_node
  if found != drafter.num_probes:
    raise InputError("drafter.num_probes", drafter.num_probes, f"{found}, as its probes have")
  return probes


def decode_cache(
    model: EncoderDecoder, settings: DecodeSettings, batch: int, max_length: int
) -> Cache:
  """An empty cache with room for outputs of `max_length`."""
  return make_cache(model, batch, cache_length(max_length, settings.drafter.depth))


def row_keys(seed: jax.Array | int, rows: jax.Array) -> jax.Array:
  """A key a row, [batch], the same in whatever batch it is decoded."""
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def decode_batch(
    model: EncoderDecoder,
    settings: DecodeSettings,
    params: DecodeParams,
    context: Context,
    prompt: Prompt,
    limits: jax.Array,
    seed: jax.Array | int,
    rows: jax.Array,
    cache: Cache,
) -> DecodeState:
  """Decodes a batch to its end; jit it with `cache` donated.

  Args:
    model: with `is_view`.
    settings: what is compiled.
    params: what it reads.
    context: of `prefill`.
    prompt: the inputs, without keys.
    limits: [batch] int32, most tokens of each row, 0 for dead rows.
    seed: of the rows' keys.
    rows: [batch] int32, the number of each prompt among all.
    cache: of `decode_cache`.
  """
  config, view = model.config, params.base
  probes = drafter_probes(settings.drafter, Params(view, params.own))

  def block_call(tokens, depth, visible, past, lengths):
    return model.apply(
        {"params": view}, tokens, depth, visible, past, lengths, context.cross, context.mask,
        probes, method="decode_block",
    )

  verify = model_verify(
      block_call,
      lambda hidden: model.apply({"params": view}, hidden, method="logits"),
      keeps_logits=settings.rule.reads_logits,
  )
  loop = make_loop(verify, settings, params, config.eos_id)
  root = jnp.full_like(limits, config.start_id)
  prompt = prompt.replace(keys=row_keys(seed, rows))
  hidden = jnp.zeros([limits.shape[0], config.d_model], config.dtype)
  return loop.decode(loop.start(
      cache, root, prompt, limits, context, hidden=hidden, num_nodes=settings.num_nodes
  ))


# One cache of compiled programs for all models of the process: models of one
# config and mesh share them.
VIEW = jax.jit(decode_view, static_argnums=0)
PREFILL = jax.jit(prefill, static_argnums=0)
CACHE = jax.jit(decode_cache, static_argnums=(0, 1, 2, 3))
DECODE = jax.jit(decode_batch, static_argnums=(0, 1), donate_argnums=8)


def num_compilations() -> int:
  """Programs compiled for decoding by this process: encoders, empty caches and loops."""
  return sum(program._cache_size() for program in (PREFILL, CACHE, DECODE))
