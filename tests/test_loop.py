"""Exactness of the loop against the table model (integers, no tolerance)."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulator import count_calls
from table_model import TableModel

from bpd_jax.decoding import accept, search
from bpd_jax.decoding.cache import cache_length
from bpd_jax.decoding.drafters.empty import EmptyDrafter
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.decoding.loop import Loop
from bpd_jax.decoding.types import Drafter, Lattice, Params, Policy, Prompt, Tree

MODEL = TableModel(vocab_size=7)
START = 0
MAX_LENGTH = 23
ROWS = 512


@dataclasses.dataclass(frozen=True)
class NoisyDrafter(Drafter):
  """Drafts from `[rows, n, depth, k]`, which it learned: for n certain tokens."""

  depth: int

  def init(self, params, prompt, context):
    return params.own, jnp.zeros_like(prompt.lengths)

  def start(self, params, state, step, proposed):
    table, num_tokens = state
    return table, num_tokens + step.num_tokens

  def propose(self, params, state, noise, past):
    table, num_tokens = state
    at = jnp.minimum(num_tokens, table.shape[1] - 1)
    tokens = jnp.take_along_axis(table, at[:, None, None, None], axis=1)[:, 0]
    return Lattice(tokens, jnp.zeros(tokens.shape), jnp.where(num_tokens > 0, self.depth, 0))


def decode(the_loop, prompt, seed, limits, num_nodes):
  """Every row of the table model to its end."""
  depth = the_loop.drafter.depth
  state = the_loop.start(
      MODEL.empty_cache(len(seed), cache_length(MAX_LENGTH, depth)), jnp.full_like(limits, START),
      prompt, limits, hidden=jnp.zeros([len(seed), 1]), num_nodes=num_nodes,
  )
  return the_loop.decode(state)


def run(drafter, inputs, seed, eos_position, limits, find_tree, num_nodes, rule):
  parts = Loop(
      MODEL.verify(seed, eos_position), drafter, Params((), inputs), find_tree, MODEL.eos_id,
      rule=rule,
  )
  return decode(parts, Prompt(inputs, limits, MAX_LENGTH, None, inputs), seed, limits, num_nodes)


@functools.partial(jax.jit, static_argnames=("drafter", "rule"))
def decode_chain(drafter, inputs, seed, eos_position, limits, rule=accept.ExactMatch()):
  return run(
      drafter, inputs, seed, eos_position, limits, search.chain, drafter.depth + 1, rule
  )


def make_rows(rng, rows=ROWS):
  """Seeds, EOS at every place, limits at every place, dead rows among them."""
  seed = rng.integers(0, 2**31, rows).astype(np.uint32)
  eos_position = rng.integers(0, MAX_LENGTH + 6, rows).astype(np.int32)
  limits = np.where(
      rng.random(rows) < 0.5, MAX_LENGTH, rng.integers(0, MAX_LENGTH + 1, rows)
  ).astype(np.int32)
  greedy = MODEL.greedy(seed, eos_position, START, MAX_LENGTH + 12)
  return seed, eos_position, limits, greedy


def draft_table(rng, greedy, depth, hit_rate, k=1):
  """[rows, MAX_LENGTH + 1, depth, k] proposals, each right with `hit_rate`."""
  at = np.arange(MAX_LENGTH + 1)[:, None] + np.arange(depth)
  right = greedy[:, np.minimum(at, greedy.shape[1] - 1)]
  # Distinct wrong tokens: the right one plus 1 … vocab - 1.
  order = 1 + np.argsort(rng.random(right.shape + (MODEL.vocab_size - 1,)), -1)
  tokens = (right[..., None] + order[..., :k]) % MODEL.vocab_size
  place = rng.integers(0, k, right.shape)
  hit = rng.random(right.shape) < hit_rate
  is_place = (np.arange(k) == place[..., None]) & hit[..., None]
  return np.where(is_place, right[..., None], tokens).astype(np.int32)


def check_rows(state, table, greedy, eos_position, limits, width):
  """Tokens, calls and the trace of every row against the simulator."""
  state = jax.device_get(state)
  for row in range(len(limits)):
    tokens, emitted = count_calls(
        greedy[row].tolist(),
        lambda n: table[row, min(n, MAX_LENGTH), :, 0].tolist(),
        width, int(limits[row]), MODEL.eos_id,
    )
    where = f"row {row}, eos at {eos_position[row]}, limit {limits[row]}"
    assert state.num_tokens[row] == len(tokens), where
    assert state.tokens[row, : len(tokens)].tolist() == tokens, where
    assert state.num_calls[row] == len(emitted), where
    trace = state.trace.num_emitted[row]
    assert trace[: len(emitted)].tolist() == emitted and not trace[len(emitted) :].any(), where


@pytest.mark.parametrize("block_size", range(1, 11))
@pytest.mark.parametrize("heads", ["perfect", "useless", "random"])
def test_tokens_and_calls_equal_greedy_and_the_simulator(block_size, heads):
  # 30 × 2 × 512 = 30,720 rows. Every EOS place and limit meets every block size.
  rng = np.random.default_rng([block_size, len(heads)])
  hit_rate = {"perfect": 1.0, "useless": 0.0, "random": 0.6}[heads]
  for _ in range(2):
    seed, eos_position, limits, greedy = make_rows(rng)
    table = draft_table(rng, greedy, max(block_size - 1, 1), hit_rate)[:, :, : block_size - 1]
    drafter = NoisyDrafter(block_size - 1)
    if block_size == 1:
      drafter, table = EmptyDrafter(), np.zeros([ROWS, MAX_LENGTH + 1, 0, 1], np.int32)
    state = decode_chain(drafter, table, seed, eos_position, limits)
    check_rows(state, table, greedy, eos_position, limits, block_size)
    num_tokens, num_calls = np.asarray(state.num_tokens), np.asarray(state.num_calls)
    if heads == "perfect":
      expected = np.where(num_tokens > 0, 1 + -(-(num_tokens - 1) // block_size), 0)
      np.testing.assert_array_equal(num_calls, expected)
    if heads == "useless":
      np.testing.assert_array_equal(num_calls, num_tokens)


def test_perfect_reference_needs_one_call_and_a_ceiling():
  rng = np.random.default_rng(5)
  seed, eos_position, limits, greedy = make_rows(rng)
  for block_size in (2, 5, 9):
    state = decode_chain(
        ReferenceDrafter(block_size - 1), greedy, seed, eos_position, limits
    )
    num_tokens = np.asarray(state.num_tokens)
    expected = np.where(num_tokens > 0, 1 + -(-(num_tokens - 1) // block_size), 0)
    np.testing.assert_array_equal(state.num_calls, expected)


def random_tree(lattice, root, parents, candidate):
  """Any tree over the lattice: node i takes a candidate of its depth."""
  depth = jnp.zeros_like(parents)
  for node in range(1, parents.shape[1]):
    depth = depth.at[:, node].set(
        jnp.take_along_axis(depth, parents[:, node : node + 1], 1)[:, 0] + 1
    )
  step = jnp.maximum(depth - 1, 0)
  tokens = jnp.take_along_axis(lattice.tokens, step[..., None], axis=1)
  tokens = jnp.take_along_axis(tokens, candidate[..., None], axis=2)[..., 0]
  return Tree(
      tokens=tokens.at[:, 0].set(root),
      depth=depth,
      parents=parents,
      is_valid=depth <= lattice.num_steps[:, None],
      max_depth=lattice.tokens.shape[1],
  )


@functools.partial(jax.jit, static_argnames=("drafter",))
def decode_trees(drafter, table, seed, eos_position, limits, parents, candidate):
  find_tree = lambda lattice, root, score: random_tree(lattice, root, parents, candidate)
  return run(
      drafter, table, seed, eos_position, limits, find_tree,
      parents.shape[1], accept.ExactMatch(),
  )


def grow_trees(rng, rows, num_nodes, depth, k):
  """Random parents [rows, nodes] with distinct candidates among siblings."""
  parents = np.full([rows, num_nodes], -1, np.int32)
  candidate = np.zeros([rows, num_nodes], np.int32)
  for row in range(rows):
    used, level = {0: set()}, [0]
    for node in range(1, num_nodes):
      free = [p for p in range(node) if level[p] < depth and len(used[p]) < k]
      parent = int(rng.choice(free))
      choice = int(rng.choice([c for c in range(k) if c not in used[parent]]))
      used[parent].add(choice)
      used[node] = set()
      level.append(level[parent] + 1)
      parents[row, node], candidate[row, node] = parent, choice
  return parents, candidate


def walk_trees(greedy, table, parents, candidate, depth, limit):
  """The simulator for a tree: the deepest branch that follows greedy."""
  tokens, emitted = [], []
  num_nodes = len(parents)
  while len(tokens) < limit and MODEL.eos_id not in tokens:
    n = len(tokens)
    best, paths = [], {0: []}
    for node in range(1, num_nodes):
      above = paths.get(parents[node])
      if above is None or n == 0 or MODEL.eos_id in above:
        continue
      token = int(table[min(n, MAX_LENGTH), len(above), candidate[node]])
      if token == greedy[n + len(above)]:
        paths[node] = above + [token]
    best = max(paths.values(), key=len)
    fresh = best + ([] if MODEL.eos_id in best else [int(greedy[n + len(best)])])
    fresh = fresh[: limit - n]
    tokens += fresh
    emitted.append(len(fresh))
  return tokens, emitted


@pytest.mark.parametrize("num_nodes,depth,k", [(6, 3, 2), (12, 4, 3), (17, 5, 4)])
def test_trees_equal_greedy(num_nodes, depth, k):
  rng = np.random.default_rng(num_nodes)
  seed, eos_position, limits, greedy = make_rows(rng)
  table = draft_table(rng, greedy, depth, 0.85, k)
  parents, candidate = grow_trees(rng, ROWS, num_nodes, depth, k)
  state = decode_trees(NoisyDrafter(depth), table, seed, eos_position, limits, parents, candidate)
  state = jax.device_get(state)
  for row in range(ROWS):
    tokens, emitted = walk_trees(
        greedy[row], table[row], parents[row], candidate[row], depth, int(limits[row])
    )
    assert state.tokens[row, : state.num_tokens[row]].tolist() == tokens
    assert state.trace.num_emitted[row, : state.num_calls[row]].tolist() == emitted
    check_record(state, row)


def check_record(state, row):
  """The nodes that a row's trace calls accepted are a way from the root with what was emitted."""
  trace, done = jax.tree.map(lambda leaf: leaf[row], state.trace), 0
  for call in range(len(trace.num_emitted)):
    emitted = state.tokens[row, done : done + trace.num_emitted[call]].tolist()
    done += len(emitted)
    nodes = trace.accepted[call]
    assert (nodes[(nodes >= 0).sum() :] == -1).all()
    nodes = nodes[nodes >= 0]
    assert trace.parents[call][nodes].tolist() == [0, *nodes[:-1]][: len(nodes)]
    assert trace.drafts[call][nodes].tolist() == emitted[: len(nodes)]
    # Fewer than all but one only where nothing was accepted that could be.
    is_last = done == state.num_tokens[row]
    assert len(emitted) - len(nodes) in ((0, 1) if is_last else (1,))


@dataclasses.dataclass(frozen=True)
class Marked(NoisyDrafter):
  """Says of every candidate which of several drafters it is from: as many as candidates."""

  def propose(self, params, state, noise, past):
    lattice = super().propose(params, state, noise, past)
    numbers = jnp.arange(1, lattice.tokens.shape[2] + 1)
    return lattice.replace(sources=jnp.broadcast_to(numbers, lattice.tokens.shape))


def test_the_trace_knows_whose_each_node_is():
  rng = np.random.default_rng(8)
  seed, eos_position, limits, greedy = make_rows(rng, 64)
  table = draft_table(rng, greedy, 4, 0.85, 3)
  parents, candidate = grow_trees(rng, 64, 12, 4, 3)
  rows = (table, seed, eos_position, limits, parents, candidate)
  plain, marked = (jax.device_get(decode_trees(kind(4), *rows)) for kind in (NoisyDrafter, Marked))
  np.testing.assert_array_equal(plain.tokens, marked.tokens)
  assert not plain.trace.sources.any()
  is_drafted = marked.trace.drafts >= 0
  is_drafted[..., 0] = False
  expected = np.broadcast_to(candidate[:, None] + 1, is_drafted.shape)
  np.testing.assert_array_equal(marked.trace.sources[is_drafted], expected[is_drafted])
  assert is_drafted.any() and not marked.trace.sources[..., 0].any()


@dataclasses.dataclass(frozen=True)
class Turns(Policy):
  """Rows draft in every `period`-th call, `depth` tokens, of which row r's first r mod 5 count."""

  depth: int
  widths: tuple[int, ...] = ()

  def init(self, params, prompt, context):
    return jnp.zeros_like(prompt.lengths), prompt.lengths > 0

  def start(self, params, state, step, is_live):
    return state[0] + 1, is_live

  def rested(self, params, state, num_calls):
    return state[0] + num_calls, state[1]

  def wants(self, params, state):
    # Another turn for every row, so that some draft while others don't.
    has_turn = (state[0] + jnp.arange(len(state[0]))) % params == 0
    return jnp.where(has_turn, self.depth, 0)

  def trim(self, params, state, lattice):
    return jnp.minimum(lattice.num_steps, jnp.arange(len(lattice.num_steps)) % 5)


@functools.partial(jax.jit, static_argnames=("policy",))
def decode_in_turns(policy, period, table, seed, eos_position, limits):
  parts = Loop(
      MODEL.verify(seed, eos_position), NoisyDrafter(4), Params((), table), search.chain,
      MODEL.eos_id, policy=policy, policy_params=period,
      widths=tuple(sorted({1, 5, *policy.widths})),
  )
  return decode(parts, Prompt(table, limits, MAX_LENGTH), seed, limits, 5)


@pytest.mark.parametrize("widths", [(), (2,), (2, 3, 4)])
@pytest.mark.parametrize("depth", [1, 3, 4])
@pytest.mark.parametrize("period", [1, 2, 5])
def test_a_policy_saves_drafts_and_changes_no_token(period, depth, widths):
  rng = np.random.default_rng([period, depth])
  seed, eos_position, limits, greedy = make_rows(rng, 200)
  table = draft_table(rng, greedy, 4, 0.8)
  state = jax.device_get(
      decode_in_turns(Turns(depth, widths), period, table, seed, eos_position, limits)
  )
  assert (state.policy[0] == state.call).all()
  for row in range(200):
    calls = itertools.count()

    def draft_after(n, row=row, calls=calls):
      # The first call, which has no draft, is number 0.
      wants = (next(calls) + 1 + row) % period == 0
      return table[row, min(n, MAX_LENGTH), : min(depth, row % 5), 0].tolist() if wants else []

    tokens, emitted = count_calls(
        greedy[row].tolist(), draft_after, 5, int(limits[row]), MODEL.eos_id
    )
    assert state.tokens[row, : state.num_tokens[row]].tolist() == tokens
    assert state.trace.num_emitted[row, : state.num_calls[row]].tolist() == emitted
    drafts = state.trace.drafts[row, : state.num_calls[row], 1:]
    assert ((drafts >= 0).sum(-1) <= min(depth, row % 5)).all()
  if period == 5:
    assert (state.trace.drafts[:, 1:, 1] < 0).any()


def test_a_call_is_as_wide_as_the_drafts_of_live_rows():
  """The least of the compiled sizes that holds them; rows that ended hold none wide."""
  rng = np.random.default_rng(11)
  widths, policy, seen = (1, 2, 3, 5), Turns(4, (2, 3)), []
  seed, eos_position, limits, greedy = make_rows(rng, 12)
  limits = np.where(np.arange(12) % 5 == 4, 4, limits)  # those with the longest drafts end soon
  table = draft_table(rng, greedy, 4, 0.6)
  verify = MODEL.verify(seed, eos_position)

  def spying(cache, tree):
    jax.debug.callback(lambda: seen.append(tree.tokens.shape[1]), ordered=True)
    return verify(cache, tree)

  parts = Loop(
      spying, NoisyDrafter(4), Params((), table), search.chain, MODEL.eos_id, policy=policy,
      policy_params=3, widths=widths,
  )
  state = jax.device_get(jax.jit(lambda: decode(
      parts, Prompt(table, limits, MAX_LENGTH), seed, limits, 5
  ))())
  jax.effects_barrier()
  drafted = (state.trace.drafts[:, : state.call, 1:] >= 0).sum(-1).max(0)
  assert seen == [next(width for width in widths if width > most) for most in drafted]
  assert set(seen) == set(widths)


def test_finished_and_padding_rows_stay_as_they_are():
  rng = np.random.default_rng(3)
  seed, eos_position, limits, greedy = make_rows(rng, 64)
  eos_position[0], limits[0] = 0, MAX_LENGTH  # ends with the first call
  limits[1] = 0  # a row that only pads
  table = draft_table(rng, greedy, 4, 0.5)
  state = decode_chain(NoisyDrafter(4), table, seed, eos_position, limits)
  state = jax.device_get(state)
  assert state.call > 5
  assert state.num_calls[0] == 1 and state.num_tokens[0] == 1 and state.root[0] == MODEL.eos_id
  assert state.num_calls[1] == 0 and state.num_tokens[1] == 0 and state.root[1] == START
  assert (state.trace.drafts[0, 1:] == -1).all() and (state.trace.drafts[1] == -1).all()
  # A row alone and the same row in a batch of others are one and the same.
  for row in range(0, 64, 7):
    one = slice(row, row + 1)
    alone = decode_chain(
        NoisyDrafter(4), table[one], seed[one], eos_position[one], limits[one]
    )
    np.testing.assert_array_equal(alone.tokens[0, : alone.num_tokens[0]],
                                  state.tokens[row, : state.num_tokens[row]])
    assert alone.num_calls[0] == state.num_calls[row]


@pytest.mark.parametrize(
    "rule",
    [
        accept.ApproximateTopK(1), accept.ApproximateDistance(0),
        accept.ApproximateMinimumBlock(1),
    ],
)
def test_approximate_rules_at_their_strictest_are_exact(rule):
  rng = np.random.default_rng(11)
  seed, eos_position, limits, greedy = make_rows(rng)
  table = draft_table(rng, greedy, 5, 0.7)
  state = decode_chain(NoisyDrafter(5), table, seed, eos_position, limits, rule)
  check_rows(state, table, greedy, eos_position, limits, 6)
