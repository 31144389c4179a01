"""Replay against live decoding, call by call."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rescored_model import (  # noqa: F401
  all_scoring,
  arrays,
  base,
  CONFIG,
  greedy,
  HEADS,
  MAX_LENGTH,
  OPTIONS,
  random_generator,
  small,
)

from bpd_jax.decoding.accept import ApproximateTopK
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.scorers.reference import ReferenceScorer
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Cache, Tree
from bpd_jax.errors import InputError
from bpd_jax.evaluation.replay import (
  count_calls,
  load_recording,
  record,
  recorded_verify,
  replay,
)


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(3)
  return [rng.integers(2, CONFIG.vocab_size, n).tolist() for n in rng.integers(1, 16, 100)]


@pytest.fixture(scope="module")
def recording(base, prompts, greedy):  # noqa: F811
  with jax.enable_x64(True):
    # Padded further than live decoding pads, so that replay shows that nothing reads it.
    return record(base, prompts, greedy, MAX_LENGTH, input_length=40)


@pytest.mark.parametrize(
    "name,options",
    [
        ("none", {}),
        ("none", {"block_size": 3}),
        ("neural and n-gram", {"top_k": 4}),
        ("4-gram", {"top_k": 4, "search": SearchSettings("p_best", num_paths=6, num_nodes=9)}),
        ("2-gram", {"top_k": 4, "search": SearchSettings("best_first", num_nodes=9)}),
    ],
)
def test_replay_is_live_decoding_call_by_call(
    base, small, arrays, prompts, recording, name, options  # noqa: F811
):
  with jax.enable_x64(True):
    scoring = all_scoring(base, small, arrays)[name]
    options = dict(options)
    heads = base.heads(options.pop("block_size", None), options.pop("top_k", 1))
    live = base.generate(prompts, heads, scoring=scoring, **options, **OPTIONS)
    found = replay(base, recording, heads, scoring=scoring, batch_size=32, **options)
  assert found.calls == live.calls and max(live.calls) > 2
  for again, trace in zip(found.traces, live.traces, strict=True):
    assert again == trace
  assert found.block_efficiency == live.block_efficiency > 1


def test_replay_of_the_oracle(base, prompts, recording, greedy):  # noqa: F811
  oracle = [Scoring(ReferenceScorer())]
  with jax.enable_x64(True):
    live = base.generate(
        prompts, base.heads(top_k=4), scoring=oracle,
        references=[x.tolist() for x in greedy.tokens], **OPTIONS,
    )
    tokens, calls = count_calls(base, recording, base.heads(top_k=4), scoring=oracle)
  assert calls.tolist() == live.calls and tokens.tolist() == [len(x) for x in live.tokens]


def test_margins_are_those_of_the_choice(recording):
  valid = np.arange(MAX_LENGTH) < recording.lengths[:, None]
  assert (recording.margins[valid] > 0).all() and len(set(recording.lengths)) > 3


def test_a_recording_is_read_back_by_its_own_model_alone(base, recording, tmp_path):  # noqa: F811
  path = tmp_path / "recording.npz"
  recording.rows(range(5)).save(path)
  again = load_recording(path, base)
  np.testing.assert_array_equal(again.hidden, recording.hidden[:5])
  with jax.enable_x64(True):
    other = random_generator(CONFIG, 1, HEADS)
    with pytest.raises(InputError, match="recording = .* of checkpoint .*: allowed is one of"):
      load_recording(path, other)
  path.write_bytes(b"no")
  with pytest.raises(InputError, match="allowed is a file of Recording.save"):
    load_recording(path, base)
  with pytest.raises(InputError, match="rule"):
    replay(base, recording, rule=ApproximateTopK(1))


def test_a_recording_says_nothing_of_what_follows_another_prefix():
  """Even where a token is greedy's and stands where greedy has it."""
  tokens = jnp.array([[5, 6, 7, 8], [5, 6, 7, 8]])
  hidden = jnp.arange(8.0).reshape(2, 4, 1)
  # The root's children 5 and 9; 6 behind each; 7 behind the second 6; a 6 that is the root's.
  tree = Tree(
      tokens=jnp.array([[0, 5, 9, 6, 6, 7, 6]] * 2), parents=np.array([-1, 0, 0, 1, 2, 4, 0]),
      depth=np.array([0, 1, 1, 2, 2, 3, 1]), is_valid=jnp.ones([2, 7], bool), max_depth=3,
  )
  cache = Cache((), (), jnp.array([0, 1]))
  verified = recorded_verify(tokens, hidden, 0)(cache, tree)
  assert verified.choice.tolist() == [[5, 6, -1, 7, -1, -1, -1], [-1] * 7]
  assert verified.hidden[0, [0, 1, 3], 0].tolist() == [0, 1, 2]
  # The second row has emitted 5, which the root is then.
  tree = dataclasses.replace(tree, tokens=jnp.array([[0] * 7, [5, 6, 9, 7, 7, 8, 7]]))
  verified = recorded_verify(tokens, hidden, 0)(cache, tree)
  assert verified.choice[1].tolist() == [6, 7, -1, 8, -1, -1, -1]
