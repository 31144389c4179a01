"""The analyses against plain Python over the same recordings."""

import jax
import numpy as np
import pytest
from test_replay import prompts, recording  # noqa: F401
from test_rescored_model import (  # noqa: F401
    all_scoring,
    arrays,
    base,
    greedy,
    H,
    MAX_LENGTH,
    small,
)

from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.evaluation.analysis import (
    closed_distance,
    compare_drafts,
    describe_repetition,
    drafts_everywhere,
    efficiency_by_position,
    first_path,
    head_statistics,
    lattice_statistics,
    longest_run,
    matching_nodes,
    num_repeats,
    RECALLS,
    rising_heads,
)
from bpd_jax.evaluation.replay import replay
from bpd_jax.evaluation.scoring import OracleSource
from bpd_jax.generation import Call, Generation


def test_heads_by_hand(base, recording):  # noqa: F811
  with jax.enable_x64(True):
    found = head_statistics(base, recording)
    view, apply = base.view, base.model.apply
    first = np.asarray(apply({"params": view}, recording.hidden, method="logits"))
    heads, own = base.own_heads
    states = heads.states(base.config, own, recording.hidden)
    rest = np.moveaxis(np.asarray(apply({"params": view}, states, method="logits")), 0, 2)
  logits = np.concatenate([first[:, :, None], rest], axis=2)
  for head in range(H):
    ranks, entropies = [], []
    for row, n in enumerate(recording.lengths):
      for t in range(n - head):
        values = logits[row, t, head]
        right = recording.tokens[row, t + head]
        ranks.append(sorted(range(len(values)), key=lambda v: (-values[v], v)).index(right))
        probs = np.exp(values - values.max())
        probs /= probs.sum()
        entropies.append(-(probs * np.log(probs)).sum())
    assert found["positions"][head] == len(ranks)
    assert found["accuracy"][head] == pytest.approx(np.mean(np.array(ranks) == 0))
    expected = [np.mean(np.array(ranks) < k) for k in RECALLS]
    assert found["recall"][head] == pytest.approx(expected)
    assert found["entropy"][head] == pytest.approx(np.mean(entropies), rel=1e-5)
  assert found["accuracy"][0] == 1  # Head 1 is what greedy follows.
  assert 0 < found["accuracy"][2] < 1


@pytest.mark.parametrize("k", RECALLS[:3])
@pytest.mark.parametrize("heads", range(2, H + 1))
def test_the_oracle_of_ranks_is_the_replayed_oracle(base, recording, k, heads):  # noqa: F811
  with jax.enable_x64(True):
    found = head_statistics(base, recording)["oracle"]
    scoring = OracleSource().make(base)
    replayed = replay(
        base, recording, base.heads(heads, k), scoring=[scoring] if k > 1 else []
    )
  assert found[heads - 1][RECALLS.index(k)] == replayed.block_efficiency
  assert found[0][RECALLS.index(k)] == 1  # Head 1 alone is greedy.


def test_lattices_of_heads_say_what_the_heads_say(base, recording):  # noqa: F811
  with jax.enable_x64(True):
    heads = head_statistics(base, recording)
    # However many candidates it is asked for.
    for method in ("blockwise", base.heads(top_k=3)):
      found = lattice_statistics(base, recording, method)
      assert found["positions"] == heads["positions"][1:]
      assert found["recall"] == heads["recall"][1:]
      assert found["oracle"] == heads["oracle"][1:]
  assert found["drafted"] == [1.0] * (H - 1)
  # What aren't candidates are told apart there.
  assert all(0 < a <= b for a, b in zip(found["entropy"], heads["entropy"][1:], strict=True))


def test_lattices_of_a_drafter_without_candidates_to_offer(base, recording):  # noqa: F811
  with jax.enable_x64(True):
    found = lattice_statistics(base, recording, ReferenceDrafter(2))
  n = recording.lengths
  # Replay gives it greedy's own output; a step behind its end drafts nothing.
  assert found["positions"] == [int((n - 1).sum()), int(np.maximum(n - 2, 0).sum())]
  assert found["drafted"] == [1.0, 1.0] and found["entropy"] == [0.0, 0.0]
  assert found["recall"] == [[1.0] + [None] * (len(RECALLS) - 1)] * 2
  calls = (1 + -(-(n - 1) // 3)).sum()
  assert found["oracle"][-1][0] == n.sum() / calls


def test_nodes_that_say_what_follows():
  # Two paths that aren't merged begin with 5; the second goes on as the text does.
  draft, parents = [5, 7, 5, 6, 9], [-1, 0, -1, 2, 3]
  assert matching_nodes(draft, parents, [5, 6, 8]) == [2, 3]
  assert matching_nodes(draft, parents, [5]) == [0]
  assert matching_nodes(draft, parents, [6]) == [] == matching_nodes([], [], [6])
  assert matching_nodes(draft, parents, [5, 6, 9, 1]) == [2, 3, 4]


def test_heads_that_rise():
  assert rising_heads([1.0]) == 1
  assert rising_heads([1.0, 1.0, 2.0]) == 3
  assert rising_heads([1.0, 2.0, 1.5, 3.0]) == 2
  assert rising_heads([2.0, 1.0]) == 1


SEARCH = SearchSettings("p_best", num_paths=6)


@pytest.fixture(scope="module")
def everywhere(base, small, arrays, recording):  # noqa: F811
  with jax.enable_x64(True):
    scoring = all_scoring(base, small, arrays)["2-gram"]
    options = {"method": base.heads(top_k=4), "search": SEARCH, "scoring": scoring}
    return (
        drafts_everywhere(base, recording), drafts_everywhere(base, recording, **options),
        replay(base, recording), replay(base, recording, **options),
    )


def test_drafts_everywhere_are_those_of_decoding(everywhere, recording):  # noqa: F811
  for calls, decoded in (everywhere[::2], everywhere[1::2]):
    for own, n, trace in zip(calls, recording.lengths, decoded.traces, strict=True):
      assert len(own) == n - 1
      done = 0
      for call in trace:
        if done:
          assert own[done - 1].draft == call.draft
          assert own[done - 1].num_accepted >= call.num_accepted
        done += len(call.emitted)
      # A walk over them is the decoding.
      done, walked = 1, 1
      while done < n:
        accepted = own[done - 1].num_accepted
        done += accepted if done + accepted == n else accepted + 1
        walked += 1
      assert walked == len(trace)


def test_wins_and_repairs_by_hand(everywhere, recording):  # noqa: F811
  before, after, *_ = everywhere
  found = compare_drafts(recording, before, after)
  signs, repairs, regressions = [], [], []
  for row, (old_calls, new_calls) in enumerate(zip(before, after)):
    for n, (old, new) in enumerate(zip(old_calls, new_calls)):
      root = [int(recording.tokens[row, n])]
      assert first_path(root[0], old) == root + old.draft
      # The best path goes down from the root by first children, and is whole.
      path = root + [new.draft[i] for i in range(H - 1)]
      assert first_path(root[0], new) == path
      sign = np.sign(new.num_accepted - old.num_accepted)
      change = num_repeats(path) - num_repeats(root + old.draft)
      signs.append(sign)
      if sign > 0:
        repairs.append(change < 0)
      if sign < 0:
        regressions.append(change > 0)
  signs = np.array(signs)
  assert found["wins"] == pytest.approx((signs > 0).mean()) and found["wins"] > 0
  assert found["ties"] == pytest.approx((signs == 0).mean())
  assert found["losses"] == pytest.approx((signs < 0).mean())
  assert found["repairs"] == pytest.approx(np.mean(repairs))
  assert found["regressions"] == pytest.approx(np.mean(regressions) if regressions else 0)


def test_repetition_and_position_by_hand():
  calls = [Call([], [7]), Call([7, 7, 5], [7, 9], accepted=[0]), Call([9, 9, 9], [4, 4, 1])]
  generation = Generation([np.array([7, 7, 9, 4, 4, 1])], [3], [calls], None, [], [])
  # Drafts with their roots: 7 7 7 5 and 9 9 9 9.
  found = describe_repetition(generation)
  assert found == {"consecutive": 5 / 6, "longest_run": 3.5}
  assert efficiency_by_position(generation, 2) == [
      {"start": 0, "calls": 2, "block_efficiency": 1.5},
      {"start": 2, "calls": 1, "block_efficiency": 3.0},
  ]
  assert (num_repeats([1, 1, 2, 2, 2]), longest_run([1, 1, 2, 2, 2, 1])) == (3, 3)
  assert first_path(5, Call([8, 9, 6], [], [-1, -1, 0])) == [5, 8, 6]
  assert describe_repetition(Generation([np.array([3])], [1], [[Call([], [3])]], None, [], []))[
      "consecutive"] == 0


def test_closed_distance():
  # Efficiencies of 60 tokens: 1.5, 2 and 2.5.
  plain, refined, oracle = np.array([30, 10]), np.array([20, 10]), np.array([14, 10])
  found, (low, high) = closed_distance(plain, refined, oracle)
  assert found == pytest.approx(0.5)
  # A resample draws the same rows of all three: the first twice, both, or the second
  # twice, which has no way to go.
  assert (low, high) == pytest.approx((28 * 20 / (40 * 32), 0.5))
  found, (low, high) = closed_distance(plain, plain + 1, oracle)
  assert found == pytest.approx((60 / 42 - 1.5) / 1.0) and high < 0
  assert closed_distance(plain, refined, plain) is None
