"""Facts about the shape of a tree: who is whose ancestor, and paths."""

import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.types import Array, Tree


def ancestors(tree: Tree) -> Array | np.ndarray:
  """Which nodes lie on the way from the root to each node, itself included.

  For parents [-1, 0, 0, 1]:

      node 0  1 0 0 0
      node 1  1 1 0 0
      node 2  1 0 1 0
      node 3  1 1 0 1

  Args:
    tree: parents [batch, nodes] or [nodes].

  Returns:
    [batch, nodes, nodes] or [nodes, nodes] bool; numpy where parents are.
  """
  xp = np if isinstance(tree.parents, np.ndarray) else jnp
  num_nodes = tree.parents.shape[-1]
  node = xp.arange(num_nodes)
  reach = (tree.parents[..., :, None] == node) | (node[:, None] == node)
  # Each squaring doubles how far up a node can see.
  for _ in range(max(tree.max_depth, 1).bit_length()):
    reach = xp.matmul(reach.astype(np.int32), reach.astype(np.int32)) > 0
  return reach


def gather_nodes(values: Array, nodes: Array) -> Array:
  """Picks nodes of each row: [batch, nodes, …] and [batch, n] -> [batch, n, …]."""
  index = nodes.reshape(nodes.shape + (1,) * (values.ndim - 2))
  return jnp.take_along_axis(values, index, axis=1)


def parent_values(tree: Tree, values: Array) -> Array:
  """For each node, its parent's entry; node 0 gets its own.

  Args:
    tree: the tree.
    values: [batch, nodes, …].

  Returns:
    As `values`.
  """
  parents = tree.parents.clip(0)
  if parents.ndim == 1:
    return values[:, parents]
  return gather_nodes(values, parents)


def path_to(tree: Tree, node: Array) -> Array:
  """The nodes from the root to `node`, by depth.

  Args:
    tree: the tree.
    node: [batch] int32.

  Returns:
    [batch, max_depth + 1] int32; entries deeper than the node repeat it.
  """
  batch, num_nodes = tree.tokens.shape
  reach = jnp.broadcast_to(ancestors(tree), (batch, num_nodes, num_nodes))
  depth = jnp.broadcast_to(tree.depth, (batch, num_nodes))
  on_path = jnp.take_along_axis(reach, node[:, None, None], axis=1)  # [b, 1, n]
  at_depth = depth[:, None, :] == jnp.arange(tree.max_depth + 1)[None, :, None]
  hit = on_path & at_depth  # [batch, max_depth + 1, nodes]
  return jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), node[:, None]).astype(
      jnp.int32
  )
