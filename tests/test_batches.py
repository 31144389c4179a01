"""Batches are arithmetic: order, shares, packing, processes."""

from collections import Counter

import numpy as np
import pytest

from bpd_jax.data.batches import assemble, Batches, CYCLE, in_order, pack, shares, WINDOW
from bpd_jax.data.token_cache import TokenCache, write_cache
from bpd_jax.errors import InputError
from bpd_jax.training.states import StateBatches
from bpd_jax.vocabulary import ByteVocabulary


class Numbers:
  """Example i is i + 10 and EOS on both sides, `length` tokens long."""

  def __init__(self, name, count, length=2, start=0):
    self.name = name
    self.lengths = np.full([count, 2], length)
    self._start = start

  def __getitem__(self, i):
    row = np.array([self._start + i + 10] * (self.lengths[i, 0] - 1) + [1], np.int32)
    return row, row


class Ragged:
  """Examples of random lengths whose tokens are the example's number + 10."""

  name = "ragged"

  def __init__(self, count, most=9, seed=0):
    self.lengths = np.random.default_rng(seed).integers(1, most, [count, 2], endpoint=True)

  def __getitem__(self, i):
    inputs, targets = (np.full([n], i + 10, np.int32) for n in self.lengths[i])
    inputs[-1] = targets[-1] = 1
    return inputs, targets


def firsts(batches, steps):
  """The first token of every row of some steps, less 10."""
  return [
      int(row[0]) - 10 for step in steps for row in batches.batch(step)["encoder_input_tokens"]
  ]


def make(datasets, **options):
  return Batches(datasets, **{
      "batch_size": 4, "input_length": 8, "target_length": 8, **options
  })


def test_an_epoch_shows_every_example_once_and_the_next_in_another_order():
  batches = make([Numbers("a", 20)])
  first, second = firsts(batches, range(5)), firsts(batches, range(5, 10))
  assert sorted(first) == sorted(second) == list(range(20))
  assert first != second != sorted(second)
  assert batches.steps_per_epoch() == 5
  assert firsts(make([Numbers("a", 20)], seed=1), range(5)) not in (first, second)


def test_a_batch_depends_on_seed_and_step_alone():
  batches, again = (make([Numbers("a", 50), Numbers("b", 9, start=100)], seed=3) for _ in "ab")
  firsts(batches, range(30))
  for step in (7, 0, 29):
    for name, array in batches.batch(step).items():
      np.testing.assert_array_equal(array, again.batch(step)[name])
  other = make([Numbers("a", 50), Numbers("b", 9, start=100)], seed=4)
  assert firsts(other, range(10)) != firsts(batches, range(10))


@pytest.mark.parametrize("is_packed", [False, True])
def test_processes_share_the_rows_of_one_batch(is_packed):
  dataset = Ragged(60)
  options = {"batch_size": 6, "is_packed": is_packed}
  whole = make([dataset], **options)
  for count in (2, 3):
    parts = [
        make([dataset], **options, process_index=i, process_count=count) for i in range(count)
    ]
    for step in (0, 5, 11):
      for name, array in whole.batch(step).items():
        joined = np.concatenate([part.batch(step)[name] for part in parts])
        np.testing.assert_array_equal(joined, array)


def test_a_mixture_keeps_its_rates_and_goes_through_each_dataset():
  datasets = [Numbers("a", 100), Numbers("b", 40, start=1000), Numbers("c", 7, start=2000)]
  batches = make(datasets, rates=[5, 3, 2], batch_size=10)
  rows = firsts(batches, range(2 * CYCLE // 10))
  counts = Counter(row // 1000 for row in rows)
  assert counts == {0: CYCLE, 1: 3 * CYCLE // 5, 2: 2 * CYCLE // 5}
  # 600 rows of 40 examples: 15 each.
  assert set(Counter(row for row in rows if 1000 <= row < 2000).values()) == {15}
  # Well mixed: 40 rows in a row hold all three.
  assert all({row // 1000 for row in rows[i : i + 40]} == {0, 1, 2} for i in range(0, 900, 40))


def test_default_rates_follow_the_numbers_of_examples():
  assert shares([30, 10], [None, None]) == [750, 250]
  assert shares([1, 1, 1], [None] * 3) == [334, 333, 333]
  batches = make([Numbers("a", 30), Numbers("b", 10, start=1000)])
  assert sorted(firsts(batches, range(250)))[-250:] == sorted(list(range(1000, 1010)) * 25)


def test_packing_places_every_example_once_where_it_fits():
  dataset = Ragged(500, most=20)
  room = (30, 24)
  rows = pack(dataset.lengths, room, 260)
  assert len(rows) == 260
  assert sorted(i for row in rows for i in row) == list(range(500))
  totals = np.array([dataset.lengths[row].sum(axis=0) for row in rows])
  assert (totals <= room).all()
  few = pack(dataset.lengths, room, 200)
  placed = [i for row in few for i in row]
  assert len(placed) == len(set(placed)) < 500
  # Well filled on the tighter side.
  totals = np.array([dataset.lengths[row].sum(axis=0) for row in few])
  assert (totals <= room).all()
  assert (totals / room).max(axis=1).mean() > 0.95


def test_packed_epochs_show_nearly_every_example_once_at_the_given_rates():
  datasets = [Ragged(4000, most=20), Ragged(1000, most=10, seed=1), Numbers("c", 2000, length=3)]
  batches = Batches(
      datasets, rates=[4, 1, 5], batch_size=8, input_length=30, target_length=30, is_packed=True
  )
  num_steps = int(batches.steps_per_epoch())
  seen = Counter(example for step in range(num_steps) for row in batches.rows(step)
                 for example in row)
  shown = Counter()
  for (which, _), count in seen.items():
    shown[which] += count
  assert shown[0] > 0.98 * 4000 and shown[1] > 0.98 * 1000 and shown[2] > 0.98 * 5000
  # The last window reaches into the next epoch.
  again = [count for (which, _), count in seen.items() if which < 2 and count > 1]
  assert len(again) < 0.05 * 5000 and set(again) <= {2}
  filled = np.mean([
      (batches.batch(step)["encoder_segment_ids"] > 0).mean() for step in range(num_steps)
  ])
  assert filled > 0.9
  # Rows of a window come in random order, not the fullest first.
  sizes = [len(row) for step in range(WINDOW // 8) for row in batches.rows(step)]
  halves = np.mean(sizes[: WINDOW // 2]), np.mean(sizes[WINDOW // 2 :])
  assert 0.8 < halves[0] / halves[1] < 1.25
  assert any(len({which for which, _ in row}) > 1 for row in batches.rows(0))


def test_packed_rows_hold_segments_with_their_own_starts():
  a, b = ([5, 6, 1], [7, 1]), ([8, 1], [9, 9, 1])
  batch = assemble([[a, b], []], 7, 6)
  expected = {
      "encoder_input_tokens": [5, 6, 1, 8, 1, 0, 0],
      "encoder_segment_ids": [1, 1, 1, 2, 2, 0, 0],
      "decoder_input_tokens": [0, 7, 0, 9, 9, 0],
      "decoder_target_tokens": [7, 1, 9, 9, 1, 0],
      "decoder_segment_ids": [1, 1, 2, 2, 2, 0],
  }
  for name, row in expected.items():
    assert batch[name].tolist() == [row, [0] * len(row)]


@pytest.mark.parametrize("is_packed", [False, True])
def test_own_outputs_are_marked(is_packed):
  batches = make(
      [Numbers("a", 7), Numbers("own", 5, start=100)], is_packed=is_packed, num_outputs=1,
      rates=[3, 1],
  )
  batch = batches.batch(1)
  mask, targets = batch["decoder_output_mask"], batch["decoder_target_tokens"]
  assert mask.dtype == bool and (mask[targets >= 100]).all() and (targets >= 100).any()
  # The EOS of an output is its own as well, and nothing else is.
  assert mask.sum() == 2 * (targets >= 100).sum()
  assert "decoder_output_mask" not in make([Numbers("a", 7)]).batch(1)


def test_long_inputs_end_in_eos_and_long_targets_dont():
  row = np.array([5, 6, 7, 8, 1])
  batch = assemble([[(row, row)]], 3, 3)
  assert batch["encoder_input_tokens"].tolist() == [[5, 6, 1]]
  assert batch["decoder_target_tokens"].tolist() == [[5, 6, 7]]
  assert batch["decoder_input_tokens"].tolist() == [[0, 5, 6]]


def test_in_order_gives_each_example_once_and_pads_with_empty_rows():
  batches = list(in_order(Numbers("a", 7), 3, 4, 4, max_examples=5))
  rows = np.concatenate([batch["decoder_target_tokens"] for batch in batches])
  assert rows[:, 0].tolist() == [10, 11, 12, 13, 14, 0]
  assert not batches[-1]["decoder_segment_ids"][-1].any()


@pytest.mark.parametrize("options, name", [
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": 5, "process_count": 2}, "batch_size"),
    ({"input_length": 0}, "input_length"),
    ({"rates": [1, 2]}, "rates"),
    ({"rates": [0]}, "rates"),
])
def test_bad_arguments_are_named(options, name):
  with pytest.raises(InputError, match=name):
    make([Numbers("a", 9)], **options)


def test_a_rate_that_never_comes_is_refused():
  with pytest.raises(InputError, match="1 in 1000 for b"):
    make([Numbers("a", 9), Numbers("b", 9)], rates=[10000, 1])


EXAMPLES = [([5, 6, 1], [7, 1]), ([1], [8, 8, 8, 1]), ([200, 1], [258, 1])]


def write(folder, examples=EXAMPLES):
  return write_cache(
      folder, examples, task="toy", split="train", vocabulary=ByteVocabulary()
  )


def test_a_cache_gives_back_what_was_written(tmp_path):
  for cache in (write(tmp_path / "a"), TokenCache(tmp_path / "a")):
    assert len(cache) == 3
    assert cache.name == "toy.train"
    assert (cache.vocabulary, cache.vocab_size) == ("bytes", 259)
    assert cache.lengths.tolist() == [[3, 2], [1, 4], [2, 2]]
    found = [tuple(side.tolist() for side in cache[i]) for i in range(3)]
    assert found == EXAMPLES
    assert cache[0][0].dtype == np.int32
  assert write(tmp_path / "b").fingerprint == cache.fingerprint
  assert write(tmp_path / "c", EXAMPLES[:2] + [([200], [1, 258, 1])]).fingerprint not in (
      cache.fingerprint,
  )


def test_a_cache_that_isnt_whole_is_refused(tmp_path):
  with pytest.raises(InputError, match="prepare"):
    TokenCache(tmp_path / "missing")
  write(tmp_path / "a")
  with pytest.raises(InputError, match="nothing is yet"):
    write(tmp_path / "a")
  tokens = tmp_path / "a" / "tokens.bin"
  tokens.write_bytes(tokens.read_bytes()[:-2])
  with pytest.raises(InputError, match="3 examples"):
    TokenCache(tmp_path / "a")


def test_nothing_is_left_of_a_cache_that_fails(tmp_path):
  with pytest.raises(InputError, match="0 … 258"):
    write(tmp_path / "a", [([5, 300, 1], [1])])
  with pytest.raises(InputError, match="no examples"):
    write(tmp_path / "a", [])
  assert not list(tmp_path.iterdir())


def test_cached_states_stand_where_their_targets_do_and_rows_may_be_empty():
  class Stateful(Ragged):
    def __init__(self):
      super().__init__(20_000, most=9)
      self.lengths[:, 0] = 0

    def __getitem__(self, i):
      return np.zeros([0], np.int32), np.full([self.lengths[i, 1]], i + 10, np.int32)

    def states(self, i):
      return np.full([self.lengths[i, 1], 4], i + 10, np.float32)

  batches = StateBatches([Stateful()], batch_size=32, target_length=40)
  empty = 0
  for step in range(16):
    batch = batches.batch(step)
    assert set(batch) == {
        "hidden", "decoder_input_tokens", "decoder_target_tokens", "decoder_segment_ids"
    }
    for feature in range(4):
      np.testing.assert_array_equal(batch["hidden"][..., feature], batch["decoder_target_tokens"])
    empty += (batch["decoder_segment_ids"].max(axis=1) == 0).sum()
  assert empty


def test_rows_are_made_with_the_models_own_ids():
  """Start 3, padding 4, EOS 2, as MADLAD-400's aren't T5's either."""
  examples = [(np.array([7, 8, 9, 2]), np.array([5, 2])), (np.array([6, 2]), np.array([9, 2]))]
  ids = {"eos_id": 2, "pad_id": 4, "start_id": 3}
  batch = assemble([examples, []], 6, 5, **ids)
  np.testing.assert_array_equal(
      batch["encoder_input_tokens"], [[7, 8, 9, 2, 6, 2], [4] * 6]
  )
  np.testing.assert_array_equal(batch["decoder_input_tokens"], [[3, 5, 3, 9, 4], [4] * 5])
  np.testing.assert_array_equal(batch["decoder_target_tokens"], [[5, 2, 9, 2, 4], [4] * 5])
  np.testing.assert_array_equal(batch["decoder_segment_ids"], [[1, 1, 2, 2, 0], [0] * 5])

  class Examples(list):
    name, lengths = "examples", np.array([[4, 2], [2, 2]])

  cut = Batches([Examples(examples)], batch_size=2, input_length=3, target_length=3, **ids)
  rows = {tuple(row) for row in cut.batch(0)["encoder_input_tokens"].tolist()}
  assert rows == {(7, 8, 2), (6, 2, 4)}
  assert (cut.batch(0)["decoder_input_tokens"][:, 0] == 3).all()
  first = next(in_order(Examples(examples), 2, 3, 3, **ids))
  assert first["decoder_input_tokens"].tolist() == [[3, 5, 4], [3, 9, 4]]
