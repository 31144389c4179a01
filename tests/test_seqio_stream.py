"""Batches straight from SeqIO: the seam of cached ones, any step, any number of processes."""

import functools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from bpd_jax.data.batches import Batches
from bpd_jax.data.seqio_stream import SeqioStream
from bpd_jax.data.seqio_vocabulary import SeqioVocabulary
from bpd_jax.errors import InputError
from bpd_jax.vocabulary import ByteVocabulary

NUM_ROWS = 60


def source(prefix):
  """Rows `a 0` … `a 59`, of growing length."""
  def dataset(split, shuffle_files, seed=None):
    texts = [f"{prefix} {i}" for i in range(NUM_ROWS)]
    data = tf.data.Dataset.from_tensor_slices(
        {"inputs": texts, "targets": [text + "." * (i % 5) for i, text in enumerate(texts)]}
    )
    return data.shuffle(NUM_ROWS, seed=seed) if shuffle_files else data

  return seqio.FunctionDataSource(dataset, splits=["train"])


@pytest.fixture(scope="module", autouse=True)
def registered():
  feature = seqio.Feature(SeqioVocabulary(ByteVocabulary()))
  steps = [
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
      seqio.preprocessors.append_eos,
  ]
  for name in "ab":
    # The source shuffles; a buffer after it would mix the end of an epoch with the next.
    seqio.TaskRegistry.add(
        f"stream_{name}", source(name), {"inputs": feature, "targets": feature}, steps,
        shuffle_buffer_size=1,
    )
  seqio.MixtureRegistry.add("stream_mix", [("stream_a", 3.0), ("stream_b", 1.0)])
  yield
  for name in "ab":
    seqio.TaskRegistry.remove(f"stream_{name}")
  seqio.MixtureRegistry.remove("stream_mix")


def make(name="stream_a", **options):
  return SeqioStream(name, **{
      "batch_size": 6, "input_length": 12, "target_length": 12, **options
  })


def texts(batch, name="encoder_input_tokens"):
  return [ByteVocabulary().decode(row) for row in batch[name]]


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


def test_features_are_those_of_cached_batches():
  class Cached:
    name = "cached"
    lengths = np.array([[4, 4]] * NUM_ROWS)

    def __getitem__(self, i):
      return np.array([5, 6, 7, 1]), np.array([5, 6, 7, 1])

  cached = Batches([Cached()], batch_size=6, input_length=12, target_length=12).batch(0)
  streamed = make().batch(0)
  assert {name: (array.shape, array.dtype) for name, array in streamed.items()} == {
      name: (array.shape, array.dtype) for name, array in cached.items()
  }
  for i, text in enumerate(texts(streamed)):
    ids = [*ByteVocabulary().encode(text), 1]
    assert streamed["encoder_input_tokens"][i].tolist() == ids + [0] * (12 - len(ids))
    assert streamed["decoder_input_tokens"][i, 1:].tolist() == (
        # No EOS goes in where another token follows it.
        [token if token != 1 else 0 for token in streamed["decoder_target_tokens"][i, :-1]]
    )
    assert streamed["encoder_segment_ids"][i].tolist() == [1] * len(ids) + [0] * (12 - len(ids))


def test_an_epoch_shows_every_example_once_and_the_next_in_another_order():
  stream = make()
  epochs = [
      [text for step in range(first, first + 10) for text in texts(stream.batch(step))]
      for first in (0, 10)
  ]
  expected = sorted(f"a {i}" for i in range(NUM_ROWS))
  assert sorted(epochs[0]) == sorted(epochs[1]) == expected
  assert epochs[0] != epochs[1]


@pytest.mark.parametrize("options", [
    {}, {"is_packed": True, "input_length": 30, "target_length": 40}, {"name": "stream_mix"},
])
def test_any_step_is_the_one_that_reading_on_gives(options):
  stream = make(**options)
  steps = [stream.batch(step) for step in range(8)]
  again = make(**options)
  for step in (5, 2, 2, 3, 7, 0):
    assert_same(again.batch(step), steps[step])
  other = make(**options, seed=1)
  assert any(
      texts(other.batch(step)) != texts(steps[step]) for step in range(3)
  )


def test_processes_read_different_examples_and_all_of_them():
  parts = [make(process_index=i, process_count=3) for i in range(3)]
  found = []
  for part in parts:
    rows = [text for step in range(10) for text in texts(part.batch(step))]
    assert len(rows) == 20
    found += rows
  assert sorted(found) == sorted(f"a {i}" for i in range(NUM_ROWS))


def test_packed_rows_hold_several_examples_and_lose_none():
  stream = make(is_packed=True, batch_size=5, input_length=30, target_length=40)
  batches = [stream.batch(step) for step in range(40)]
  inputs = np.concatenate([batch["encoder_input_tokens"] for batch in batches])
  segments = np.concatenate([batch["encoder_segment_ids"] for batch in batches])
  targets = np.concatenate([batch["decoder_segment_ids"] for batch in batches])
  np.testing.assert_array_equal(segments.max(axis=1), targets.max(axis=1))
  assert segments.max(axis=1).mean() > 4
  found = [
      ByteVocabulary().decode(row[mask == segment])
      for row, mask in zip(inputs, segments) for segment in range(1, mask.max() + 1)
  ][:900]
  # 900 of the first thousand examples: 16 or 17 epochs, less what stands in later rows.
  counts = [found.count(f"a {i}") for i in range(NUM_ROWS)]
  assert sum(counts) == 900 and max(counts) <= 17


def test_long_examples_are_cut_as_cached_ones_are():
  batch = make(input_length=3, target_length=3).batch(0)
  assert batch["encoder_input_tokens"][:, -1].tolist() == [1] * 6
  assert (batch["decoder_target_tokens"][:, -1] != 1).all()


def test_a_mixture_keeps_its_rates():
  stream = make("stream_mix")
  rows = [text for step in range(100) for text in texts(stream.batch(step))]
  assert abs(sum(text.startswith("a") for text in rows) - 450) < 50


@pytest.mark.parametrize("options, message", [
    ({"name": "nothing"}, r"^name = 'nothing': allowed is one of \[.*'stream_mix'"),
    ({"split": "test"}, r"^stream_a split = 'test': allowed is one of \['train'\]"),
    ({"batch_size": 0}, "^batch_size = 0"),
    ({"batch_size": 5, "process_count": 2}, "^batch_size = 5: allowed is a multiple of the 2"),
    ({"target_length": 0}, "^target_length = 0"),
])
def test_bad_arguments_are_named(options, message):
  with pytest.raises(InputError, match=message):
    make(**options)
