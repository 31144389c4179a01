"""Searches: plain functions from a lattice and the root to a tree."""

import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.types import Array, Lattice, Tree


def chain(lattice: Lattice, root: Array, *, num_nodes: int) -> Tree:
  """The best token of each step, one after the other.

  Args:
    lattice: candidates, best first.
    root: [batch] int32, the newest certain token.
    num_nodes: verify width, root included (static), at most depth + 1.

  Returns:
    A tree of `num_nodes` nodes in which node i is the child of node i - 1.
  """
  num_drafted = num_nodes - 1
  drafted = lattice.tokens[:, :num_drafted, 0]
  step = np.arange(num_nodes, dtype=np.int32)
  return Tree(
      tokens=jnp.concatenate([root[:, None], drafted], axis=1),
      depth=step,
      parents=step - 1,
      is_valid=step[None, :] <= lattice.num_steps[:, None],
      max_depth=num_drafted,
  )
