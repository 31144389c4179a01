"""Acceptance: from a verified tree to what it made certain.

`ExactMatch` gives the tokens of greedy decoding. The other rules are those of
Stern et al. 2018, §5: approximate, opt-in, and equal to `ExactMatch` at their
strictest setting.
"""

import dataclasses

import jax.numpy as jnp

from bpd_jax.decoding import tree as trees
from bpd_jax.decoding.types import AcceptanceRule, Array, Step, Tree, Verified
from bpd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ExactMatch:
  """A token passes iff it is the base model's own choice."""

  reads_logits = False

  def passes(self, tree: Tree, verified: Verified) -> Array:
    return tree.tokens == trees.parent_values(tree, verified.choice)


@dataclasses.dataclass(frozen=True)
class NothingPasses:
  """No drafted token passes: one token a call, to look at every draft. Exact."""

  reads_logits = False

  def passes(self, tree: Tree, verified: Verified) -> Array:
    return jnp.zeros(tree.tokens.shape, bool)


@dataclasses.dataclass(frozen=True)
class ApproximateTopK:
  """A token passes iff it is among the base model's k best (Stern, §5.1)."""

  k: int
  reads_logits = True

  def __post_init__(self):
    if self.k < 1:
      raise InputError("ApproximateTopK.k", self.k, "an integer of at least 1")

  def passes(self, tree: Tree, verified: Verified) -> Array:
    logits = trees.parent_values(tree, verified.logits)  # [batch, nodes, vocab]
    own = jnp.take_along_axis(logits, tree.tokens[..., None], axis=-1)
    token = jnp.arange(logits.shape[-1])
    # Equal logits rank by index, as in greedy decoding.
    is_better = (logits > own) | ((logits == own) & (token < tree.tokens[..., None]))
    return is_better.sum(-1) < self.k


@dataclasses.dataclass(frozen=True)
class ApproximateDistance:
  """A token passes iff its id is within `epsilon` of the choice (Stern, §5.2).

  Makes sense only where ids are a scale, as intensities of an image are.
  """

  epsilon: int
  reads_logits = False

  def __post_init__(self):
    if self.epsilon < 0:
      raise InputError("ApproximateDistance.epsilon", self.epsilon, "an integer of at least 0")

  def passes(self, tree: Tree, verified: Verified) -> Array:
    choice = trees.parent_values(tree, verified.choice)
    return jnp.abs(tree.tokens - choice) <= self.epsilon


@dataclasses.dataclass(frozen=True)
class ApproximateMinimumBlock:
  """Every call emits at least `length` tokens where the draft has them (Stern, §5.3).

  The first `length - 1` drafted tokens of the lowest-numbered branch pass
  unseen; deeper ones as in `ExactMatch`. 1 is exact.
  """

  length: int
  reads_logits = False

  def __post_init__(self):
    if self.length < 1:
      raise InputError("ApproximateMinimumBlock.length", self.length, "an integer of at least 1")

  def passes(self, tree: Tree, verified: Verified) -> Array:
    parents = jnp.broadcast_to(tree.parents, tree.tokens.shape)
    depth = jnp.broadcast_to(tree.depth, tree.tokens.shape)
    node = jnp.arange(parents.shape[-1])
    is_older_sibling = (parents[:, :, None] == parents[:, None, :]) & (
        node[None, None, :] < node[None, :, None]
    )
    is_first = ~(is_older_sibling & tree.is_valid[:, None, :]).any(-1)
    exact = ExactMatch().passes(tree, verified)
    return exact | (is_first & (depth < self.length))


def accept(
    rule: AcceptanceRule, tree: Tree, verified: Verified, *, eos_id: int
) -> Step:
  """Accepts a connected part of the tree and takes its deepest node.

  A node is accepted iff it is valid, passes the rule, its parent is accepted,
  its parent is not an EOS, and the model has a choice after its parent. Of the
  deepest accepted nodes the lowest index wins; the base model's choice after it
  is emitted by this same call, except after an accepted EOS, which ends the row,
  and where there is none.

  Args:
    rule: which drafted tokens pass.
    tree: the verified tree; the root of a live row is never EOS.
    verified: the decoder's answer.
    eos_id: the id that ends a row.

  Returns:
    The step.
  """
  num_nodes = tree.tokens.shape[-1]
  is_eos = tree.tokens == eos_id
  is_root = jnp.arange(num_nodes) == 0
  may_go_on = ~is_eos
  if verified.is_finite is not None:
    may_go_on &= verified.is_finite
  passes = rule.passes(tree, verified) & trees.parent_values(tree, may_go_on)
  passes = is_root | (passes & tree.is_valid)
  # Accepted iff no node on the way from the root fails.
  is_accepted = ~(trees.ancestors(tree) & ~passes[:, None, :]).any(-1)
  depth = jnp.broadcast_to(tree.depth, tree.tokens.shape)
  reached = jnp.where(is_accepted, depth, -1)
  last = jnp.argmax(reached, axis=-1).astype(jnp.int32)  # first among equals
  num_accepted = jnp.max(reached, axis=-1).astype(jnp.int32)

  path = trees.path_to(tree, last)
  choice = trees.gather_nodes(verified.choice, last[:, None])
  tokens = jnp.concatenate([trees.gather_nodes(tree.tokens, path)[:, 1:], choice], axis=1)
  slot = jnp.arange(tree.max_depth + 1)
  tokens = jnp.where(slot == num_accepted[:, None], choice, tokens)
  ends = (num_accepted > 0) & trees.gather_nodes(is_eos, last[:, None])[:, 0]
  is_finite = jnp.ones_like(ends)
  if verified.is_finite is not None:
    is_finite = ends | trees.gather_nodes(verified.is_finite, last[:, None])[:, 0]
  probes = verified.probes
  return Step(
      tokens=tokens,
      num_tokens=num_accepted + jnp.where(ends | ~is_finite, 0, 1),
      path=path,
      states=trees.gather_nodes(verified.hidden, path),
      hidden=trees.gather_nodes(verified.hidden, last[:, None])[:, 0],
      is_finite=is_finite,
      num_verified=tree.is_valid.sum(-1, dtype=jnp.int32) - 1,
      probes=None if probes is None else trees.gather_nodes(probes, last[:, None])[:, 0],
  )
