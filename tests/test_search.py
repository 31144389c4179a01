"""Searches against all paths of small lattices, in integers, ties included."""

import functools

import jax
import jax.numpy as jnp
from lattices import all_paths, HashScorer, random_lattice
import numpy as np
import pytest

from bpd_jax.decoding.loop import empty_step
from bpd_jax.decoding.rescoring import (
    candidate_entropy,
    constant_weights,
    NEVER,
    Rescorer,
    RescorerParams,
)
from bpd_jax.decoding.search import best_first, best_paths, chain, p_best, SearchSettings
from bpd_jax.decoding.types import Lattice, Prompt
from bpd_jax.errors import InputError

LATTICES = 250  # a case of p-best
ROWS = 100


def path_score(rescorer, lattice, roots, weights=None):
  """What paths are worth after a step that made `roots` certain."""
  values = (1.0,) * len(rescorer.scorers) if weights is None else weights
  depth = lattice.tokens.shape[1]
  params = RescorerParams(
      constant_weights(values, depth) if values else None, ((),) * len(rescorer.scorers)
  )
  prompt = Prompt(roots[:, None], jnp.ones_like(roots), depth + 1)
  step = empty_step(jnp.zeros([len(roots), 1]), depth)
  step = step.replace(
      tokens=step.tokens.at[:, 0].set(roots), num_tokens=jnp.ones_like(roots)
  )
  state = rescorer.start(params, rescorer.init(params, prompt, None), step, lattice)
  return rescorer.path_score(params, state, lattice)


@functools.partial(jax.jit, static_argnames=("rescorer", "num_paths", "beam_width", "is_beam"))
def find_paths(rescorer, lattice, roots, num_paths, beam_width=64, is_beam=False):
  score = path_score(rescorer, lattice, roots)
  return best_paths(lattice, score, num_paths, beam_width, is_beam)


def worths(rescorer, root):
  """(history, token, i) -> the sum of a row's scorers, all with weight 1."""

  def worth(history, token, i):
    total = 0
    for scorer in rescorer.scorers:
      before = history if scorer.context < 0 else history[len(history) - scorer.context :]
      if 0 <= scorer.context <= len(history):
        before = history[len(history) - scorer.context :]
      elif scorer.context > len(history):
        before = history
      total += scorer.value(root, before, token)
    return total

  return worth


def check_row(found, lattice, row, expected, num_paths):
  """Scores are the best there are, each is its own path's, and no path comes twice."""
  depth = lattice.num_steps[row]
  scores = np.asarray(found.scores[row])
  wanted = [score for score, _ in expected[:num_paths]]
  np.testing.assert_array_equal(scores[: len(wanted)], wanted)
  assert (scores[len(wanted) :] < NEVER / 2).all()
  of_path = {path: score for score, path in expected}
  paths = []
  for choices, score in zip(np.asarray(found.choices[row])[: len(wanted)], wanted):
    path = tuple(int(lattice.tokens[row, i, choices[i]]) for i in range(depth))
    assert of_path[path] == score
    paths.append(path)
  assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    "contexts,depth,k,num_paths",
    [
        ((), 4, 3, 1), ((), 3, 4, 16), ((0,), 4, 3, 9), ((1,), 4, 3, 1), ((1,), 4, 4, 16),
        ((1,), 2, 3, 9), ((1, 0, 1), 5, 3, 20), ((1,), 1, 5, 5), ((1,), 3, 2, 8),
    ],
)
def test_p_best_is_exact_for_contexts_of_one_token(contexts, depth, k, num_paths):
  # 9 × 250 lattices with integer scores: most of them have ties among the best.
  rng = np.random.default_rng([depth, k, num_paths])
  num_steps = rng.integers(0, depth + 1, LATTICES).astype(np.int32)
  lattice = random_lattice(rng, LATTICES, depth, k, num_steps=num_steps)
  roots = rng.integers(0, 50, LATTICES).astype(np.int32)
  rescorer = Rescorer(tuple(map(HashScorer, contexts)))
  found = jax.device_get(find_paths(rescorer, lattice, roots, num_paths))
  assert found.is_exact.all()
  num_ties = 0
  for row in range(LATTICES):
    expected = all_paths(
        lattice.tokens[row], lattice.scores[row], num_steps[row], worths(rescorer, int(roots[row]))
    )
    check_row(found, lattice, row, expected, num_paths)
    num_ties += len({score for score, _ in expected[:num_paths]}) < min(
        num_paths, len(expected)
    )
  assert num_paths == 1 or num_ties > LATTICES // 4


@pytest.mark.parametrize("context", [2, 3, -1])
@pytest.mark.parametrize("beam_width", [4, 8, 30, 300])
def test_a_beam_is_exact_where_it_says_so(context, beam_width):
  rng = np.random.default_rng([beam_width, context + 1])
  lattice = random_lattice(rng, ROWS, 5, 3)
  roots = rng.integers(0, 50, ROWS).astype(np.int32)
  rescorer = Rescorer((HashScorer(context),))
  found = jax.device_get(find_paths(rescorer, lattice, roots, 4, beam_width))
  num_right = 0
  for row in range(ROWS):
    expected = all_paths(
        lattice.tokens[row], lattice.scores[row], 5, worths(rescorer, int(roots[row]))
    )
    of_path = {path: score for score, path in expected}
    for choices, score in zip(found.choices[row], found.scores[row]):
      path = tuple(int(lattice.tokens[row, i, c]) for i, c in enumerate(choices))
      assert of_path[path] == score
    is_right = found.scores[row].tolist() == [score for score, _ in expected[:4]]
    num_right += is_right
    assert is_right or not found.is_exact[row]
  proved = found.is_exact.sum()
  if beam_width == 300:
    assert proved == ROWS  # nothing was dropped
  elif beam_width == 4:
    assert proved < num_right < ROWS  # otherwise this shows nothing
  else:
    assert 0 < proved <= num_right


def test_the_beam_over_small_contexts_is_a_beam():
  rng = np.random.default_rng(0)
  lattice = random_lattice(rng, ROWS, 5, 4)
  roots = rng.integers(0, 50, ROWS).astype(np.int32)
  rescorer = Rescorer((HashScorer(1, spread=9),))
  exact = find_paths(rescorer, lattice, roots, 2)
  beam = find_paths(rescorer, lattice, roots, 2, 2, True)
  worse = np.asarray((beam.scores < exact.scores).any(-1))
  assert not (beam.scores > exact.scores).any() and worse.any()
  assert not np.asarray(beam.is_exact)[worse].any()


def tree_paths(tree, row):
  """The token paths from the root to every valid node, in the order of the nodes."""
  paths = {0: ()}
  parents = np.broadcast_to(tree.parents, tree.tokens.shape)[row]
  depth = np.broadcast_to(tree.depth, tree.tokens.shape)[row]
  out = []
  for node in range(1, tree.tokens.shape[1]):
    if tree.is_valid[row, node]:
      parent = int(parents[node])
      assert parent in paths and parent < node
      paths[node] = paths[parent] + (int(tree.tokens[row, node]),)
      assert depth[node] == len(paths[node])
      out.append(paths[node])
  return out


@pytest.mark.parametrize("num_nodes", [5, 9, 64])
@pytest.mark.parametrize("contexts", [(), (1,), (2,)])
def test_a_tree_of_paths_has_each_prefix_once_the_best_first(contexts, num_nodes):
  rng = np.random.default_rng(num_nodes)
  num_steps = rng.integers(0, 5, ROWS).astype(np.int32)
  lattice = random_lattice(rng, ROWS, 4, 3, num_steps=num_steps)
  roots = rng.integers(0, 50, ROWS).astype(np.int32)
  rescorer = Rescorer(tuple(map(HashScorer, contexts)))

  @jax.jit
  def find(lattice, roots):
    score = path_score(rescorer, lattice, roots)
    return (
        best_paths(lattice, score, 6, 100),
        p_best(lattice, roots, score, num_paths=6, num_nodes=num_nodes, beam_width=100),
        p_best(lattice, roots, score, num_paths=6, num_nodes=25, is_merged=False),
    )

  paths, tree, separate = jax.device_get(find(lattice, roots))
  np.testing.assert_array_equal(tree.tokens[:, 0], roots)
  assert tree.is_valid[:, 0].all() and tree.tokens.shape == (ROWS, num_nodes)
  for row in range(ROWS):
    expected, every = [], []
    for choices, score in zip(paths.choices[row], paths.scores[row]):
      if score < NEVER / 2:
        continue
      path = tuple(int(lattice.tokens[row, i, c]) for i, c in enumerate(choices))
      prefixes = [path[:n] for n in range(1, num_steps[row] + 1)]
      every += prefixes
      expected += [prefix for prefix in prefixes if prefix not in expected]
    assert tree_paths(tree, row) == expected[: num_nodes - 1]
    assert tree_paths(separate, row) == every


@pytest.mark.parametrize("contexts", [(), (1,), (-1,)])
@pytest.mark.parametrize("num_nodes", [2, 7, 33])
def test_best_first_takes_the_most_probable_prefixes(contexts, num_nodes):
  rng = np.random.default_rng(num_nodes)
  num_steps = rng.integers(0, 5, ROWS).astype(np.int32)
  lattice = random_lattice(rng, ROWS, 4, 3, num_steps=num_steps)
  # Probabilities: some of each step's mass isn't among the candidates.
  probs = rng.dirichlet([1, 1, 1, 1], (ROWS, 4))[..., :3].astype(np.float32)
  lattice = lattice.replace(scores=np.log(-np.sort(-probs, -1)))
  roots = rng.integers(0, 50, ROWS).astype(np.int32)
  rescorer = Rescorer(tuple(map(HashScorer, contexts)))

  @jax.jit
  def find(lattice, roots):
    score = path_score(rescorer, lattice, roots)
    return best_first(lattice, roots, score, num_nodes=num_nodes)

  tree = jax.device_get(find(lattice, roots))
  assert tree.tokens.shape == (ROWS, num_nodes)
  for row in range(ROWS):
    worth = worths(rescorer, int(roots[row]))
    values, level = {}, [((), 0.0)]
    for i in range(num_steps[row]):
      tokens, scores = lattice.tokens[row, i], lattice.scores[row, i].astype(float)
      following = []
      for path, total in level:
        raw = np.array([s + worth(list(path), int(t), i) for t, s in zip(tokens, scores)])
        logs = raw - np.log(np.exp(raw).sum()) + np.log(np.exp(scores).sum())
        following += [(path + (int(t),), total + x) for t, x in zip(tokens, logs)]
      values |= dict(following)
      level = following
    found = tree_paths(tree, row)
    assert len(set(found)) == len(found) == min(num_nodes - 1, len(values))
    kept = sorted((values[path] for path in found), reverse=True)
    best = sorted(values.values(), reverse=True)[: num_nodes - 1]
    np.testing.assert_allclose(kept, best, atol=1e-4)


@pytest.mark.parametrize("contexts", [(), (1,), (-1, 0)])
def test_chain_takes_the_best_step_by_step(contexts):
  rng = np.random.default_rng(1)
  lattice = random_lattice(rng, ROWS, 4, 3)
  roots = rng.integers(0, 50, ROWS).astype(np.int32)
  rescorer = Rescorer(tuple(map(HashScorer, contexts)))

  @jax.jit
  def find(lattice, roots):
    return chain(lattice, roots, path_score(rescorer, lattice, roots))

  tree = jax.device_get(find(lattice, roots))
  for row in range(ROWS):
    worth, path = worths(rescorer, int(roots[row])), []
    for i in range(4):
      values = [
          lattice.scores[row, i, c] + worth(path, int(t), i)
          for c, t in enumerate(lattice.tokens[row, i])
      ]
      path.append(int(lattice.tokens[row, i, int(np.argmax(values))]))
    assert tree.tokens[row].tolist() == [roots[row], *path]


def test_weights_by_step_and_by_entropy():
  lattice = Lattice(
      tokens=np.array([[[5, 6], [7, 8]]], np.int32),
      scores=np.log(np.array([[[0.5, 0.25], [0.9, 0.1]]], np.float32)),
      num_steps=np.array([2], np.int32),
  )
  probs = np.array([[0.5, 0.25, 0.25], [0.9, 0.1, 1]])  # the last: all others together
  entropy = -(probs * np.log(probs)).sum(-1)
  np.testing.assert_allclose(candidate_entropy(lattice)[0], entropy, rtol=1e-5)
  scorer, root = HashScorer(1), jnp.array([3], jnp.int32)
  rescorer = Rescorer((scorer,))
  weights = constant_weights((2.0,), 2, (0.5,))
  weights = weights.replace(by_step=weights.by_step * jnp.array([1.0, 3.0]))
  params = RescorerParams(weights, ((),))
  score = rescorer.path_score(params, (root,), lattice)
  trails = score.begin(1)
  first = score.addends(trails, 0)[0, 0]
  trails = score.extend(trails, jnp.array([[0]]), jnp.array([[6]]), 0)
  second = score.addends(trails, 1)[0, 0]
  for i, (found, history) in enumerate([(first, []), (second, [6])]):
    raw = np.array([scorer.value(3, history, int(t)) for t in lattice.tokens[0, i]])
    weight = 2 * [1, 3][i] * np.sqrt(entropy[i])
    np.testing.assert_allclose(found, lattice.scores[0, i] + weight * raw, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [SearchSettings(), SearchSettings("p_best"), SearchSettings("best_first", num_nodes=9)],
)
def test_a_lattice_without_steps_leaves_the_root(settings):
  lattice = Lattice(
      jnp.zeros([2, 0, 3], jnp.int32), jnp.zeros([2, 0, 3]), jnp.zeros([2], jnp.int32)
  )
  roots = jnp.array([4, 9], jnp.int32)
  tree = settings(lattice, roots, path_score(Rescorer(), lattice, roots))
  assert settings.nodes(0) == 1
  assert tree.tokens.tolist() == [[4], [9]] and tree.is_valid.all()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"name": "viterbi"}, "search = 'viterbi': allowed is one of"),
        ({"name": "p_best", "num_paths": 0}, "num_paths = 0"),
        ({"name": "chain", "num_paths": 2}, "num_paths = 2"),
        ({"name": "best_first"}, "num_nodes = None"),
        ({"name": "p_best", "num_paths": 9}, "num_paths = 9: allowed is at most 2\\^3"),
        ({"name": "beam", "num_paths": 8, "beam_width": 4}, "beam_width = 4"),
        ({"name": "batched", "num_paths": 2, "num_nodes": 5}, "num_nodes = 5"),
    ],
)
def test_settings_that_no_lattice_has(arguments, message):
  with pytest.raises(InputError, match=message):
    SearchSettings(**arguments).check(3, 2)
