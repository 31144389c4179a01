"""Counts, smoothing and pruning: beside dictionaries, by hand, and that they sum to 1."""

import itertools
import math

import ngram_reference as reference
import numpy as np
import pytest

from bpd_jax.errors import InputError
from bpd_jax.ngram_lm.backoff import gram_tokens, join_sequences, LOG_ZERO
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.pruning import prune_to_count, prune_to_threshold
from bpd_jax.ngram_lm.smoothing import katz, katz_counts, kneser_ney, kneser_ney_amounts

VOCAB = 17
SMOOTHINGS = {"katz": (katz, reference.Katz), "kneser_ney": (kneser_ney, reference.KneserNey)}
CUTOFFS = {"all": (1, 1, 1, 1, 1), "some": (1, 2, 2, 4, 4)}


def counted(seed, order, num=150, vocab_size=VOCAB):
  sequences = reference.random_sequences(seed, vocab_size, num)
  tokens = join_sequences(sequences, vocab_size)
  return sequences, tokens, count_grams(tokens, order, vocab_size)


def histories(model, random, num=60):
  """Contexts of the model, and others, of every length."""
  out = [()]
  for n in range(1, model.order):
    grams = gram_tokens(model.orders, n).T
    out += [tuple(gram) for gram in grams[random.permutation(len(grams))[:num]].tolist()]
    out += [tuple(row) for row in random.integers(0, model.vocab_size, [num, n]).tolist()]
  return out


def check_sums(model, seed=0):
  slow = reference.Dictionary(model)
  for history in histories(model, np.random.default_rng(seed)):
    assert slow.probs(history).sum() == pytest.approx(1, abs=1e-6), history
  values = np.concatenate([*model.log_probs, *model.back_offs])
  assert np.isfinite(values).all() and np.concatenate(model.log_probs).max() <= 1e-9
  assert model.log_probs[0][0] == LOG_ZERO


def test_counts_are_the_dictionarys():
  for order in range(1, 6):
    sequences, _, counts = counted(order, order)
    for n, slow in enumerate(reference.count(sequences, order)):
      grams = [tuple(gram) for gram in gram_tokens(counts.orders, n + 1).T.tolist()]
      assert grams == sorted(grams) and len(set(grams)) == len(grams)
      found = dict(zip(grams, counts.counts[n].tolist()))
      assert {gram: count for gram, count in found.items() if count} == slow
      if n:
        below = gram_tokens(counts.orders, n).T.tolist()
        suffixes = [tuple(below[i]) for i in counts.orders[n].suffix]
        assert suffixes == [gram[1:] for gram in grams]


def test_ids_of_a_large_vocabulary_do_not_run_over():
  vocab_size = 250_000
  sequences = [np.asarray([249_999, 249_998, 249_999]), np.asarray([249_999, 249_998, 5])]
  counts = count_grams(join_sequences(sequences, vocab_size), 4, vocab_size)
  for n, slow in enumerate(reference.count(sequences, 4)):
    grams = map(tuple, gram_tokens(counts.orders, n + 1).T.tolist())
    found = {gram: count for gram, count in zip(grams, counts.counts[n].tolist()) if count}
    assert found == slow


def test_sequences_are_closed_once():
  tokens = join_sequences([[5, 6], [5, 6, 1], [], [1]], 8)
  assert tokens.tolist() == [0, 5, 6, 1, 0, 5, 6, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("sequences, message", [
    ([[5], [6, 8]], r"^sequence 1 token = 8: allowed is 0 … 7, 0 only before"),
    ([[5], [6], [-1, 5]], "^sequence 2 token = -1"),
    ([[5, 0]], "^sequence 0 token = 0"),
    ([[5], [1, 5]], "^sequence 1 token = 1"),
    ([], "^sequences = 'none'"),
])
def test_sequences_that_are_wrong_are_named(sequences, message):
  with pytest.raises(InputError, match=message):
    join_sequences(sequences, 8)


@pytest.mark.parametrize("cutoffs", [(1, 1), (1, 2, 1), (2, 2, 2), (1, 0, 1)])
def test_cutoffs_that_would_leave_holes_are_refused(cutoffs):
  with pytest.raises(InputError, match="^cutoffs = "):
    kneser_ney(counted(0, 3, 5)[2], cutoffs)
  with pytest.raises(InputError, match="^order = 6"):
    count_grams(np.asarray([0, 5, 1]), 6, 8)


@pytest.mark.parametrize("which", ["all", "some"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("smoothing", ["katz", "kneser_ney"])
def test_probabilities_are_the_dictionarys_and_sum_to_1(smoothing, order, which):
  smooth, slow_class = SMOOTHINGS[smoothing]
  sequences, tokens, counts = counted(order, order)
  cutoffs = CUTOFFS[which][:order]
  model = smooth(counts, cutoffs)
  check_sums(model)
  slow = slow_class(sequences, order, VOCAB, cutoffs)
  fast = reference.Dictionary(model)
  for history in histories(model, np.random.default_rng(1), 12):
    if slow_class is reference.Katz:
      wanted = slow.distribution(history)
    else:
      wanted = {w: slow.prob(history, w) for w in range(1, VOCAB)}
    for w, prob in wanted.items():
      assert math.exp(fast.log_prob(history, w)) == pytest.approx(prob, rel=1e-9), (history, w)
  scores, used = model.score(tokens)
  begin = 0
  for i, token in enumerate(tokens.tolist()):
    begin = i if token == 0 else begin
    if i < 300 and token:
      history = tuple(tokens[max(begin, i - order + 1) : i].tolist())
      assert scores[i] == pytest.approx(fast.log_prob(history, token), abs=1e-9)
      longest = max(n for n in range(len(history) + 1) if (*history[len(history) - n :], token)
                    in fast.grams) + 1
      assert used[i] == longest


def test_kneser_ney_by_hand():
  """Two sequences, "a b" and "a c"; every amount is a fallback.

  Bigrams: ^a 2, ab 1, ac 1, b$ 1, c$ 1. Tokens before a: ^, b and c: a, $: b, c. So
  the 5 kinds of bigrams give a 1, b 1, c 1, $ 2, and with amounts 0.5 and 1 there are
  2.5 of 5 left for the uniform distribution over $, <unk>, a, b, c.
  """
  a, b, c = 3, 4, 5
  counts = count_grams(join_sequences([[a, b], [a, c]], 6), 2, 6)
  fast = reference.Dictionary(kneser_ney(counts))
  p = lambda history, token: math.exp(fast.log_prob(history, token))
  uniform = 2.5 / 5 / 5
  assert p((), a) == pytest.approx(0.5 / 5 + uniform)
  assert p((), 1) == pytest.approx(1 / 5 + uniform)
  assert p((), 2) == pytest.approx(uniform)
  # After a: 0.5 is subtracted of each of two counts of 1, so half is left.
  assert p((a,), b) == pytest.approx(0.5 / 2 + 0.5 * p((), b))
  assert p((a,), a) == pytest.approx(0.5 * p((), a))
  # After the start: 1 of a count of 2.
  assert p((0,), a) == pytest.approx(0.5 + 0.5 * p((), a))
  # Nothing comes after c but the end; nothing at all after an unknown token.
  assert p((c,), 1) == pytest.approx(0.5 + 0.5 * p((), 1))
  assert p((2,), c) == pytest.approx(p((), c))


def test_amounts_of_kneser_ney_by_hand():
  """n1 … n4 are 8, 4, 2, 1: Y = 8 / 16, so 1 - 4/8, 2 - 3 * 0.5 * 2/4, 3 - 4 * 0.5 * 1/2."""
  counts = np.repeat([0, 1, 2, 3, 4, 9], [5, 8, 4, 2, 1, 3])
  assert kneser_ney_amounts(counts) == (0.5, 1.25, 2.0)
  assert kneser_ney_amounts(np.repeat([1, 2, 3], [8, 4, 2])) == (0.5, 1.25, 3.0)
  for kinds in ([0, 4, 2, 1], [8, 0, 2, 1], [8, 4, 0, 1]):
    assert kneser_ney_amounts(np.repeat([1, 2, 3, 4], kinds)) == (0.5, 1.0, 1.5)
  # n1 = 1, n2 = 9 asks to subtract 2 - 3 * 1/19 * 9/9, n4 = 90 a negative amount.
  assert kneser_ney_amounts(np.repeat([1, 2, 3, 4], [1, 9, 9, 900])) == (0.5, 1.0, 1.5)


def test_counts_of_katz_by_hand():
  """n1 … n6 are 60, 20, 10, 5, 3, 1: k = 5, 6 n6 / n1 = 0.1.

  Counts of 1 become (2 * 20 / 60 - 0.1) / 0.9 = 0.6296; of 2, 2 * (3 * 10 / 40 - 0.1) / 0.9.
  """
  kinds = [60, 20, 10, 5, 3, 1]
  found = katz_counts(np.repeat([0, 1, 2, 3, 4, 5, 6, 8], [7, *kinds, 2]))
  places = np.cumsum([0, 7, *kinds])
  wanted = [0, 0.62963, 1.44444, 1.88889, 2.88889, 2.11111 * 5 / 5, 6, 8]
  wanted[5] = 5 * (6 * 1 / (5 * 3) - 0.1) / 0.9
  wanted[4] = 4 * (5 * 3 / (4 * 5) - 0.1) / 0.9
  wanted[3] = 3 * (4 * 5 / (3 * 10) - 0.1) / 0.9
  np.testing.assert_allclose(found[places], wanted, rtol=1e-4)


def test_katz_takes_fewer_counts_or_a_fixed_amount_where_kinds_are_few():
  # No count is 5, so only counts up to 3 are discounted: n4 is the last that is needed.
  found = katz_counts(np.repeat([1, 2, 3, 4, 6], [60, 20, 10, 5, 2]))
  assert (found[[0, 60, 80]] < [1, 2, 3]).all() and found[-3:].tolist() == [4, 6, 6]
  assert katz_counts(np.asarray([0, 1, 1, 7])).tolist() == [0, 0.5, 0.5, 6.5]


def test_katz_leaves_something_where_no_count_is_discounted():
  """After 3 there are 4 and 5 nine times each: one more than 18 is counted."""
  # 60 other tokens occur once, 20 twice, …: what Good-Turing needs.
  times = np.repeat([1, 2, 3, 4, 5, 6], [60, 20, 10, 5, 3, 1])
  others = [[int(w)] for w in np.repeat(np.arange(6, 105), times)]
  counts = count_grams(join_sequences([[3, 4]] * 9 + [[3, 5]] * 9 + others, 110), 2, 110)
  assert (katz_counts(counts.counts[1])[counts.counts[1] == 9] == 9).all()
  fast = reference.Dictionary(katz(counts))
  assert math.exp(fast.log_prob((3,), 4)) == pytest.approx(9 / 19)
  assert fast.probs((3,)).sum() == pytest.approx(1)


def test_katz_where_everything_was_seen():
  sequences = [[int(a), int(b)] for a, b in itertools.product(range(2, 5), repeat=2)] * 3
  sequences += [[2], [3], [4], []]
  model = katz(count_grams(join_sequences(sequences, 5), 2, 5))
  assert len(model.orders[1]) == 4 * 4
  check_sums(model)
  check_sums(prune_to_count(model, 5 + 15))


@pytest.mark.parametrize("smoothing", ["katz", "kneser_ney"])
def test_a_pruned_model_sums_to_1_and_is_closed(smoothing):
  counts = counted(3, 4, 300)[2]
  model = SMOOTHINGS[smoothing][0](counts, (1, 1, 1, 1))
  total = sum(model.num_grams)
  for num in (VOCAB, VOCAB + 1, total // 3, total - 1, total, total + 9):
    pruned = prune_to_count(model, num)
    assert sum(pruned.num_grams) == min(num, total) and min(pruned.num_grams) > 0
    check_sums(pruned, num)
    grams = set(reference.Dictionary(pruned).grams)
    assert all(len(gram) == 1 or {gram[1:], gram[:-1]} <= grams for gram in grams)
  sizes = []
  for threshold in (0, 1e-6, 1e-4, 1e-2, 1.0):
    pruned = prune_to_threshold(model, threshold)
    check_sums(pruned)
    sizes.append(sum(pruned.num_grams))
  assert sizes == sorted(sizes, reverse=True)
  assert sizes[0] == total > sizes[1] and sizes[-1] == VOCAB


@pytest.mark.parametrize("smoothing", ["katz", "kneser_ney"])
def test_what_goes_changes_the_distribution_by_less_than_what_stays(smoothing):
  """Each n-gram of the highest order is left out by hand, and D summed over the vocabulary."""
  model = SMOOTHINGS[smoothing][0](counted(4, 3, 60)[2], (1, 1, 1))
  fast = reference.Dictionary(model)
  grams = [tuple(gram) for gram in gram_tokens(model.orders, 3).T.tolist()]
  changes = {}
  for gram in grams:
    history, gone = gram[:-1], gram[-1]
    probs, lower = fast.probs(history)[1:], fast.probs(history[1:])[1:]
    has_gram = np.asarray([(*history, w) in fast.grams for w in range(1, VOCAB)])
    has_gram[gone - 1] = False
    scale = (1 - probs[has_gram].sum()) / (1 - lower[has_gram].sum())
    pruned = np.where(has_gram, probs, scale * lower)
    before = fast.probs(())[history[0] or 1] * fast.probs(history[:1])[history[1]]
    changes[gram] = before * (probs * np.log(probs / pruned)).sum()
  for threshold in np.quantile(list(changes.values()), [0.1, 0.5, 0.9]) * 1.000001:
    pruned = reference.Dictionary(prune_to_threshold(model, math.expm1(threshold)))
    kept = {gram for gram in grams if gram in pruned.grams}
    assert kept == {gram for gram in grams if changes[gram] >= threshold}
    assert 0 < len(kept) < len(grams)


@pytest.mark.parametrize("prune, value, message", [
    (prune_to_count, 3, "^n-grams = 3: allowed is 17 or more"),
    (prune_to_count, 0, "^n-grams = 0"),
    (prune_to_threshold, -1.0, "^threshold = -1.0"),
    (prune_to_threshold, math.nan, "^threshold = nan"),
])
def test_pruning_to_nothing_is_refused(prune, value, message):
  model = kneser_ney(counted(0, 2)[2])
  with pytest.raises(InputError, match=message):
    prune(model, value)
