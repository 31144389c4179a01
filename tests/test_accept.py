"""Acceptance on hand-made trees."""

import jax.numpy as jnp
import numpy as np
import pytest

from bpd_jax.decoding import accept
from bpd_jax.decoding import tree as trees
from bpd_jax.decoding.types import Tree, Verified
from bpd_jax.errors import InputError

EOS = 1


def make_tree(tokens, parents, is_valid=None):
  depth = []
  for parent in parents:
    depth.append(0 if parent < 0 else depth[parent] + 1)
  valid = [True] * len(tokens) if is_valid is None else is_valid
  return Tree(
      tokens=jnp.array([tokens]),
      depth=np.array(depth, np.int32),
      parents=np.array(parents, np.int32),
      is_valid=jnp.array([valid]),
      max_depth=max(depth),
  )


def make_verified(choice, vocab=None, logits=None):
  nodes = len(choice)
  return Verified(
      choice=jnp.array([choice]),
      hidden=jnp.arange(nodes, dtype=jnp.float32)[None, :, None],
      keys=(), values=(), logits=logits,
  )


def step_of(tree, choice, rule=accept.ExactMatch(), logits=None):
  step = accept.accept(rule, tree, make_verified(choice, logits=logits), eos_id=EOS)
  n = int(step.num_tokens[0])
  return step.tokens[0, :n].tolist(), step.path[0, :n].tolist(), float(step.hidden[0, 0])


def test_ancestors_of_the_docstring():
  reach = trees.ancestors(make_tree([5, 6, 7, 8], [-1, 0, 0, 1]))
  np.testing.assert_array_equal(
      reach, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
  )


def test_deepest_branch_wins_and_gives_hidden_and_choice():
  tree = make_tree([5, 6, 7, 8, 9], [-1, 0, 0, 2, 3])
  assert step_of(tree, [7, 2, 8, 3, 4]) == ([7, 8, 3], [0, 2, 3], 3.0)


def test_first_of_equally_deep_nodes_wins():
  # Both branches can pass only under a loose rule.
  tree = make_tree([5, 6, 7], [-1, 0, 0])
  rule = accept.ApproximateDistance(1)
  assert step_of(tree, [6, 3, 4], rule) == ([6, 3], [0, 1], 1.0)


def test_nothing_accepted_emits_the_choice_at_the_root():
  assert step_of(make_tree([5, 6, 7], [-1, 0, 1]), [9, 7, 3]) == ([9], [0], 0.0)


def test_accepted_eos_ends_the_row_without_a_further_token():
  tree = make_tree([5, 6, EOS, 8], [-1, 0, 1, 2])
  # Even where the child of EOS equals the choice there, it is not accepted.
  assert step_of(tree, [6, EOS, 8, 9]) == ([6, EOS], [0, 1], 2.0)


def test_invalid_node_is_never_accepted():
  tree = make_tree([5, 6, 7], [-1, 0, 1], [True, False, True])
  assert step_of(tree, [6, 7, 8]) == ([6], [0], 0.0)


def test_child_of_a_rejected_node_is_rejected():
  tree = make_tree([5, 6, 7, 8], [-1, 0, 1, 2])
  assert step_of(tree, [9, 7, 8, 3]) == ([9], [0], 0.0)


def test_top_k_rule():
  tree = make_tree([5, 2, 3], [-1, 0, 1])
  logits = jnp.array([[[0, 0, 7, 9, 0, 0], [0, 0, 0, 7, 7, 9], [1, 0, 0, 0, 0, 0]]])
  choice = [3, 5, 0]
  assert step_of(tree, choice, accept.ApproximateTopK(1), logits)[0] == [3]
  assert step_of(tree, choice, accept.ApproximateTopK(2), logits)[0] == [2, 3, 0]
  # Token 4 ties with 3 at the second place and comes after it.
  tied = make_tree([5, 2, 4], [-1, 0, 1])
  assert step_of(tied, choice, accept.ApproximateTopK(2), logits)[0] == [2, 5]


def test_distance_rule():
  tree = make_tree([5, 8, 4], [-1, 0, 1])
  assert step_of(tree, [6, 5, 9], accept.ApproximateDistance(1))[0] == [6]
  assert step_of(tree, [6, 5, 9], accept.ApproximateDistance(2))[0] == [8, 4, 9]


def test_minimum_block_rule():
  tree = make_tree([5, 6, 7, 8], [-1, 0, 1, 2])
  choice = [9, 9, 9, 4]
  assert step_of(tree, choice, accept.ApproximateMinimumBlock(1))[0] == [9]
  assert step_of(tree, choice, accept.ApproximateMinimumBlock(3))[0] == [6, 7, 9]
  assert step_of(tree, choice, accept.ApproximateMinimumBlock(4))[0] == [6, 7, 8, 4]
  # Only the first valid branch passes unseen.
  wide = make_tree([5, 6, 7], [-1, 0, 0], [True, False, True])
  assert step_of(wide, choice[:3], accept.ApproximateMinimumBlock(2))[0] == [7, 9]


@pytest.mark.parametrize(
    "rule", [lambda: accept.ApproximateTopK(0), lambda: accept.ApproximateDistance(-1),
             lambda: accept.ApproximateMinimumBlock(0)]
)
def test_rules_name_the_field_that_is_wrong(rule):
  with pytest.raises(InputError, match=r"Approximate\w+\.\w+ = -?\d: allowed is"):
    rule()
