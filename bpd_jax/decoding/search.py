"""Searches: plain functions from a lattice, the root and a path's worth to a tree.

`chain` takes the best candidate step by step, `p_best` the p best paths, `beam` the
p best of those that a beam keeps, `best_first` the prefixes of highest score. All but
`chain` share one way to build a tree: paths merge where they have a prefix in common.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.lattice import at_step
from bpd_jax.decoding.rescoring import NEVER
from bpd_jax.decoding.types import Array, Lattice, PathScore, Tree
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
    if self.num_nodes is None or depth == 0:
      return every
    return self.num_nodes if self.name == "best_first" else min(self.num_nodes, every)

  @property
  def num_prefixes(self) -> int:
    """Prefixes that it keeps from step to step, where scorers see the whole draft."""
    if self.name == "chain":
      return 1
    if self.name == "best_first":
      return self.num_nodes - 1
    return max(self.beam_width, self.num_paths)

  def __call__(self, lattice: Lattice, root: Array, score: PathScore) -> Tree:
    """The tree, of as many nodes as lattices of this depth have."""
    depth = lattice.tokens.shape[1]
    if self.name == "chain" or depth == 0:
      return chain(lattice, root, score)
    if self.name == "best_first":
      return best_first(lattice, root, score, num_nodes=self.nodes(depth))
    return p_best(
        lattice, root, score, num_paths=self.num_paths, num_nodes=self.nodes(depth),
        beam_width=self.beam_width, is_beam=self.name == "beam",
        is_merged=self.name != "batched",
    )


@struct.dataclass
class Paths:
  """The best paths through a lattice.

  Attributes:
    choices: [batch, paths, depth] int32, which candidate each path takes.
    scores: [batch, paths], falling; below `NEVER` / 2 where there is no such path.
    is_exact: [batch] bool, whether these are proved to be the best of all paths.
    is_finite: [batch] bool, whether none of the prefixes that were kept is worth NaN.
  """

  choices: Array
  scores: Array
  is_exact: Array
  is_finite: Array


def chain(lattice: Lattice, root: Array, score: PathScore) -> Tree:
  """The best candidate of each step, given those before it (Kim et al. 2024, Algorithm 2).

  Args:
    lattice: candidates.
    root: [batch] int32, the newest certain token.
    score: what candidates are worth.

  Returns:
    A tree of depth + 1 nodes in which node i is the child of node i - 1.
  """
  _, depth, k = lattice.tokens.shape
  is_finite = None
  if k == 1 or depth == 0:
    drafted = lattice.tokens[..., 0]
  else:
    parents = jnp.zeros([len(root), 1], jnp.int32)

    def choose(addends: Array, i: Array | int) -> tuple[Array, Array]:
      """The token of step i and what it adds, each [batch, 1]."""
      best = jnp.argmax(addends[:, :1], axis=-1)  # NaN is the largest
      pick = lambda values: jnp.take_along_axis(values, best, axis=1)
      return pick(at_step(lattice.tokens, i)), pick(addends[:, 0])

    def take(before: tuple[Any, Array], i: Array) -> tuple[tuple[Any, Array], Any]:
      trails = score.extend(before[0], parents, before[1], i - 1)
      token, added = choose(score.addends(trails, i), i)
      return (trails, token), (token, added)

    trails = score.begin(1)
    drafted, added = first = choose(score.addends(trails, 0), 0)
    if depth > 1:
      _, others = jax.lax.scan(take, (trails, first[0]), jnp.arange(1, depth))
      drafted, added = (
          jnp.concatenate([x, more[..., 0].T], axis=1) for x, more in zip(first, others)
      )
    is_finite = ~jnp.isnan(added).any(-1)
  step = np.arange(depth + 1, dtype=np.int32)
  return Tree(
      tokens=jnp.concatenate([root[:, None], drafted], axis=1),
      depth=step,
      parents=step - 1,
      is_valid=step[None, :] <= lattice.num_steps[:, None],
      max_depth=depth,
      is_finite=is_finite,
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
  tree = build(lattice, root, paths, num_nodes)
  return tree.replace(is_exact=paths.is_exact, is_finite=paths.is_finite)


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
  is_small = 0 <= score.context <= 1 and not is_beam
  width = num_paths if is_small else max(beam_width, num_paths)
  bounds = score.bounds()

  def grow(trails: Any, prefixes: Prefixes, i: Array) -> tuple[Any, Array]:
    if not is_small:
      return _extend(lattice, score, trails, prefixes, i)
    addends = at_step(trails, i)  # [batch, 1 or k, k]
    if addends.shape[1] > 1:
      addends = jnp.take_along_axis(addends, prefixes.choices[..., None], axis=1)
    return trails, addends

  if is_small:
    first = score.addends(score.begin(1), 0)[:, None]
    first = jnp.broadcast_to(first, (len(first), 1, *bounds.shape[2:]))
    trails = jnp.concatenate([first, bounds], axis=1)
  else:
    trails = score.begin(width)
  levels, left = _walk(lattice, width, trails, grow, _completions(lattice, bounds), is_beam)
  # The last step's values were whole paths', so they are in order.
  sums = levels.sums[-1, :, :num_paths]
  dropped = jnp.full_like(sums[:, -1], -jnp.inf) if is_small else left.max(0)
  return Paths(
      _choices(levels, num_paths), sums, dropped <= sums[:, -1], ~jnp.isnan(levels.sums).any((0, 2))
  )


@struct.dataclass
class Prefixes:
  """Beginnings of paths, all of one length, best first.

  Attributes:
    sums: [batch, width], what they are worth; -inf where there are no more.
    parents: [batch, width] int32, which of those a step shorter each goes on from.
    choices: [batch, width] int32, the candidate that it takes.
  """

  sums: Array
  parents: Array
  choices: Array


def _walk(
    lattice: Lattice, width: int, trails: Any, grow: Callable,
    completions: Array | None = None, is_beam: bool = False,
) -> tuple[Prefixes, Array]:
  """Goes through a lattice with the best prefixes of each length.

  Args:
    lattice: of one step at least.
    width: prefixes kept (static).
    trails: of `width` paths without a token.
    grow: (trails, prefixes, i) -> their trails with their newest tokens, and the
      addends of step i.
    completions: [depth, batch, k] what comes after each candidate can be worth; it counts
      as well where given.
    is_beam: whether prefixes are kept by what they are worth so far alone (static).

  Returns:
    The prefixes of every length, [depth, batch, width], and the best value of those that
    weren't kept, completions included, [depth, batch].
  """
  batch, depth, k = lattice.tokens.shape
  row = jnp.arange(batch)[:, None]

  def go_on(before: tuple[Any, Prefixes], i: Array) -> tuple[tuple[Any, Prefixes], Any]:
    trails, addends = grow(*before, i)
    total = before[1].sums[..., None] + addends  # [batch, width, k]
    value = total if completions is None else total + completions[i][:, None]
    total, value = total.reshape(batch, -1), value.reshape(batch, -1)
    _, place = jax.lax.top_k(total if is_beam else value, width)
    left = value.at[row, place].set(-jnp.inf).max(-1)
    place = place.astype(jnp.int32)
    sums = jnp.take_along_axis(total, place, axis=1)
    prefixes = Prefixes(sums, place // k, place % k)
    return (trails, prefixes), (prefixes, left)

  # One path without a token; the others are none.
  sums = jnp.full([batch, width], -jnp.inf, lattice.scores.dtype).at[:, :1].set(0)
  none = jnp.zeros([batch, width], jnp.int32)
  start = (trails, Prefixes(sums, none, none))
  return jax.lax.scan(go_on, start, jnp.arange(depth, dtype=jnp.int32))[1]


def _extend(
    lattice: Lattice, score: PathScore, trails: Any, prefixes: Prefixes, i: Array
) -> tuple[Any, Array]:
  """Trails of prefixes of i tokens, and the addends of step i."""

  def extend() -> Any:
    before = at_step(lattice.tokens, i - 1)
    tokens = jnp.take_along_axis(before, prefixes.choices, axis=1)
    return score.extend(trails, prefixes.parents, tokens, i - 1)

  trails = jax.lax.cond(i > 0, extend, lambda: trails)
  return trails, score.addends(trails, i)


def _choices(levels: Prefixes, num_paths: int) -> Array:
  """The candidates of the best paths, [batch, paths, depth]: from their ends to the root."""

  def back(place: Array, level: Prefixes) -> tuple[Array, Array]:
    pick = lambda values: jnp.take_along_axis(values, place, axis=1)
    return pick(level.parents), pick(level.choices)

  batch = levels.sums.shape[1]
  last = jnp.broadcast_to(jnp.arange(num_paths, dtype=jnp.int32), (batch, num_paths))
  _, choices = jax.lax.scan(back, last, levels, reverse=True)
  return jnp.moveaxis(choices, 0, -1)


def _completions(lattice: Lattice, bounds: Array) -> Array:
  """What the best completion after each candidate can be worth, [depth, batch, k]."""
  batch, _, k = lattice.tokens.shape
  nothing = jnp.zeros([batch, k], lattice.scores.dtype)
  if not bounds.shape[1]:
    return nothing[None]

  def back(best: Array, bound: Array) -> tuple[Array, Array]:
    best = jnp.broadcast_to((bound + best[:, None]).max(-1), (batch, k))
    return best, best

  _, completions = jax.lax.scan(back, nothing, jnp.moveaxis(bounds, 1, 0), reverse=True)
  return jnp.concatenate([completions, nothing[None]])


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
  level = jnp.broadcast_to(jnp.arange(1, depth + 1), node.shape)
  in_row = lambda values: values.reshape(batch, -1)
  return _tree(
      root, in_row(number), in_row(tokens.swapaxes(1, 2)), in_row(level), in_row(parent),
      num_nodes, depth,
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
  batch, depth, _ = lattice.tokens.shape
  width = num_nodes - 1
  mass = jnp.minimum(jax.nn.logsumexp(lattice.scores, axis=-1), 0)  # [batch, depth]

  def grow(trails: Any, prefixes: Prefixes, i: Array) -> tuple[Any, Array]:
    trails, addends = _extend(lattice, score, trails, prefixes, i)
    # Where scorers rule all candidates out there is nothing to share.
    is_none = addends.max(-1, keepdims=True) == -jnp.inf
    addends = jax.nn.log_softmax(addends, axis=-1) + at_step(mass, i)[:, None, None]
    addends = jnp.where(is_none, -jnp.inf, addends)
    return trails, jnp.where((i < lattice.num_steps)[:, None, None], addends, NEVER)

  levels, _ = _walk(lattice, width, score.begin(width), grow)
  is_finite = ~jnp.isnan(levels.sums).any((0, 2))
  # All levels in one row, a parent always before its children; node 0 is the root.
  levels = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), levels)  # [batch, depth, width]
  tokens = jnp.take_along_axis(lattice.tokens, levels.choices, axis=2)
  scores, parents, tokens = (
      x.reshape(batch, -1) for x in (levels.sums, levels.parents, tokens)
  )
  level = np.repeat(np.arange(1, depth + 1), width)
  _, chosen = jax.lax.top_k(scores, width)
  is_chosen = (chosen[:, None] == np.arange(depth * width)[:, None]).any(-1)
  number = jnp.cumsum(is_chosen & (scores > NEVER / 2), axis=1)
  at = jnp.maximum(parents + (level - 2) * width, 0)
  parent = jnp.where(level == 1, 0, jnp.take_along_axis(number, at, axis=1))
  level = jnp.broadcast_to(level, scores.shape)
  tree = _tree(root, number, tokens, level, parent, num_nodes, depth)
  return tree.replace(is_finite=is_finite)


def _tree(
    root: Array, number: Array, tokens: Array, level: Array, parents: Array, num_nodes: int,
    max_depth: int,
) -> Tree:
  """A tree of the entries of a row that are nodes.

  Args:
    root: [batch] int32.
    number: [batch, n] how many nodes there are up to each entry, itself included; an entry
      that makes it larger is the node of that number, those from `num_nodes` on are left out.
    tokens: [batch, n] int32.
    level: [batch, n], tokens from the root to each entry.
    parents: [batch, n], numbers of nodes.
    num_nodes: root included (static).
    max_depth: of the tree (static).
  """
  node = jnp.arange(1, num_nodes)
  is_valid = node <= number[:, -1:]
  # By counting, not by a scatter, which a CPU does entry by entry.
  entry = (number[:, None] < node[:, None]).sum(-1)
  entry = jnp.minimum(entry, number.shape[1] - 1)
  join = lambda first, values: jnp.concatenate([
      jnp.broadcast_to(first, is_valid[:, :1].shape).astype(jnp.int32),
      jnp.where(is_valid, jnp.take_along_axis(values, entry, axis=1), 0).astype(jnp.int32),
  ], axis=1)
  return Tree(
      tokens=join(root[:, None], tokens),
      depth=join(0, level),
      parents=join(-1, parents),
      is_valid=jnp.concatenate([jnp.ones([len(root), 1], bool), is_valid], axis=1),
      max_depth=max_depth,
  )
