"""The closed form of the grammar's block efficiency, against heads that count outcomes."""

from collections import defaultdict
import itertools

import numpy as np
import pytest
from simulator import count_calls

from bpd_jax.data import grammar as grammar_module
from bpd_jax.data.grammar import (
  ENTROPY_BITS,
  grammar,
  ideal_block_efficiency,
  ideal_calls,
  lexicon,
  NUM_OPENERS,
  run_lengths,
)
from bpd_jax.data.rows import load_rows, VOCABULARY_FILE
from bpd_jax.vocabulary import SentencePieceVocabulary

OPENERS = grammar_module._OPENERS
EOS = "</s>"


def outcomes(words):
  """All outputs for a list of words with their probabilities, by brute force."""
  phrases = []
  for word in words:
    entry = lexicon()[word]
    phrases.append([
        (1 / 4 if i == 0 else 1 / 12, (opener, *(entry.first if i == 0 else entry.other)))
        for i, opener in enumerate(OPENERS)
    ])
  for chosen in itertools.product(*phrases):
    tokens = [token for _, phrase in chosen for token in phrase]
    yield np.prod([probability for probability, _ in chosen]), (*tokens, EOS)


def heads_by_counting(words):
  """Greedy output, and after each prefix of it the likeliest token of each later place."""
  table = list(outcomes(words))
  greedy = []
  marginals = []
  while not greedy or greedy[-1] != EOS:
    rest = [(p, tokens) for p, tokens in table if list(tokens[: len(greedy)]) == greedy]
    likeliest = []
    for place in range(len(greedy), len(table[0][1])):
      mass = defaultdict(float)
      for p, tokens in rest:
        mass[tokens[place]] += p
      likeliest.append(max(mass, key=mass.get))
    marginals.append(likeliest)
    greedy.append(likeliest[0])
  return greedy, marginals


@pytest.mark.parametrize("words", [
    ["index"], ["shape"], ["index", "shape"], ["shape", "index", "data"], ["data", "tensor", "name"]
])
def test_calls_of_ideal_heads(words):
  greedy, marginals = heads_by_counting(words)
  lengths = run_lengths("grammar:\n" + " ".join(words))
  for block_size in range(1, 12):
    # A draft for after n tokens is made one token earlier: its head 1 is the n-th.
    _, emitted = count_calls(
        greedy, lambda n: marginals[n - 1][1:], block_size, len(greedy), EOS
    )
    assert len(emitted) == ideal_calls(lengths, block_size)
    assert ideal_block_efficiency([lengths], block_size) == sum(emitted) / len(emitted)


def test_greedy_is_one_and_long_blocks_take_a_phrase():
  rows = [run_lengths(row["inputs"]) for row in load_rows("grammar", "test")]
  assert ideal_block_efficiency(rows, 1) == 1
  assert all(ideal_calls(lengths, 8) == len(lengths) + 2 for lengths in rows)
  assert ideal_block_efficiency(rows, 8) == ideal_block_efficiency(rows, 100)


def test_entropy_by_counting():
  mass = [p for p, _ in outcomes(["shape", "index"])]
  assert sum(mass) == pytest.approx(1)
  assert -sum(p * np.log2(p) for p in mass) == pytest.approx(2 * ENTROPY_BITS)
  assert len(OPENERS) == NUM_OPENERS


def test_training_rows_are_drawn_with_these_probabilities():
  counts = defaultdict(int)
  for example in grammar("train", 2000):
    tokens = example.targets.split()
    for word in example.inputs.removeprefix("grammar:\n").split():
      entry = lexicon()[word]
      opener, *run = tokens[: 1 + len(entry.first)]
      del tokens[: 1 + len(entry.first)]
      counts[opener] += 1
      assert tuple(run) == (entry.first if opener == OPENERS[0] else entry.other)
    assert not tokens
  total = sum(counts.values())
  # Within four standard deviations.
  assert counts[OPENERS[0]] / total == pytest.approx(1 / 4, abs=4 * np.sqrt(3 / 16 / total))
  for opener in OPENERS[1:]:
    assert counts[opener] / total == pytest.approx(1 / 12, abs=4 * np.sqrt(11 / 144 / total))


def test_evaluation_rows_are_the_likeliest_outputs():
  for example in grammar("validation", 3):
    words = example.inputs.removeprefix("grammar:\n").split()[:3]
    greedy, _ = heads_by_counting(words)
    assert example.targets.split()[: len(greedy) - 1] == greedy[:-1]


def test_runs_differ_at_every_place_and_have_all_lengths():
  lengths = set()
  for word in lexicon().values():
    assert len(word.first) == len(word.other)
    assert all(one != other for one, other in zip(word.first, word.other))
    lengths.add(len(word.first))
  assert lengths == set(range(1, 8))


def test_rows_depend_on_split_and_seed_and_not_on_their_number():
  assert grammar("train", 20)[:10] == grammar("train", 10)
  assert grammar("test", 10) == grammar("test", 10)
  assert {row.inputs for row in grammar("train", 500)}.isdisjoint(
      row["inputs"] for row in load_rows("grammar", "test")
  )
  assert grammar("test", 5, seed=1) != grammar("test", 5)


def test_every_symbol_is_one_token_of_the_shipped_vocabulary():
  vocabulary = SentencePieceVocabulary(VOCABULARY_FILE)
  for split in ("train", "test"):
    for example in grammar(split, 300):
      assert len(vocabulary.encode(example.targets)) == len(example.targets.split())
