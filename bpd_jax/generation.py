"""Text in, text out: a loaded model with every decoding method.

`Generator.generate` takes prompts of any lengths, packs them into batches of
one of a few input lengths, and decodes each batch in one compiled loop. Every
method gives greedy's tokens unless an approximate acceptance rule is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import itertools
import time
from typing import Any

import jax
import numpy as np

from bpd_jax.addons.addon import ADDON_VIEW
from bpd_jax.addons.folder import load_heads
from bpd_jax.addons.heads import Heads
from bpd_jax.call_costs import CallCosts, costs_key, find_costs
from bpd_jax.checkpoints import load_fingerprint, load_model, params_fingerprint
from bpd_jax.decoding import accept, loop
from bpd_jax.decoding.drafters.empty import EmptyDrafter
from bpd_jax.decoding.policies.goodput import block_sizes
from bpd_jax.decoding.rescoring import Rescorer, rescorer_params, Scoring
from bpd_jax.decoding.scorers.neural import NeuralScorer
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import AcceptanceRule, Drafter, Drafting, Policing, Prompt
from bpd_jax.errors import check_count, check_text, InputError
from bpd_jax.folders import PathLike
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import EncoderDecoder
from bpd_jax.partitioning import Partitioning, single_device
from bpd_jax.programs import (
    CACHE,
    DECODE,
    DecodeParams,
    DecodeSettings,
    num_compilations,
    PREFILL,
    VIEW,
)
from bpd_jax.reader import ModelReader
from bpd_jax.terminal import track
from bpd_jax.vocabulary import load_vocabulary, Vocabulary

INPUT_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048)
# Draftings that every model has by name; "auto" is a policy too.
METHODS = ("greedy", "blockwise")


class NotFinite(InputError):
  """A number that decides was NaN or infinite, so that any token would be chance.

  Attributes:
    row: index of the prompt; the first of its batch.
    call: the decoder call of the row, from 1 on.
  """

  def __init__(self, row: int, call: int, what: str, allowed: str, name: str | None = None):
    name = f"prompts[{row}]" if name is None else name
    super().__init__(f"{name}, call {call}: {what}", "not finite", allowed)
    self.row, self.call, self._what = row, call, what

  def among(self, names: Sequence[str]) -> "NotFinite":
    """The same error, where the prompts have names."""
    return NotFinite(self.row, self.call, self._what, self.allowed, names[self.row])


@contextlib.contextmanager
def naming_prompts(names: Sequence[str]) -> Iterator[None]:
  """Says in a NotFinite which prompt it is; one name a prompt."""
  try:
    yield
  except NotFinite as error:
    raise error.among(names) from error


@dataclasses.dataclass(frozen=True)
class Call:
  """One decoder call of a row.

  Attributes:
    draft: drafted tokens that were verified, a parent before its children.
    emitted: tokens that the call made certain.
    parents: of each drafted token, its index in `draft`, -1 for a child of the
      root; None where each follows the one before it.
    accepted: indices in `draft` of the nodes that were emitted, in their order: all emitted
      tokens but the last, or all of them.
    sources: of each drafted token, which drafter it is from; None where all are drafter 0's.
    is_exact: whether the search proved that these are the best paths.
  """

  draft: list[int]
  emitted: list[int]
  parents: list[int] | None = None
  accepted: list[int] = dataclasses.field(default_factory=list)
  sources: list[int] | None = None
  is_exact: bool = True

  @property
  def num_accepted(self) -> int:
    """How many emitted tokens had been drafted."""
    return len(self.accepted)


@dataclasses.dataclass(frozen=True)
class Generation:
  """What a model made of a list of prompts.

  Attributes:
    tokens: ids of each output, EOS included where it came.
    calls: decoder calls of each row.
    traces: the calls themselves.
    texts: decoded outputs, None without a vocabulary.
    seconds: wall time of each batch, compilation included in a batch that
      compiled.
    is_warm: of each batch, whether nothing was compiled in it.
    policing: the policy with what it has seen, to go on with; None without one.
    costs: by which "auto" chose; None for other methods.
  """

  tokens: list[np.ndarray]
  calls: list[int]
  traces: list[list[Call]]
  texts: list[str] | None
  seconds: list[float]
  is_warm: list[bool]
  policing: Policing | None = None
  costs: CallCosts | None = None

  @property
  def block_efficiency(self) -> float:
    """Tokens emitted divided by decoder calls; exactly 1 for greedy."""
    return sum(map(len, self.tokens)) / max(sum(self.calls), 1)


def input_bucket(longest: int, buckets: Sequence[int] = INPUT_BUCKETS) -> int:
  """The length to pad prompts to, of which the longest has `longest` tokens."""
  return min(bucket for bucket in buckets if bucket >= longest)


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
  """Which rows share a batch: those of like lengths, the shortest first."""
  order = sorted(range(len(lengths)), key=lambda i: lengths[i])
  return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


class Generator:
  """A model ready to decode.

  Attributes:
    config: the model's.
    params: stored parameters, placed by `partitioning`.
    partitioning: the mesh; batches are split over its batch axes.
    vocabulary: of texts; None where only token ids come in.
    own_heads: its parallel heads and their parameters; `Heads(1)` and none where it has none.
  """

  def __init__(
      self, config: ModelConfig, params: Any, partitioning: Partitioning | None = None,
      vocabulary: Vocabulary | None = None,
      fingerprint: str | Callable[[], str] | None = None,
      own_heads: tuple[Heads, Any] = (Heads(1), {}),
  ):
    self.config = config
    self.params = params
    self.partitioning = partitioning or single_device()
    self.vocabulary = vocabulary
    self.own_heads = own_heads
    self._fingerprint = fingerprint
    self.model = EncoderDecoder(config, self.partitioning, is_view=True)
    self._view = self._heads_view = None
    # What was measured, by its key as text, and of "auto" by batch size what it has seen.
    self._costs: dict[str, CallCosts] = {}
    self._auto: dict[int, tuple[CallCosts, Policing]] = {}
    self._compiled_before = num_compilations()

  @property
  def vocabulary_fingerprint(self) -> str | None:
    """Of the vocabulary; None without one."""
    return None if self.vocabulary is None else self.vocabulary.fingerprint

  @property
  def fingerprint(self) -> str:
    """Of the base's values as they are stored, whatever they are computed in."""
    if self._fingerprint is None:
      self._fingerprint = params_fingerprint(self.params)
    if callable(self._fingerprint):
      self._fingerprint = self._fingerprint()
    return self._fingerprint

  @property
  def view(self) -> Any:
    """The parameters as decoding reads them, made once."""
    if self._view is None:
      self._view = jax.block_until_ready(VIEW(self.config, self.params))
    return self._view

  @property
  def block_size(self) -> int:
    """h of its parallel heads, 1 where it has none."""
    return self.own_heads[0].block_size

  @property
  def num_compilations(self) -> int:
    """Programs compiled since this generator was made."""
    return num_compilations() - self._compiled_before

  def generate(
      self,
      prompts: Sequence[str] | Sequence[Sequence[int]],
      method: str | Drafter | Drafting = "auto",
      *,
      search: SearchSettings = SearchSettings(),
      scoring: Sequence[Scoring] = (),
      policing: Policing | None = None,
      costs: CallCosts | None = None,
      max_length: int = 128,
      batch_size: int = 8,
      rule: AcceptanceRule = accept.ExactMatch(),
      references: Sequence[Sequence[int]] | None = None,
      limits: Sequence[int] | None = None,
      buckets: Sequence[int] = INPUT_BUCKETS,
      seed: int = 0,
      has_progress: bool = False,
  ) -> Generation:
    """Decodes every prompt.

    Args:
      prompts: texts (EOS is appended), or lists of token ids taken as they are.
      method: "auto" (the model's parallel heads in blocks of the size that promises most
        tokens a second, none where no block pays), "greedy", "blockwise" (all heads in every
        call), what `heads` made, or a drafter of your own, as a `Drafting` with what it
        learned.
      search: which paths through the lattice are verified; by default its best
        candidate at each step.
      scoring: scorers that re-score the lattice before it is searched.
      policing: how many tokens each row drafts; all that the drafter can by default.
      costs: of calls, by which "auto" chooses; by default measured when it is first asked for
        a batch size. What it has seen of its drafts it remembers from one `generate` to the
        next, but where costs are given: its calls depend on that, and its tokens don't.
      max_length: most tokens of an output.
      batch_size: rows decoded together; the last batch is filled with dead rows.
      rule: which drafted tokens pass; the default is exact.
      references: for a drafter or scorer that reads them, tokens that are known
        beforehand, one list a prompt.
      limits: most tokens of each output, at most `max_length`.
      buckets: input lengths to pad to; the longest prompt must fit the last.
      seed: of the rows' keys, for drafters that draw.
      has_progress: whether to show a progress bar over the batches.

    Returns:
      Tokens, calls and traces in the order of the prompts.

    Raises:
      InputError: naming the argument, before anything is compiled.
      NotFinite: naming prompt and call, where NaN or infinity would choose a token: in
        parameters, or where activations leave the range of float16.
    """
    check_count("max_length", max_length)
    self.partitioning.check_batch(batch_size)
    rows = self.encode_prompts(prompts, buckets)
    limits = self._check_limits(limits, len(rows), max_length)
    names = ("auto", *METHODS)
    if not isinstance(method, Drafter | Drafting) and method not in names:
      raise InputError("method", method, f"one of {names}, a Drafter or a Drafting")
    is_auto, is_given = method == "auto", costs is not None
    if is_given and not is_auto:
      raise InputError("costs", "given", "None but for method 'auto'")
    if is_auto:
      for name, value, plain in (
          ("search", search, SearchSettings()), ("scoring", list(scoring), []),
          ("policing", policing, None), ("rule", rule, accept.ExactMatch()),
          ("references", references, None),
      ):
        if value != plain:
          raise InputError(name, value, f"{plain!r} for method 'auto'; 'blockwise' takes others")
      method = self.heads()
      if is_given:
        costs.check(
            costs_key(self.config, self.partitioning, method, batch_size), self.block_size
        )
        policing = costs.policing()
      elif self.block_size > 1:
        if batch_size in self._auto:
          costs, policing = self._auto[batch_size]
        else:
          costs = self.call_costs(method, rows, batch_size, max_length, buckets)
          policing = costs.policing()
    settings = self.settings(
        method, search=search, scoring=scoring, policing=policing, rule=rule
    )
    if (references is None) == settings.reads_references:
      raise InputError(
          "references", None if references is None else "given",
          "one list of ids a prompt for what reads them, None for all else",
      )
    if references is not None and len(references) != len(rows):
      raise InputError("references", f"{len(references)} lists", f"{len(rows)}, one a prompt")
    for i, reference in enumerate(references or ()):
      self._check_ids(f"references[{i}]", reference)
    params = self.decode_params(method, scoring, policing)
    # Results go back to their places.
    parts = batches([len(row) for row in rows], batch_size)
    done: dict[int, tuple] = {}
    seconds, is_warm = [], []
    for batch in track(parts, "decode", is_shown=has_progress):
      before, began = self.num_compilations, time.perf_counter()
      state = self._decode_rows(
          settings, params, batch, rows, limits, references, buckets, batch_size, max_length,
          seed,
      )
      if policing is not None:
        memory = policing.policy.remember(params.policy, state.pop("policy"))
        params = params.replace(policy=memory)
        policing = dataclasses.replace(policing, params=memory)
      seconds.append(time.perf_counter() - began)
      is_warm.append(self.num_compilations == before)
      check_finite(self.config, state, batch)
      for slot, row in enumerate(batch):
        done[row] = read_row(state, slot)
    tokens, calls, traces = (list(column) for column in zip(*(done[i] for i in range(len(rows)))))
    texts = None
    if self.vocabulary is not None:
      ends = (self.config.eos_id, self.config.pad_id)
      texts = [
          self.vocabulary.decode([int(t) for t in row if t not in ends]) for row in tokens
      ]
    if is_auto and not is_given and policing is not None:
      self._auto[batch_size] = (costs, policing)
    return Generation(tokens, calls, traces, texts, seconds, is_warm, policing, costs)

  def call_costs(
      self, drafting: Drafting, rows: Sequence[Sequence[int]], batch_size: int = 8,
      max_length: int = 128, buckets: Sequence[int] = INPUT_BUCKETS, *, is_fresh: bool = False,
  ) -> CallCosts:
    """What a call of each block size costs: as kept on disk, or measured now.

    Args:
      drafting: what drafts.
      rows: prompts to measure with.
      batch_size: rows of a call.
      max_length: most tokens of an output.
      buckets: as in `generate`.
      is_fresh: whether to measure whatever is kept.

    Raises:
      InputError: naming the argument; for a drafter that reads references.
    """
    self.partitioning.check_batch(batch_size)
    if drafting.drafter.reads_references:
      raise InputError("drafting", drafting.drafter, "one that reads no references")
    rows = self.encode_prompts(rows, buckets)
    # The first of them that isn't finite is one of the prompts themselves.
    rows = [rows[i % len(rows)] for i in range(batch_size)]
    buckets = (input_bucket(max(map(len, rows)), buckets),)

    def run(policing: Policing, limit: int) -> tuple[float, list[int]]:
      found = self.generate(
          rows, drafting, policing=policing, max_length=max_length, batch_size=batch_size,
          limits=[limit] * batch_size, buckets=buckets,
      )
      calls = itertools.zip_longest(*found.traces)
      return found.seconds[0], [
          1 + max(len(call.draft) for call in own if call is not None) for own in calls
      ]

    key = costs_key(self.config, self.partitioning, drafting, batch_size)
    if repr(key) not in self._costs or is_fresh:
      widths = block_sizes(drafting.drafter.depth + 1)
      costs = find_costs(run, widths, key, max_length, is_fresh=is_fresh)
      self._auto.pop(batch_size, None)
      if not costs.may_be_kept:
        return costs
      self._costs[repr(key)] = costs
    return self._costs[repr(key)]

  def heads(self, block_size: int | None = None, top_k: int = 1) -> Drafting:
    """The model's parallel heads as drafters.

    Args:
      block_size: h, the most tokens a call emits; all heads draft by default.
      top_k: candidates that each head offers, k of the lattice.

    Raises:
      InputError: where the model has no such heads.
    """
    addon, own = self.own_heads
    if self._heads_view is None:
      self._heads_view = ADDON_VIEW(addon, own)
    made = addon.make(
        ModelReader(self.model), self._heads_view, block_size=block_size, top_k=top_k
    )
    return made.drafting

  def drafting(self, method: str | Drafter | Drafting) -> Drafting:
    """What a name of `METHODS` stands for, or a drafter that learned nothing.

    Raises:
      InputError: where it is neither.
    """
    if method == "greedy":
      return Drafting(EmptyDrafter())
    if method == "blockwise":
      return self.heads()
    if isinstance(method, Drafter):
      return Drafting(method)
    if not isinstance(method, Drafting):
      raise InputError("method", method, f"one of {METHODS}, a Drafter or a Drafting")
    return method

  def scoring(
      self, weight: float | tuple[float, ...] = 1.0, *, sees_input: bool = True,
      entropy_power: float = 0.0,
  ) -> Scoring:
    """This model as a scorer of the drafts of another one of its vocabulary.

    Args:
      weight: see `Scoring`.
      sees_input: whether its encoder reads the inputs.
      entropy_power: see `Scoring`.
    """
    scorer = NeuralScorer(ModelReader(self.model, sees_input))
    return Scoring(scorer, self.view, weight, entropy_power)

  def settings(
      self, method: str | Drafter | Drafting = "blockwise", *,
      search: SearchSettings = SearchSettings(),
      scoring: Sequence[Scoring] = (), policing: Policing | None = None,
      rule: AcceptanceRule = accept.ExactMatch(),
  ) -> DecodeSettings:
    """What `generate` compiles for these arguments.

    Raises:
      InputError: naming the argument that this model can't decode with.
    """
    return DecodeSettings(
        self.drafting(method).drafter, rule, search,
        Rescorer(tuple(part.scorer for part in scoring)),
        None if policing is None else policing.policy,
    )

  def decode_params(
      self, method: str | Drafter | Drafting = "blockwise", scoring: Sequence[Scoring] = (),
      policing: Policing | None = None,
  ) -> DecodeParams:
    """What `generate` reads for these arguments, on this model's devices.

    What a scorer reads lies where its maker put it, a small model on one device, say, and
    a program takes arguments of one set of devices.

    Raises:
      InputError: for a scorer's weight that isn't one.
    """
    everywhere = self.partitioning.sharding(())
    place = lambda leaf: (
        leaf if isinstance(leaf, jax.Array) and leaf.sharding.device_set == everywhere.device_set
        else jax.device_put(leaf, everywhere)
    )
    drafting = self.drafting(method)
    own = (
        drafting.params, rescorer_params(scoring, drafting.drafter.depth),
        () if policing is None else policing.params,
    )
    return DecodeParams(self.view, *jax.tree.map(place, own))

  def encode_prompts(
      self, prompts: Sequence[str] | Sequence[Sequence[int]],
      buckets: Sequence[int] = INPUT_BUCKETS, names: Sequence[str] | None = None,
  ) -> list[list[int]]:
    """Token ids of each prompt as the model sees them; InputError naming a bad one.

    Args:
      prompts: texts, or lists of token ids.
      buckets: input lengths to pad to; the longest prompt must fit the last.
      names: where each prompt comes from, for errors; its number by default.
    """
    if isinstance(prompts, str) or not len(prompts):
      raise InputError("prompts", prompts, "a non-empty list of texts or of lists of ids")
    rows = []
    for i, prompt in enumerate(prompts):
      name = f"prompts[{i}]" if names is None else names[i]
      if isinstance(prompt, str):
        if self.vocabulary is None:
          raise InputError(
              name, prompt[:40], "token ids, as the model has no vocabulary"
          )
        if not prompt.strip():
          raise InputError(name, prompt, "a text that isn't empty")
        check_text(name, prompt)
        prompt = [*self.vocabulary.encode(prompt), self.config.eos_id]
      row = [int(token) for token in prompt]
      if not row:
        raise InputError(name, row, "at least one token")
      if len(row) > max(buckets):
        raise InputError(
            f"{name} length", len(row), f"1 … {max(buckets)}, the longest bucket"
        )
      self._check_ids(name, row)
      rows.append(row)
    return rows

  def _check_ids(self, name: str, tokens: Sequence[int]) -> None:
    """InputError naming a token that has no row of the embedding table."""
    wrong = [int(token) for token in tokens if not 0 <= token < self.config.vocab_size]
    if wrong:
      raise InputError(f"{name} token", wrong[0], f"0 … {self.config.vocab_size - 1}")

  def _check_limits(self, limits, num_rows: int, max_length: int) -> list[int]:
    if limits is None:
      return [max_length] * num_rows
    if len(limits) != num_rows:
      raise InputError("limits", f"{len(limits)} numbers", f"{num_rows}, one a prompt")
    for i, limit in enumerate(limits):
      if not 1 <= limit <= max_length:
        raise InputError(f"limits[{i}]", limit, f"1 … {max_length}, max_length")
    return list(limits)

  def _decode_rows(
      self, settings, params, batch, rows, limits, references, buckets, batch_size, max_length,
      seed,
  ) -> dict[str, Any]:
    """Decodes one batch and brings what is read of it to the host."""
    longest = max(len(rows[i]) for i in batch)
    input_length = input_bucket(longest, buckets)
    tokens = np.full([batch_size, input_length], self.config.pad_id, np.int32)
    lengths = np.ones([batch_size], np.int32)
    row_limits = np.zeros([batch_size], np.int32)
    known = None
    if references is not None:
      known = np.full([batch_size, max_length], self.config.pad_id, np.int32)
    for slot, i in enumerate(batch):
      tokens[slot, : len(rows[i])] = rows[i]
      lengths[slot] = len(rows[i])
      row_limits[slot] = limits[i]
      if known is not None:
        reference = list(references[i])[:max_length]
        known[slot, : len(reference)] = reference
    place = lambda x, *names: jax.device_put(x, self.partitioning.sharding(names))
    tokens, lengths = place(tokens, "batch", "length"), place(lengths, "batch")
    known = None if known is None else place(known, "batch", "length")
    prompt = Prompt(tokens, lengths, max_length, references=known)
    context = PREFILL(self.model, self.view, tokens, lengths)
    cache = CACHE(self.model, settings, batch_size, max_length)
    numbers = np.resize(batch, batch_size).astype(np.int32)
    state = DECODE(
        self.model, settings, params, context, prompt, place(row_limits, "batch"), seed,
        place(numbers, "batch"), cache,
    )
    return fetch_state(state) | {"policy": state.policy}


def load(
    folder: PathLike, *, partitioning: Partitioning | None = None, dtype: str | None = None
) -> Generator:
  """Reads a model folder, ready to decode.

  Args:
    folder: from `save_model`, training or `python -m bpd_jax.import_checkpoint`.
    partitioning: where it lives; the first device by default.
    dtype: to compute and hold parameters in, instead of the folder's. Greedy's tokens are
      promised in float32 and float64; in bfloat16 and float16 calls over a block and over
      one node differ more often than by near ties.

  Raises:
    InputError: naming the file, field or parameter that isn't as it should be.
  """
  partitioning = partitioning or single_device()
  config, params = load_model(folder, partitioning, dtype)
  vocabulary = load_vocabulary(folder, config.vocab_size)
  fingerprint = load_fingerprint(folder)
  if fingerprint is None and dtype is not None:
    # In fewer bits the values are others; who asks waits until they are read as they are.
    fingerprint = lambda: params_fingerprint(load_model(folder, partitioning)[1])
  generator = Generator(config, params, partitioning, vocabulary, fingerprint)
  generator.own_heads = load_heads(folder, generator)
  return generator


def fetch_state(state: loop.DecodeState) -> dict[str, Any]:
  """What `read_row` reads of a decoded batch, on the host."""
  names = ("tokens", "num_tokens", "num_calls", "trace", "failure")
  return jax.device_get({name: getattr(state, name) for name in names})


def check_finite(config: ModelConfig, state: dict[str, Any], rows: Sequence[int]) -> None:
  """Raises NotFinite where a row of a decoded batch ended so.

  Args:
    config: of the model.
    state: from `fetch_state`.
    rows: which prompt each slot of the batch held.
  """
  failed = [(row, slot) for slot, row in enumerate(rows) if state["failure"][slot]]
  if not failed:
    return
  row, slot = min(failed)
  allowed = "a finite number; parameters may hold NaN or infinity"
  if config.dtype == "float16":
    allowed += ", or activations have left float16's range, where bfloat16 has float32's"
  what = loop.FAILURES[state["failure"][slot]]
  raise NotFinite(row, int(state["num_calls"][slot]), what, allowed)


def read_row(state: dict[str, Any], slot: int) -> tuple[np.ndarray, int, list[Call]]:
  """Tokens, calls and trace of one row of a decoded batch."""
  tokens = state["tokens"][slot, : state["num_tokens"][slot]]
  calls = int(state["num_calls"][slot])
  recorded = jax.tree.map(lambda leaf: leaf[slot], state["trace"])
  trace, start = [], 0
  for call in range(calls):
    end = start + int(recorded.num_emitted[call])
    draft, accepted = recorded.drafts[call], recorded.accepted[call]
    # Node 0, the root, is valid; so numbers of valid nodes begin at its 0.
    is_valid = draft >= 0
    number = np.cumsum(is_valid) - 1
    is_valid[0] = False
    sources = recorded.sources[call][is_valid]
    trace.append(Call(
        draft[is_valid].tolist(), tokens[start:end].tolist(),
        (number[recorded.parents[call][is_valid]] - 1).tolist(),
        (number[accepted[accepted >= 0]] - 1).tolist(),
        sources.tolist() if sources.any() else None,
        bool(recorded.is_exact[call]),
    ))
    start = end
  return tokens, calls, trace
