"""Searches: plain functions from a lattice, the root and a path's worth to a tree.

`chain` takes the best candidate step by step, `p_best` the p best paths, `beam` the
p best of those that a beam keeps, `best_first` the prefixes of highest score. All but
`chain` share one way to build a tree: paths merge where they have a prefix in common.
"""

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.rescoring import NEVER, newest
from bpd_jax.decoding.types import Array, Lattice, PathScore, Search, Tree
from bpd_jax.errors import InputError

SEARCHES = ("chain", "p_best", "beam", "batched", "best_first")


@dataclasses.dataclass(frozen=True)
class SearchSettings:
  """A search with its sizes.

  Attributes:
    name: "chain"; "p_best" (the p best paths, merged); "beam" (those that a plain
      beam search finds, merged); "batched" (the p best paths, each with all of its nodes, as
      in the paper's batches); "best_first" (the prefixes of highest score).
    num_paths: p, for "p_best", "beam" and "batched".
    num_nodes: nodes a call, root included; by default the depth + 1 of "chain",
      and what all paths together can need of the others. "best_first" must be told.
    beam_width: prefixes that a beam keeps, at least p: of "beam", and of "p_best"
      where the scorers see two drafted tokens or more. 64 by default.
  """

  name: str = "chain"
  num_paths: int = 1
  num_nodes: int | None = None
  beam_width: int = 64

  def __post_init__(self):
    if self.name not in SEARCHES:
      raise InputError("search", self.name, f"one of {SEARCHES}")
    for field in ("num_paths", "beam_width"):
      if getattr(self, field) < 1:
        raise InputError(field, getattr(self, field), "a positive integer")
    if self.num_paths > 1 and self.name in ("chain", "best_first"):
      raise InputError("num_paths", self.num_paths, f"1 for search {self.name!r}")
    if self.num_nodes is not None and self.num_nodes < 1:
      raise InputError("num_nodes", self.num_nodes, "a positive integer")
    if self.num_nodes is None and self.name == "best_first":
      raise InputError("num_nodes", None, "a positive integer for search 'best_first'")

  def check(self, depth: int, k: int) -> None:
    """Raises InputError where a lattice [depth, k] has no such tree."""
    if self.num_paths > k**depth:
      raise InputError(
          "num_paths", self.num_paths, f"at most {k}^{depth}, the paths of the lattice"
      )
    if self.name in ("beam", "batched", "p_best") and self.beam_width < self.num_paths:
      raise InputError("beam_width", self.beam_width, f"at least num_paths, {self.num_paths}")
    every = 1 + self.num_paths * depth
    if self.name in ("chain", "batched") and self.num_nodes not in (None, every):
      raise InputError(
          "num_nodes", self.num_nodes, f"{every} or None for search {self.name!r}"
      )

  def nodes(self, depth: int) -> int:
    """Nodes of the trees."""
    every = 1 + self.num_paths * depth
    if self.num_nodes is None:
      return every
    return self.num_nodes if self.name == "best_first" else min(self.num_nodes, every)

  def make(self, depth: int) -> Search:
    """The search over lattices of this depth."""
    nodes = self.nodes(depth)
    if self.name == "chain":
      return functools.partial(chain, num_nodes=nodes)
    if self.name == "best_first":
      return functools.partial(best_first, num_nodes=nodes)
    return functools.partial(
        p_best, num_paths=self.num_paths, num_nodes=nodes, beam_width=self.beam_width,
        is_beam=self.name == "beam", is_merged=self.name != "batched",
    )


@struct.dataclass
class Paths:
  """The best paths through a lattice.

  Attributes:
    choices: [batch, paths, depth] int32, which candidate each path takes.
    scores: [batch, paths], falling; below `NEVER` / 2 where there is no such path.
    is_exact: [batch] bool, whether these are proved to be the best of all paths.
  """

  choices: Array
  scores: Array
  is_exact: Array


def chain(lattice: Lattice, root: Array, score: PathScore, *, num_nodes: int) -> Tree:
  """The best candidate of each step, given those before it (Kim et al. 2024, Algorithm 2).

  Args:
    lattice: candidates.
    root: [batch] int32, the newest certain token.
    score: what candidates are worth.
    num_nodes: verify width, root included (static), at most depth + 1.

  Returns:
    A tree of `num_nodes` nodes in which node i is the child of node i - 1.
  """
  num_drafted = num_nodes - 1
  drafted = lattice.tokens[:, :0, 0]
  for i in range(num_drafted):
    best = jnp.argmax(score.addends(newest(drafted, score.context)[:, None], i)[:, 0], axis=-1)
    token = jnp.take_along_axis(lattice.tokens[:, i], best[:, None], axis=1)
    drafted = jnp.concatenate([drafted, token], axis=1)
  step = np.arange(num_nodes, dtype=np.int32)
  return Tree(
      tokens=jnp.concatenate([root[:, None], drafted], axis=1),
      depth=step,
      parents=step - 1,
      is_valid=step[None, :] <= lattice.num_steps[:, None],
      max_depth=num_drafted,
  )


def p_best(
    lattice: Lattice, root: Array, score: PathScore, *, num_paths: int, num_nodes: int,
    beam_width: int = 64, is_beam: bool = False, is_merged: bool = True,
) -> Tree:
  """The best paths as a tree (Kim et al. 2024, §5.2).

  Args:
    lattice: candidates.
    root: [batch] int32.
    score: what paths are worth.
    num_paths: p (static).
    num_nodes: most nodes, root included; those of worse paths are left out first
      (static).
    beam_width: see `best_paths`.
    is_beam: likewise.
    is_merged: whether paths share the nodes of a common prefix (static).

  Returns:
    A tree in which earlier nodes belong to better paths.
  """
  paths = best_paths(lattice, score, num_paths, beam_width, is_beam)
  build = merge_paths if is_merged else separate_paths
  return build(lattice, root, paths, num_nodes).replace(is_exact=paths.is_exact)


def best_paths(
    lattice: Lattice, score: PathScore, num_paths: int, beam_width: int = 64,
    is_beam: bool = False,
) -> Paths:
  """The p best paths.

  A backward pass over `score.bounds` says what the best completion of every prefix
  can be worth, given its last token, and the prefixes of highest sum and completion
  are kept. Where an addend depends on one drafted token at most (scorers of orders up
  to 2) the bounds are the addends and p prefixes are enough, as a prefix of one of the
  p best paths has at most p - 1 prefixes with better completions beside it: exact,
  with p × k sums a step. Otherwise a beam is kept, and a row is proved exact when its
  p-th path is worth no less than the best prefix that was dropped can be.

  Args:
    lattice: [batch, depth, k].
    score: what paths are worth.
    num_paths: p, at most k ** depth (static).
    beam_width: prefixes kept where p aren't enough, at least p (static).
    is_beam: whether to keep the best prefixes by what they are worth so far, as a
      plain beam search does (static).

  Returns:
    The paths, best first.
  """
  batch, depth, k = lattice.tokens.shape
  is_small = 0 <= score.context <= 1 and not is_beam
  width = num_paths if is_small else max(beam_width, num_paths)
  steps, completions = _backward(lattice, score)
  sums = jnp.zeros([batch, 1], lattice.scores.dtype)
  choices = jnp.zeros([batch, 1, 0], jnp.int32)
  tokens = choices
  dropped = jnp.full([batch], -jnp.inf, sums.dtype)
  for i in range(depth):
    if is_small:
      addends = steps[i]  # [batch, 1 or k, k]
      if i and score.context:
        addends = jnp.take_along_axis(addends, choices[..., -1:], axis=1)
    else:
      addends = score.addends(newest(tokens, score.context), i)
    total = sums[..., None] + addends  # [batch, prefixes, k]
    keep = min(width, total.shape[1] * k)
    value = (total + completions[i][:, None]).reshape(batch, -1)
    _, best = jax.lax.top_k(total.reshape(batch, -1) if is_beam else value, keep)
    if not is_small and keep < value.shape[1]:
      left = value.at[jnp.arange(batch)[:, None], best].set(-jnp.inf)
      dropped = jnp.maximum(dropped, left.max(-1))
    sums = jnp.take_along_axis(total.reshape(batch, -1), best, axis=1)
    parent, choice = best // k, (best % k).astype(jnp.int32)
    token = jnp.take_along_axis(lattice.tokens[:, i], choice, axis=1)
    extend = lambda old, new: jnp.concatenate(
        [jnp.take_along_axis(old, parent[..., None], axis=1), new[..., None]], axis=2
    )
    choices, tokens = extend(choices, choice), extend(tokens, token)
  # The last step's values were whole paths', so they are in order.
  sums, choices = sums[:, :num_paths], choices[:, :num_paths]
  return Paths(choices, sums, dropped <= sums[:, -1])


def _backward(lattice: Lattice, score: PathScore) -> tuple[list[Array], list[Array]]:
  """Bounds of every step's addends, and of the best completion after each candidate.

  Returns:
    A list of [batch, 1 or k, k], and one of [batch, k].
  """
  batch, depth, k = lattice.tokens.shape
  steps = []
  for i in range(depth):
    if i and score.context:
      history = lattice.tokens[:, i - 1][..., None]
    else:
      history = jnp.zeros([batch, 1, 0], jnp.int32)
    steps.append(score.bounds(history, i))
  best = jnp.zeros([batch, k], lattice.scores.dtype)
  completions = [best]
  for i in reversed(range(1, depth)):
    best = (steps[i] + best[:, None]).max(-1)
    best = jnp.broadcast_to(best, (batch, k))
    completions.append(best)
  return steps, completions[::-1]


def merge_paths(lattice: Lattice, root: Array, paths: Paths, num_nodes: int) -> Tree:
  """A tree of the paths, each prefix once.

  Args:
    lattice: the paths'.
    root: [batch] int32.
    paths: best first.
    num_nodes: most nodes, root included (static).
  """
  batch, num_paths, depth = paths.choices.shape
  same = paths.choices[:, :, None] == paths.choices[:, None]  # [b, path, other, depth]
  is_shared = jnp.cumprod(same, axis=-1).astype(bool)
  # The first path that has this prefix makes the node: [batch, path, depth].
  maker = jnp.argmax(is_shared, axis=2)
  is_path = paths.scores > NEVER / 2
  is_new = (maker == jnp.arange(num_paths)[:, None]) & is_path[..., None]
  is_new &= jnp.arange(depth) < lattice.num_steps[:, None, None]
  number = jnp.cumsum(is_new.reshape(batch, -1), axis=1).reshape(is_new.shape)
  node = jnp.take_along_axis(number, maker, axis=1)  # of every prefix, from 1 on
  parent = jnp.concatenate([jnp.zeros_like(node[..., :1]), node[..., :-1]], axis=2)
  tokens = jnp.take_along_axis(lattice.tokens, paths.choices.swapaxes(1, 2), axis=2)
  tokens = tokens.swapaxes(1, 2)
  level = jnp.broadcast_to(jnp.arange(1, depth + 1), node.shape)
  # Nodes that aren't new, or too many, fall off the end.
  at = jnp.where(is_new & (number < num_nodes), number, num_nodes).reshape(batch, -1)
  place = lambda values, first: _scatter(
      jnp.broadcast_to(first, [batch]), at, values.reshape(batch, -1), num_nodes
  )
  return Tree(
      tokens=place(tokens, root),
      depth=place(level, 0),
      parents=place(parent, -1),
      is_valid=place(is_new, True),
      max_depth=depth,
  )


def separate_paths(lattice: Lattice, root: Array, paths: Paths, num_nodes: int) -> Tree:
  """A tree in which each path has all of its nodes: p drafts beside each other.

  Args:
    lattice: the paths'.
    root: [batch] int32.
    paths: best first.
    num_nodes: 1 + paths × depth (static).
  """
  batch, num_paths, depth = paths.choices.shape
  tokens = jnp.take_along_axis(lattice.tokens, paths.choices.swapaxes(1, 2), axis=2)
  level = np.tile(np.arange(1, depth + 1), num_paths)
  node = np.arange(1, num_nodes)
  is_path = jnp.repeat(paths.scores > NEVER / 2, depth, axis=1)
  is_valid = is_path & (level <= lattice.num_steps[:, None])
  join = lambda first, rest: np.concatenate([[first], rest]).astype(np.int32)
  return Tree(
      tokens=jnp.concatenate([root[:, None], tokens.swapaxes(1, 2).reshape(batch, -1)], axis=1),
      depth=join(0, level),
      parents=join(-1, np.where(level == 1, 0, node - 1)),
      is_valid=jnp.concatenate([jnp.ones([batch, 1], bool), is_valid], axis=1),
      max_depth=depth,
  )


def best_first(lattice: Lattice, root: Array, score: PathScore, *, num_nodes: int) -> Tree:
  """The prefixes of highest score, whatever their lengths.

  A prefix's score is the sum of what its steps are worth, each step brought to the
  probability that the drafter gives to its candidates together; then no prefix is
  worth more than a part of it, and these are the `num_nodes` - 1 prefixes that the
  model most expects to be accepted.

  Args:
    lattice: candidates.
    root: [batch] int32.
    score: what prefixes are worth.
    num_nodes: nodes, root included (static).
  """
  batch, depth, k = lattice.tokens.shape
  width = num_nodes - 1
  mass = jnp.minimum(jax.nn.logsumexp(lattice.scores, axis=-1), 0)  # [batch, depth]
  sums = jnp.zeros([batch, 1], lattice.scores.dtype)
  tokens = jnp.zeros([batch, 1, 0], jnp.int32)
  levels = []
  for i in range(depth):
    addends = jax.nn.log_softmax(score.addends(newest(tokens, score.context), i), axis=-1)
    is_drafted = (i < lattice.num_steps)[:, None, None]
    addends = jnp.where(is_drafted, addends + mass[:, i, None, None], NEVER)
    total = (sums[..., None] + addends).reshape(batch, -1)
    sums, best = jax.lax.top_k(total, min(width, total.shape[1]))
    parent, choice = best // k, best % k
    token = jnp.take_along_axis(lattice.tokens[:, i], choice, axis=1)
    levels.append((sums, parent, token))
    tokens = jnp.concatenate(
        [jnp.take_along_axis(tokens, parent[..., None], axis=1), token[..., None]], axis=2
    )
  # All levels in one row, a parent always before its children; node 0 is the root.
  starts = np.cumsum([0, *(level[0].shape[1] for level in levels)])
  scores = jnp.concatenate([level[0] for level in levels], axis=1)
  parents = jnp.concatenate(
      [jnp.zeros_like(levels[0][1]) - 1]
      + [level[1] + start for level, start in zip(levels[1:], starts)], axis=1
  )
  tokens = jnp.concatenate([level[2] for level in levels], axis=1)
  level_of = np.repeat(np.arange(1, depth + 1), np.diff(starts))
  _, chosen = jax.lax.top_k(scores, min(width, scores.shape[1]))
  is_chosen = jnp.zeros(scores.shape, bool).at[jnp.arange(batch)[:, None], chosen].set(True)
  is_chosen &= scores > NEVER / 2
  number = jnp.cumsum(is_chosen, axis=1)
  at = jnp.where(is_chosen, number, num_nodes)
  parent = jnp.take_along_axis(number, jnp.maximum(parents, 0), axis=1)
  place = lambda values, first: _scatter(
      jnp.broadcast_to(first, [batch]), at, jnp.broadcast_to(values, scores.shape), num_nodes
  )
  return Tree(
      tokens=place(tokens, root),
      depth=place(level_of, 0),
      parents=place(jnp.where(parents < 0, 0, parent), -1),
      is_valid=place(is_chosen, True),
      max_depth=depth,
  )


def _scatter(first: Array, at: Array, values: Array, length: int) -> Array:
  """[batch, length] with `first` at 0 and `values` where `at` says; beyond it, nowhere."""
  batch = first.shape[0]
  # A Python number is 64 bits wide where those are switched on.
  dtype = jnp.int32 if jnp.issubdtype(first.dtype, jnp.integer) else first.dtype
  out = jnp.zeros([batch, length], dtype).at[:, 0].set(first.astype(dtype))
  return out.at[jnp.arange(batch)[:, None], at].set(values.astype(dtype), mode="drop")
