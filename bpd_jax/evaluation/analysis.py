"""Why drafts are accepted or not, from a recording (Kim et al. 2024, §5 and App. H).

`head_statistics` looks at the model's heads alone: accuracy, recall and entropy;
`lattice_statistics` at what any method drafts. `drafts_everywhere` has a method draft
after every prefix of greedy's output, so that two methods can be compared draft by draft
(`compare_drafts`), which their own decoding, at different prefixes, can't.
`describe_repetition` and `efficiency_by_position` read any traces.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.addons.heads import HeadsReader
from bpd_jax.decoding.accept import NothingPasses
from bpd_jax.decoding.rescoring import candidate_entropy, Scoring
from bpd_jax.decoding.types import Drafter, Drafting, Params
from bpd_jax.evaluation.bootstrap import bootstrap_interval
from bpd_jax.evaluation.replay import recorded_loop, recorded_rows, Recording, replay
from bpd_jax.generation import Call, check_finite, Generation, Generator

RECALLS = (1, 2, 4, 8, 16)
# Rows of which all heads' logits are held together.
ROWS = 4


def head_statistics(
    generator: Generator, recording: Recording, heads: Drafting | None = None
) -> dict[str, list]:
  """What each head knows, over every position of greedy's output that it has a token for.

  Args:
    generator: the recorded model.
    recording: of its greedy output.
    heads: what drafts, by `HeadsDrafter`; by default all of the model's own.

  Returns:
    Lists by head, head 1 first: `positions`; `accuracy`; `entropy`, the mean in nats
    over the vocabulary; `recall`, a list for each head, of the k best for each k of
    `RECALLS`; `oracle`, the same of block efficiencies with so many heads, see
    `oracle_calls`.
  """
  heads = heads or generator.heads()
  reader, num_heads = HeadsReader(generator.model), heads.drafter.depth
  params = Params(generator.view, heads.params)
  ranks, entropies = [], []
  for first in range(0, len(recording), ROWS):
    part = np.arange(first, first + ROWS)
    chosen = np.minimum(part, len(recording) - 1)
    lengths = np.where(part < len(recording), recording.lengths[chosen], 0)
    rank, entropy = jax.device_get(_head_ranks(
        reader, num_heads, params, recording.hidden[chosen], recording.tokens[chosen], lengths
    ))
    ranks.append(rank)
    entropies.append(entropy)
  rank = np.concatenate(ranks)[: len(recording)]
  positions = (rank >= 0).sum((0, 1))
  hits = np.stack([((rank >= 0) & (rank < k)).sum((0, 1)) for k in RECALLS], axis=-1)
  recall = (hits / positions[:, None]).tolist()
  tokens = recording.lengths.sum()
  return {
      "positions": positions.tolist(), "accuracy": [row[0] for row in recall],
      "entropy": (np.sum(entropies, axis=0) / positions).tolist(), "recall": recall,
      "oracle": [
          [float(tokens / oracle_calls(rank[..., :heads], recording.lengths, k).sum())
           for k in RECALLS]
          for heads in range(1, len(positions) + 1)
      ],
  }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _head_ranks(reader, num_heads, params, hidden, tokens, lengths):
  """Ranks [rows, length, heads] of greedy's tokens, -1 where there is none; entropy [heads]."""
  batch, length, d = hidden.shape
  states = hidden.reshape(-1, 1, d)
  if num_heads:
    states = jnp.concatenate(
        [states, reader.head_states(params, states[:, 0], num_heads)], axis=1
    )
  logits = reader.logits(params.base, states).reshape(batch, length, num_heads + 1, -1)
  heads = logits.shape[2]
  at = jnp.arange(length)[:, None] + jnp.arange(heads)  # [length, heads]
  has_token = at < lengths[:, None, None]
  right = jnp.take(tokens, jnp.minimum(at, length - 1), axis=1)
  own = jnp.take_along_axis(logits, right[..., None], axis=-1)
  index = jnp.arange(logits.shape[-1])
  # Equal logits rank by index, as in decoding.
  rank = ((logits > own) | ((logits == own) & (index < right[..., None]))).sum(-1)
  logs = jax.nn.log_softmax(logits, axis=-1)
  entropy = -(jnp.exp(logs) * logs).sum(-1)
  return jnp.where(has_token, rank, -1), jnp.where(has_token, entropy, 0).sum((0, 1))


def lattice_statistics(
    generator: Generator, recording: Recording, method: str | Drafter | Drafting = "blockwise",
) -> dict[str, list]:
  """What the steps of a method's lattices know, after every prefix of greedy's output.

  Args:
    generator: the recorded model.
    recording: of its greedy output.
    method: as of `replay`. A drafter that can offer more candidates than it does is
      looked at with as many as `RECALLS` asks for.

  Raises:
    NotFinite: where the drafter comes to NaN, after a prefix that decoding passed over too.

  Returns:
    Lists by step, the token after the root first: `positions`, where greedy has a token;
    `drafted`, the share of them where the step held a draft; `entropy`, the mean of these
    in nats, all that aren't candidates as one outcome; `recall` of all positions, a list a
    step, of the k best for each k of `RECALLS`, None beyond the candidates; `oracle`, the
    same of block efficiencies with so many steps, see `oracle_calls`.
  """
  drafting = generator.drafting(method)
  drafter, most = drafting.drafter, RECALLS[-1]
  fields = dataclasses.fields(drafter) if dataclasses.is_dataclass(drafter) else ()
  if "num_candidates" in {field.name for field in fields}:
    most = min(most, generator.config.vocab_size)
    drafting = dataclasses.replace(
        drafting, drafter=dataclasses.replace(drafter, num_candidates=most)
    )
  k = drafting.drafter.num_candidates
  settings = generator.settings(drafting, rule=NothingPasses())
  params = generator.decode_params(drafting)
  ranks, entropies = [], []
  for first in range(0, len(recording), ROWS):
    part = np.minimum(np.arange(first, first + ROWS), len(recording) - 1)
    num_live = min(ROWS, len(recording) - first)
    rank, entropy, state = jax.device_get(_step_ranks(
        generator.model, settings, params, recorded_rows(recording, part, num_live)
    ))
    check_finite(generator.config, state, part[:num_live])
    ranks.append(rank)
    entropies.append(entropy)
  # As heads would have them: head 1 is never drafted, and always right.
  rank = np.concatenate(ranks)[: len(recording)]
  has_token = rank >= -1
  positions = has_token.sum((0, 1))
  drafted = (rank >= 0).sum((0, 1))
  hits = lambda k: ((rank >= 0) & (rank < k)).sum((0, 1))
  known = [count if count <= k else None for count in RECALLS]
  recall = np.stack([hits(count or 0) / np.maximum(positions, 1) for count in known], axis=-1)
  blank = lambda row: [None if count is None else float(x) for count, x in zip(known, row)]
  tokens = recording.lengths.sum()
  with_base = np.concatenate([np.zeros_like(rank[..., :1]), rank], axis=-1)
  return {
      "positions": positions.tolist(),
      "drafted": (drafted / np.maximum(positions, 1)).tolist(),
      "entropy": (np.sum(entropies, axis=0) / np.maximum(drafted, 1)).tolist(),
      "recall": [blank(row) for row in recall],
      "oracle": [
          blank([
              tokens / oracle_calls(with_base[..., :steps], recording.lengths, count or 1).sum()
              for count in known
          ])
          for steps in range(2, rank.shape[-1] + 2)
      ],
  }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step_ranks(model, settings, params, rows):
  """Ranks [rows, length, depth] of greedy's tokens, summed entropies [depth], and of the last
  state what `check_finite` reads.

  The rank at t is of the draft after t + 1 tokens; -1 where nothing was drafted, -2 where
  greedy has no token.
  """
  loop, state = recorded_loop(model, settings, params, rows)

  def draft(state, _):
    state, called = loop.call(state)
    return state, called.lattice

  length, depth = rows.tokens.shape[1], settings.drafter.depth
  state, lattices = jax.lax.scan(draft, state, None, length=length)
  # The first call drafts before any token is certain, which nobody does well.
  lattices = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1)[:, 1:], lattices)
  at = 1 + jnp.arange(length - 1)[:, None] + jnp.arange(depth)  # [length - 1, depth]
  has_token = at < rows.limits[:, None, None]
  right = jnp.take(rows.tokens, jnp.minimum(at, length - 1), axis=1)
  is_right = lattices.tokens == right[..., None]
  rank = jnp.where(is_right.any(-1), jnp.argmax(is_right, axis=-1), is_right.shape[-1])
  is_drafted = has_token & (jnp.arange(depth) < lattices.num_steps[..., None])
  entropy = candidate_entropy(lattices)
  rank = jnp.where(has_token, jnp.where(is_drafted, rank, -1), -2)
  return (
      jnp.pad(rank, ((0, 0), (0, 1), (0, 0)), constant_values=-2),
      jnp.where(is_drafted, entropy, 0).sum((0, 1)),
      {"failure": state.failure, "num_calls": state.num_calls},
  )


def oracle_calls(rank: np.ndarray, lengths: np.ndarray, k: int) -> np.ndarray:
  """Decoder calls of each row where every call verifies the best choice among the k best.

  The walk is Kim et al. 2024's (§5.3): greedy's continuation is followed while each
  next head has it among its k best.

  Args:
    rank: [rows, length, heads], of greedy's token t + i in head i + 1 at the state that
      chose token t; negative where there is none.
    lengths: [rows], tokens of each row.
    k: candidates of a head.

  Returns:
    [rows] int.
  """
  is_candidate = (rank[..., 1:] >= 0) & (rank[..., 1:] < k)
  accepted = np.logical_and.accumulate(is_candidate, axis=-1).sum(-1)
  calls = np.zeros(len(lengths), int)
  for row, length in enumerate(lengths):
    # The first call has no draft; each later one begins at the newest token's state.
    emitted = min(length, 1)
    calls[row] = emitted
    while emitted < length:
      emitted += accepted[row, emitted - 1] + 1
      calls[row] += 1
  return calls


def rising_heads(entropy: Sequence[float]) -> int:
  """h_max: how many heads, from the first on, have entropies that don't fall."""
  for i in range(1, len(entropy)):
    if entropy[i] < entropy[i - 1]:
      return i
  return len(entropy)


def drafts_everywhere(
    generator: Generator, recording: Recording, *, scoring: Sequence[Scoring] = (),
    **options: Any,
) -> list[list[Call]]:
  """What a method drafts after each prefix of greedy's output.

  Args:
    generator: the recorded model.
    recording: of its greedy output.
    scoring: as of `Generator.generate`.
    **options: as of `replay`.

  Returns:
    For each row a call for each number of certain tokens, from 1 to all but one of
    them; `emitted` is all that greedy emits after them, and `accepted` the nodes that say
    the same, what the draft is worth there.
  """
  found = replay(generator, recording, scoring=scoring, rule=NothingPasses(), **options)
  return [
      [
          dataclasses.replace(
              call, emitted=tokens[n:].tolist(),
              accepted=matching_nodes(call.draft, call.parents, tokens[n:]),
          )
          for n, call in enumerate(trace) if n
      ]
      for tokens, trace in zip(found.tokens, found.traces, strict=True)
  ]


def matching_nodes(
    draft: Sequence[int], parents: Sequence[int], tokens: Sequence[int]
) -> list[int]:
  """The longest way from the root whose tokens are the first of `tokens`, as nodes.

  Paths that aren't merged have several nodes for one prefix; the first of the longest wins.

  Args:
    draft: tokens of the nodes, a parent before its children.
    parents: of each node; -1 for a child of the root.
    tokens: what follows the root.
  """
  best, ways = [], {-1: []}
  for node, (token, parent) in enumerate(zip(draft, parents, strict=True)):
    way = ways.get(parent)
    if way is not None and len(way) < len(tokens) and token == tokens[len(way)]:
      ways[node] = [*way, node]
      best = max(best, ways[node], key=len)
  return best


def first_path(root: int, call: Call) -> list[int]:
  """The root and the first path of a draft: the best one of a search for paths."""
  parents = range(-1, len(call.draft) - 1) if call.parents is None else call.parents
  path, last = [root], -1
  for node, parent in enumerate(parents):
    if parent == last:
      path.append(call.draft[node])
      last = node
  return path


def num_repeats(path: Sequence[int]) -> int:
  """How many tokens of a path equal the one before."""
  return sum(a == b for a, b in zip(path, path[1:]))


def longest_run(path: Sequence[int]) -> int:
  """Tokens of the longest run of one token."""
  longest = run = 1
  for a, b in zip(path, path[1:]):
    run = run + 1 if a == b else 1
    longest = max(longest, run)
  return longest


def describe_repetition(generation: Generation) -> dict[str, float]:
  """Repeats in the drafts of a decoding, each with its root (Kim et al. 2024, §2.1).

  Returns:
    `consecutive`, the share of adjacent pairs that are one token twice; `longest_run`,
    the mean over drafts. Of the first path where there are several.
  """
  pairs = repeats = 0
  runs = []
  for tokens, trace in zip(generation.tokens, generation.traces, strict=True):
    done = 0
    for call in trace:
      if call.draft:
        path = first_path(int(tokens[done - 1]), call)
        pairs += len(path) - 1
        repeats += num_repeats(path)
        runs.append(longest_run(path))
      done += len(call.emitted)
  return {
      "consecutive": repeats / pairs if pairs else 0.0,
      "longest_run": float(np.mean(runs)) if runs else 0.0,
  }


def compare_drafts(
    recording: Recording, before: Sequence[Sequence[Call]], after: Sequence[Sequence[Call]]
) -> dict[str, float]:
  """Two methods draft by draft, from `drafts_everywhere`.

  Returns:
    `wins`, `ties`, `losses`: share of the prefixes where `after` has more, as many or
    fewer accepted tokens; `repairs`: share of the wins whose first path repeats tokens
    less often than before; `regressions`: of the losses, more often.
  """
  wins = ties = losses = repairs = regressions = 0
  for tokens, old_calls, new_calls in zip(recording.tokens, before, after, strict=True):
    for n, (old, new) in enumerate(zip(old_calls, new_calls, strict=True)):
      change = new.num_accepted - old.num_accepted
      root = int(tokens[n])
      repeats = num_repeats(first_path(root, new)) - num_repeats(first_path(root, old))
      wins += change > 0
      ties += change == 0
      losses += change < 0
      repairs += change > 0 and repeats < 0
      regressions += change < 0 and repeats > 0
  total = max(wins + ties + losses, 1)
  return {
      "wins": wins / total, "ties": ties / total, "losses": losses / total,
      "repairs": repairs / wins if wins else 0.0,
      "regressions": regressions / losses if losses else 0.0,
  }


def efficiency_by_position(generation: Generation, width: int = 16) -> list[dict[str, float]]:
  """Block efficiency of calls by where in the output they begin.

  Args:
    generation: any decoding.
    width: positions of a bin.

  Returns:
    For each bin that has calls `start`, `calls` and `block_efficiency`.
  """
  calls: dict[int, int] = {}
  tokens: dict[int, int] = {}
  for trace in generation.traces:
    done = 0
    for call in trace:
      place = done // width
      calls[place] = calls.get(place, 0) + 1
      tokens[place] = tokens.get(place, 0) + len(call.emitted)
      done += len(call.emitted)
  return [
      {
          "start": place * width, "calls": calls[place],
          "block_efficiency": tokens[place] / calls[place],
      }
      for place in sorted(calls)
  ]


def closed_distance(
    plain: np.ndarray, refined: np.ndarray, oracle: np.ndarray
) -> tuple[float, list[float]] | None:
  """The part of the way from plain drafts' block efficiency to the oracle's that a method goes.

  Args:
    plain: [rows], decoder calls of each row with plain drafts.
    refined: [rows], with the method.
    oracle: [rows], with the oracle.

  Returns:
    The part, and its bootstrap 95 % interval; None where the oracle saves no call.
  """
  sums = [column.sum() for column in (plain, refined, oracle)]
  if not sums[2] < sums[0]:
    return None
  return float(_part_of_way(*sums)), bootstrap_interval(_part_of_way, plain, refined, oracle)


def _part_of_way(plain: np.ndarray, refined: np.ndarray, oracle: np.ndarray) -> np.ndarray:
  """From sums of calls: all decode the same tokens, whose number cancels out."""
  way = plain - oracle
  return np.divide(
      oracle * (plain - refined), refined * way, out=np.full(np.shape(way), np.nan), where=way > 0
  )
