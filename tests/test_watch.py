"""What is shown of a decoding is what the decoding did."""

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
    small,
)

from bpd_jax.decoding.search import SearchSettings
from bpd_jax.evaluation.replay import replay
from bpd_jax.evaluation.watch import watch


@pytest.mark.parametrize(
    "name,search",
    [
        ("none", SearchSettings()),
        ("4-gram", SearchSettings()),
        ("2-gram", SearchSettings("p_best", num_paths=5)),
    ],
)
def test_every_choice_is_the_best_of_what_is_shown(
    base, small, arrays, recording, name, search  # noqa: F811
):
  options = {"method": base.heads(top_k=4), "search": search}
  with jax.enable_x64(True):
    scoring = all_scoring(base, small, arrays)[name]
    for row in range(3):
      calls = watch(base, recording, row, scoring=scoring, **options)
      decoded = replay(base, recording.rows([row]), scoring=scoring, **options)
      assert [watched.call for watched in calls] == decoded.traces[0]
      done = 0
      for watched in calls:
        assert len(watched.steps) == (H - 1 if done else 0)
        total = 0
        for i, step in enumerate(watched.steps):
          assert len(step.tokens) == 4 == len(set(step.tokens))
          assert step.scores == sorted(step.scores, reverse=True) and step.scores[0] <= 0
          assert len(step.scorers) == len(scoring)
          values = np.array(step.scores) + sum(map(np.array, step.scorers), np.zeros(4))
          total += values[step.chosen]
          # A path's first token is a child of the root; a chain takes the best step by step.
          if search.name == "chain":
            assert step.chosen == int(np.argmax(values))
            assert watched.call.draft[i] == step.tokens[step.chosen]
        if done:
          assert watched.root == decoded.tokens[0][done - 1]
        if search.name == "p_best" and watched.steps and not scoring[0].entropy_power:
          # No path of single best steps beats the best path.
          assert total >= best_by_hand(watched) - 1e-6
        done += len(watched.call.emitted)


def best_by_hand(watched):
  """The worth of the path that takes, after the chosen one, the best last step."""
  values = [
      np.array(step.scores) + sum(map(np.array, step.scorers), np.zeros(4))
      for step in watched.steps
  ]
  before = sum(v[s.chosen] for v, s in zip(values[:-1], watched.steps[:-1]))
  return before + values[-1].max()
