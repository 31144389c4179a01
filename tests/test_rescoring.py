"""Rescored lattices in the loop against the table model: greedy's tokens, whatever judges."""

import functools

import jax
import jax.numpy as jnp
from lattices import HashScorer
import numpy as np
import pytest
from table_model import TableModel
import test_loop

from bpd_jax.decoding import loop
from bpd_jax.decoding.rescoring import constant_weights, Rescorer, RescorerParams
from bpd_jax.decoding.scorers.cache_ngram import CacheNgramScorer
from bpd_jax.decoding.scorers.no_repeat import NoRepeatScorer
from bpd_jax.decoding.scorers.reference import ReferenceScorer
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Params, Prompt

MODEL = TableModel(vocab_size=7)
MAX_LENGTH = test_loop.MAX_LENGTH
ROWS = 128
DEPTH, K = 4, 3

SCORERS = {
    "none": (),
    "no_repeat": (NoRepeatScorer(),),
    "cache": (CacheNgramScorer(MODEL.vocab_size),),
    "pair": (HashScorer(1), NoRepeatScorer()),
    "whole": (HashScorer(-1),),
    "three": (HashScorer(2), CacheNgramScorer(MODEL.vocab_size, order=2)),
}
SEARCHES = {
    "chain": SearchSettings(),
    "16-best": SearchSettings("p_best", num_paths=16),
    "5-best in 9": SearchSettings("p_best", num_paths=5, num_nodes=9),
    "beam": SearchSettings("beam", num_paths=3, beam_width=4),
    "batched": SearchSettings("batched", num_paths=3),
    "best first": SearchSettings("best_first", num_nodes=12),
}


@functools.partial(jax.jit, static_argnames=("search", "rescorer"))
def decode(search, rescorer, weights, table, greedy, seed, eos_position, limits):
  """Every row to its end; `greedy` is what the oracle knows."""
  drafter = test_loop.NoisyDrafter(DEPTH)
  params = RescorerParams(weights, ((),) * len(rescorer.scorers))
  # The scorers' input: any tokens. The drafter's table is what it learned.
  prompt = Prompt(
      table[:, 0, :, 0], jnp.full_like(limits, DEPTH), MAX_LENGTH, references=greedy
  )
  parts = loop.Loop(
      MODEL.verify(seed, eos_position), drafter, Params((), table), search,
      MODEL.eos_id, rescorer, params,
  )
  return test_loop.decode(parts, prompt, seed, limits, search.nodes(DEPTH))


def run(rng, search, scorers, hit_rate, rows=ROWS):
  """Decodes random rows; returns the state, greedy's tokens, lengths and the table."""
  seed, eos_position, limits, greedy = test_loop.make_rows(rng, rows)
  table = test_loop.draft_table(rng, greedy, DEPTH, hit_rate, K)
  weights = constant_weights((0.7,) * len(scorers), DEPTH) if scorers else None
  state = decode(
      search, Rescorer(scorers), weights, table, greedy, seed, eos_position, limits
  )
  lengths = np.minimum(limits, eos_position + 1)
  return jax.device_get(state), greedy, lengths, table


# Each pair is a loop to compile. A third of them are always run, every scorer and every
# search among them; the others are slow.
PAIRS = [
    pytest.param(scorers, search, marks=[pytest.mark.slow] if (i + j) % 3 else [])
    for i, scorers in enumerate(SCORERS) for j, search in enumerate(SEARCHES)
]


@pytest.mark.parametrize("scorers,search", PAIRS)
def test_tokens_are_greedys(scorers, search):
  # 36 × 128 rows. No scorer and no search may change what is emitted.
  rng = np.random.default_rng([len(scorers), len(search)])
  state, greedy, lengths, _ = run(rng, SEARCHES[search], SCORERS[scorers], 0.8)
  assert state.num_tokens.tolist() == np.maximum(lengths, 0).tolist()
  for row in range(ROWS):
    n = state.num_tokens[row]
    assert state.tokens[row, :n].tolist() == greedy[row, :n].tolist(), f"row {row}"
    assert state.num_calls[row] <= n
  # Not one token a call: drafts were accepted.
  assert state.num_calls.sum() < 0.9 * state.num_tokens.sum()


def test_the_oracle_takes_what_the_lattice_has():
  rng = np.random.default_rng(3)
  state, greedy, lengths, table = run(rng, SearchSettings(), (ReferenceScorer(),), 0.7)
  for row in range(ROWS):
    n, calls = 0, 0
    while n < lengths[row]:
      right = 0
      while n and right < DEPTH and greedy[row, n + right] in table[row, n, right]:
        right += 1
        if greedy[row, n + right - 1] == MODEL.eos_id:
          break
      ended = right and greedy[row, n + right - 1] == MODEL.eos_id
      n += right + (not ended)
      calls += 1
    assert state.num_calls[row] == calls, f"row {row}"


def test_more_paths_need_no_more_calls_and_16_best_is_between_chain_and_oracle():
  calls = []
  for search, scorers in [
      (SearchSettings(), ()), (SearchSettings("p_best", num_paths=16), ()),
      # 81 = 3^4 paths are all there are, of 120 prefixes.
      (SearchSettings("p_best", num_paths=81, num_nodes=121, beam_width=81), ()),
      (SearchSettings(), (ReferenceScorer(),)),
  ]:
    state, *_ = run(np.random.default_rng(5), search, scorers, 0.8, 64)
    calls.append(int(state.num_calls.sum()))
  chain, best, every, oracle = calls
  assert oracle == every < best < chain


def test_no_repeat_sees_the_root_and_the_draft():
  scorer = NoRepeatScorer()
  root = jnp.array([4, 9], jnp.int32)
  candidates = jnp.array([[4, 5], [4, 9]], jnp.int32)
  trails = scorer.begin((), root, 2, 2)
  first = scorer.score((), root, trails, candidates, 0)
  assert first.tolist() == [[[-1, 0]] * 2, [[0, -1]] * 2]
  parents, more = jnp.array([[0, 0], [0, 1]]), jnp.array([[5, 7], [4, 9]])
  trails = scorer.extend((), root, trails, parents, more, 0)
  later = scorer.score((), root, trails, candidates, 1)
  assert later.tolist() == [[[0, -1], [0, 0]], [[-1, 0], [0, -1]]]


def cache_prob(text, context, token, vocab_size, smoothing):
  """The same model with a dictionary's patience."""
  prob = 1 / vocab_size
  for n in range(len(context) + 1):
    before = context[len(context) - n :]
    places = [
        j for j in range(n, len(text))
        if text[j] >= 0 and text[j - n : j] == before
    ]
    hits = sum(text[j] == token for j in places)
    prob = (hits + smoothing * prob) / (len(places) + smoothing)
  return prob


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("sees_input", [True, False])
def test_cache_ngrams_are_counts_of_input_and_prefix(order, sees_input):
  rng = np.random.default_rng(order)
  scorer = CacheNgramScorer(6, order=order, smoothing=0.4, sees_input=sees_input)
  rows = 40
  tokens = rng.integers(1, 6, [rows, 12]).astype(np.int32)
  lengths = rng.integers(1, 13, rows).astype(np.int32)
  state = scorer.init((), Prompt(tokens, lengths, 30), None)
  outputs = [[] for _ in range(rows)]
  for _ in range(4):
    block = rng.integers(1, 6, [rows, 5]).astype(np.int32)
    num_tokens = rng.integers(0, 6, rows).astype(np.int32)
    step = loop.empty_step(jnp.zeros([rows, 1]), 4).replace(
        tokens=jnp.array(block), num_tokens=jnp.array(num_tokens)
    )
    state = scorer.start((), state, step, None)
    for row in range(rows):
      outputs[row] += block[row, : num_tokens[row]].tolist()
  candidates = np.array([np.arange(1, 6)] * rows, np.int32)
  drafted = np.zeros([rows, 2, 0], np.int32)
  trails = scorer.begin((), state, 2, 3)
  for i in range(3):
    found = scorer.score((), state, trails, jnp.array(candidates), i)
    for row in range(rows):
      # Between input and output stands what no n-gram crosses.
      text = tokens[row, : lengths[row]].tolist() if sees_input else []
      text += [-1] * (12 - len(text)) + outputs[row]
      for path in range(2):
        context = ([-2] * order + outputs[row] + drafted[row, path].tolist())
        context = context[len(context) - order + 1 :]
        for c in range(5):
          expected = cache_prob(text, context, int(candidates[row, c]), 6, 0.4)
          np.testing.assert_allclose(np.exp(found[row, path, c]), expected, rtol=1e-4)
    # Each path goes on from one of the two.
    parents, more = rng.integers(0, 2, [rows, 2]), rng.integers(1, 6, [rows, 2])
    trails = scorer.extend((), state, trails, jnp.array(parents), jnp.array(more, jnp.int32), i)
    drafted = np.take_along_axis(drafted, parents[..., None], axis=1)
    drafted = np.concatenate([drafted, more[..., None]], axis=2)
