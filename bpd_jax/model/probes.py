"""Probes: extra columns of a decoder call that are never accepted.

They are attached to the nodes of a draft tree, enter after layer t and only
seed the next draft. t = 0 is a mask token, 0 < t < L a pseudo hidden state,
t = L a parallel head, which attends to nothing and is read at the accepted
node alone (`addons/heads.py`). Real columns never see a probe.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.errors import InputError

Array = jax.Array

VISIBILITIES = ("causal", "own")


@dataclasses.dataclass(frozen=True)
class ProbeSpec:
  """Probes that enter below the last layer.

  Attributes:
    enter_layer: t, how many layers have run when the probes enter, 0 … L - 1.
    per_node: k, probes of each node; probe i (1 … k) of a node stands for the
      token i positions after the node's own.
    make_states: [batch, nodes, d_model] residual stream after layer t (the
      embedded tokens for t = 0) -> [batch, nodes, k, d_model].
    visibility: which probes of its own node probe i sees besides the prefix
      and the node's ancestors: "causal" is 1 … i, "own" is i alone.
  """

  enter_layer: int
  per_node: int
  make_states: Callable[[Array], Array]
  visibility: str = "causal"

  def check(self, num_layers: int) -> None:
    """Raises InputError where the spec doesn't fit a decoder of `num_layers`."""
    if not 0 <= self.enter_layer < num_layers:
      raise InputError("ProbeSpec.enter_layer", self.enter_layer, f"0 … {num_layers - 1}")
    if self.per_node < 1:
      raise InputError("ProbeSpec.per_node", self.per_node, "a positive integer")
    if self.visibility not in VISIBILITIES:
      raise InputError("ProbeSpec.visibility", self.visibility, f"one of {VISIBILITIES}")


def probe_positions(position: Array, per_node: int) -> Array:
  """Positions of nodes and their probes.

  Args:
    position: [batch, nodes] int32.
    per_node: probes of each node.

  Returns:
    [batch, nodes * (1 + per_node)] int32: all nodes, then the probes of node
    0, of node 1, ….
  """
  probes = position[:, :, None] + 1 + jnp.arange(per_node)
  return jnp.concatenate([position, probes.reshape(position.shape[0], -1)], axis=1)


def column_mask(visible: Array | np.ndarray, per_node: int, visibility: str) -> Array:
  """Which columns of a call see which, nodes first, then probes node by node.

  For two nodes in a chain with two causal probes each (rows see columns):

                 n0 n1  p01 p02 p11 p12
      node 0      1  0    0   0   0   0
      node 1      1  1    0   0   0   0
      probe 0,1   1  0    1   0   0   0
      probe 0,2   1  0    1   1   0   0
      probe 1,1   1  1    0   0   1   0
      probe 1,2   1  1    0   0   1   1

  Args:
    visible: [batch or 1, nodes, nodes] bool, the nodes' own mask.
    per_node: probes of each node, 0 for none.
    visibility: see `ProbeSpec`.

  Returns:
    [batch or 1, columns, columns] bool.
  """
  if not per_node:
    return visible
  batch, nodes, _ = visible.shape
  inner = np.eye(per_node, dtype=bool)
  if visibility == "causal":
    inner = np.tril(np.ones([per_node, per_node], bool))
  own = np.kron(np.eye(nodes, dtype=bool), inner)
  own = jnp.broadcast_to(own, (batch,) + own.shape)
  above = jnp.repeat(visible, per_node, axis=1)
  unseen = jnp.zeros([batch, nodes, nodes * per_node], bool)
  top = jnp.concatenate([visible, unseen], axis=2)
  return jnp.concatenate([top, jnp.concatenate([above, own], axis=2)], axis=1)
