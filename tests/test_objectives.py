"""Span corruption and prefix-LM on arrays."""

from collections import Counter

import numpy as np
import pytest

from bpd_jax.data import objectives
from bpd_jax.errors import InputError

SENTINELS = range(999, 899, -1)


def restore(inputs, targets):
  """Puts the hidden spans back in the places of their sentinels."""
  spans, tokens = {}, []
  for token in targets:
    if token > 900:
      spans[int(token)] = here = []
    else:
      here.append(int(token))
  for token in inputs:
    tokens += spans.pop(int(token)) if token > 900 else [int(token)]
  assert not spans
  return tokens


@pytest.mark.parametrize("length", [2, 3, 7, 17, 100, 284])
def test_corruption_can_be_undone_and_counts_as_t5_does(length):
  tokens = np.arange(length)
  for seed in range(20):
    inputs, targets = objectives.span_corruption(tokens, SENTINELS, np.random.default_rng(seed))
    assert restore(inputs, targets) == tokens.tolist()
    num_spans = int((inputs > 900).sum())
    assert [token for token in targets if token > 900] == [*SENTINELS[:num_spans]]
    assert [token for token in inputs if token > 900] == [*SENTINELS[:num_spans]]
    assert inputs[0] == 0 and inputs[-1] == SENTINELS[num_spans - 1]
    num_hidden = len(targets) - num_spans
    assert num_hidden == max(1, round(0.15 * length))
    assert num_spans == max(1, round(num_hidden / 3))
    assert inputs.dtype == targets.dtype == np.int32


# What t5's random_spans_helper gives, and one where the targets are what limits.
@pytest.mark.parametrize("lengths, expected", [
    ((512, 114), 568), ((1024, 229), 1137), ((256, 20), 96), ((3, 3), 2),
])
def test_chunks_are_as_long_as_fits(lengths, expected):
  length = objectives.span_corruption_length(*lengths)
  assert length == expected
  for n in range(2, length + 1):
    sides = objectives.span_corruption(np.arange(n), SENTINELS, np.random.default_rng(0))
    assert all(len(side) < most for side, most in zip(sides, lengths))


def test_no_more_spans_than_there_are_sentinels():
  length = objectives.span_corruption_length(10_000, 10_000)
  inputs, _ = objectives.span_corruption(
      np.zeros(length), SENTINELS, np.random.default_rng(0)
  )
  assert np.count_nonzero(inputs) == 100


def test_every_way_to_cut_is_equally_likely():
  rng = np.random.default_rng(0)
  counts = Counter(tuple(objectives._random_lengths(5, 3, rng).tolist()) for _ in range(6000))
  assert set(counts) == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
  assert all(abs(count - 1000) < 120 for count in counts.values())


def test_prefix_is_split_anywhere_that_fits_and_nowhere_else():
  tokens = np.arange(10, 20)
  places = Counter()
  for seed in range(2000):
    inputs, targets = objectives.prefix_lm(tokens, 8, 6, np.random.default_rng(seed))
    assert [*inputs, *targets] == tokens.tolist()
    places[len(inputs)] += 1
  # At most 6 of 10 as targets; an EOS is still to come to the inputs.
  assert set(places) == {4, 5, 6, 7}
  assert all(abs(count - 500) < 100 for count in places.values())
  assert objectives.prefix_lm_length(256, 128) == 256
  assert objectives.prefix_lm_length(64, 128) == 128


def test_shortest_chunk_is_split():
  inputs, targets = objectives.prefix_lm(np.array([5, 6]), 2, 1, np.random.default_rng(0))
  assert (inputs.tolist(), targets.tolist()) == ([5], [6])


@pytest.mark.parametrize("function, lengths", [
    (objectives.span_corruption_length, (2, 9)), (objectives.span_corruption_length, (9, 2)),
    (objectives.prefix_lm_length, (1, 9)),
])
def test_lengths_that_hold_nothing_are_refused(function, lengths):
  with pytest.raises(InputError, match="^lengths = "):
    function(*lengths)


def test_sentinels_are_those_of_the_vocabulary():
  """mT5's stand where its pieces end, others anywhere; without any there are no spans."""
  tokens = np.arange(40)
  sentinels = [700, 300, 500]
  inputs, targets = objectives.span_corruption(tokens, sentinels, np.random.default_rng(3))
  assert [t for t in inputs if t >= 40] == [t for t in targets if t >= 40] == sentinels[:2]
  assert objectives.span_corruption_length(10_000, 10_000, 1) < 40
  with pytest.raises(InputError, match="vocabulary sentinels = 0: allowed is at least 1"):
    objectives.span_corruption_length(256, 128, 0)
