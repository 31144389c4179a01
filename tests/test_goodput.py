"""The policy by goodput: what it chooses, what that saves, and that it changes no token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import decode, draft_table, make_rows, MAX_LENGTH, MODEL, NoisyDrafter

from bpd_jax.decoding import search
from bpd_jax.decoding.loop import empty_step, Loop
from bpd_jax.decoding.policies.goodput import block_sizes, Goodput
from bpd_jax.decoding.types import Params, Prompt

POLICY = Goodput((1, 2, 3, 5))
DEPTH = 4
ROWS = 96


@jax.jit
def decode_auto(params, table, seed, eos_position, limits):
  parts = Loop(
      MODEL.verify(seed, eos_position), NoisyDrafter(DEPTH), Params((), table), search.chain,
      MODEL.eos_id, policy=POLICY, policy_params=params, widths=POLICY.widths,
  )
  state = decode(parts, Prompt(table, limits, MAX_LENGTH), seed, limits, DEPTH + 1)
  return state, POLICY.remember(params, state.policy)


def widths_of(state):
  """[calls] block size of each call of the loop."""
  drafted = (np.asarray(state.trace.drafts)[:, : int(state.call)] >= 0).sum(-1)
  return drafted.max(0)


def decode_batches(params, rng, hit_rate, num_batches, rows=8):
  """Widths of the calls of some batches of full length, one after the other."""
  widths = []
  for _ in range(num_batches):
    seed, _, limits, _ = make_rows(rng, rows)
    never = np.full([rows], MAX_LENGTH + 20, np.int32)
    greedy = MODEL.greedy(seed, never, 0, MAX_LENGTH + 12)
    table = draft_table(rng, greedy, DEPTH, 1.0)
    wrong = (table + 1) % MODEL.vocab_size
    passes = rng.random(table.shape) < np.asarray(hit_rate)[..., None]
    table = np.where(passes, table, wrong).astype(np.int32)
    full = np.full_like(limits, MAX_LENGTH)
    state, params = decode_auto(params, table, seed, never, full)
    assert (np.asarray(state.tokens)[:, :MAX_LENGTH] == greedy[:, :MAX_LENGTH]).all()
    widths.extend(widths_of(state).tolist())
  return widths, params


@pytest.mark.parametrize("hit_rate", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seconds", [(1, 1, 1, 1), (1, 2, 3, 5), (1, 9, 9, 9), (1, 1.1, 1.2, 4)])
def test_tokens_are_greedys_whatever_calls_cost(hit_rate, seconds):
  rng = np.random.default_rng([int(hit_rate * 10), int(sum(seconds) * 10)])
  params = POLICY.params(seconds)
  for _ in range(2):
    seed, eos_position, limits, greedy = make_rows(rng, ROWS)
    table = draft_table(rng, greedy, DEPTH, hit_rate)
    state, params = decode_auto(params, table, seed, eos_position, limits)
    state = jax.device_get(state)
    for row in range(ROWS):
      expected = list(greedy[row, : limits[row]])
      if MODEL.eos_id in expected:
        expected = expected[: expected.index(MODEL.eos_id) + 1]
      assert state.tokens[row, : state.num_tokens[row]].tolist() == expected
      emitted = state.trace.num_emitted[row]
      assert emitted[: state.num_calls[row]].min(initial=1) >= 1 and emitted.sum() == len(expected)


def test_the_width_that_pays_is_taken():
  rng = np.random.default_rng(0)
  # Blocks that cost next to nothing, and right drafts: the widest, but for each first call.
  widths, _ = decode_batches(POLICY.params((1, 1.1, 1.2, 1.3)), rng, [1.0] * 4, 6)
  assert set(widths) == {1, 5} and widths.count(1) == 6
  # Two tokens that always pass and two that never do: three nodes.
  widths, params = decode_batches(POLICY.params((1, 1.2, 1.4, 1.8)), rng, [1, 1, 0, 0], 6)
  assert np.mean(np.array(widths[20:]) == 3) > 0.8 and widths[1] == 5
  # What was seen is remembered: the next batch begins with it.
  again, _ = decode_batches(params, rng, [1, 1, 0, 0], 1)
  assert again[:4] == [1, 3, 3, 3]
  # Nodes as dear as calls: none is worth more than the root alone.
  widths, _ = decode_batches(POLICY.params((1, 2, 3, 5)), rng, [0.6] * 4, 30)
  assert np.mean(np.array(widths) > 1) < 0.1


def test_useless_drafts_cost_little_and_pauses_double():
  rng = np.random.default_rng(1)
  seconds = {1: 1.0, 2: 1.5, 3: 2.0, 5: 3.0}
  widths, params = decode_batches(POLICY.params(tuple(seconds.values())), rng, [0.0] * 4, 60)
  tries = np.flatnonzero(np.array(widths) > 1)
  pauses = np.diff(tries) - 1
  assert pauses[:4].tolist() == [4, 8, 16, 32]
  # The longest keeps what trying costs near a hundredth of the time.
  assert set(pauses[5:]) <= {49, 50}
  spent = sum(seconds[width] for width in widths)
  assert spent / len(widths) < 1.02
  # A pause goes on where the next batch begins, and drafts that became good are found.
  assert params.rest > 0
  widths, _ = decode_batches(params, rng, [1.0] * 4, 60)
  first = next(i for i, width in enumerate(widths) if width > 1)
  assert first <= 50 and np.mean(np.array(widths[first + 100 :]) == 5) > 0.6


def test_a_width_that_costs_endlessly_is_never_taken():
  rng = np.random.default_rng(2)
  for number, width in enumerate(POLICY.widths):
    costs = np.where(np.arange(4) == number, 1.0, np.inf)
    widths, _ = decode_batches(POLICY.params(costs), rng, [0.7] * 4, 2)
    # The first call has nothing to draft from.
    assert set(widths) == {1, width}
    assert widths.count(1) == (len(widths) if width == 1 else 2)


def test_ended_rows_say_nothing_and_count_for_nothing():
  """Of what a row's end cut off nothing is known; and live rows alone choose the width."""
  rng = np.random.default_rng(3)
  seed, _, _, _ = make_rows(rng, 2)
  never = np.full([2], MAX_LENGTH + 20, np.int32)
  greedy = MODEL.greedy(seed, never, 0, MAX_LENGTH + 12)
  table = draft_table(rng, greedy, DEPTH, 1.0)
  table[1] = (table[1] + 1) % MODEL.vocab_size  # the second row's drafts are all wrong
  limits = np.array([3, MAX_LENGTH], np.int32)
  state, params = decode_auto(POLICY.params((1, 1.1, 1.2, 1.3)), table, seed, never, limits)
  # The first row's only draft was cut off by its limit; the second's failed at the first place.
  assert params.passed.sum() == 0 and params.tried[1:].sum() == 0 and params.tried[0] > 0
  tokens = np.asarray(state.tokens)
  assert tokens[0, :3].tolist() == greedy[0, :3].tolist()


@pytest.mark.parametrize("most, sizes", [
    (1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (5, (1, 2, 3, 5)), (8, (1, 2, 4, 8)),
    (9, (1, 3, 5, 9)), (16, (1, 4, 8, 16)),
])
def test_block_sizes(most, sizes):
  assert block_sizes(most) == sizes


def test_live_rows_alone_choose_the_width():
  """A row that ended and whose drafts were all wrong doesn't stop one whose drafts are right."""
  params = POLICY.params((1, 1.6, 2.2, 3.4))
  prompt = Prompt(jnp.zeros([2, 1], jnp.int32), jnp.ones([2], jnp.int32), MAX_LENGTH)
  state = POLICY.init(params, prompt, None)
  seen = jnp.full([DEPTH], 40.0)
  state = state.replace(
      tried=2 * seen, passed=seen, row_tried=jnp.full([2, DEPTH], 40.0),
      row_passed=jnp.array([[0.0] * DEPTH, [40.0] * DEPTH]),
  )
  step = empty_step(jnp.zeros([2, 1]), DEPTH).replace(
      num_tokens=jnp.array([1, 5]), num_verified=jnp.full([2], DEPTH, jnp.int32)
  )
  alone = POLICY.start(params, state, step, jnp.array([False, True]))
  both = POLICY.start(params, state, step, jnp.array([True, True]))
  assert (alone.depth, alone.rest) == (DEPTH, 0) and both.rest > 0
