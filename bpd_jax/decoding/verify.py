"""From a model's block call to `Verify`: one decoder call over a tree."""

from collections.abc import Callable

import jax.numpy as jnp

from bpd_jax.decoding import tree as trees
from bpd_jax.decoding.lattice import first_max
from bpd_jax.decoding.types import Array, Cache, Tree, Verified, Verify

# (tokens [b, n], depth [b or 1, n], visible [b or 1, n, n],
#  past ((keys, values), …) a layer, lengths [b])
#   -> (hidden [b, n, d], keys, values a layer, probe states or None)
BlockCall = Callable[..., tuple[Array, tuple[Array, ...], tuple[Array, ...], Array | None]]


def model_verify(
    block_call: BlockCall, logits: Callable[[Array], Array], *, keeps_logits: bool = False
) -> Verify:
  """Verifies trees with a model.

  Args:
    block_call: one call over new tokens that attend to the committed prefix and
      to those of themselves that `visible` allows; it doesn't write the cache.
    logits: output projection, [batch, nodes, d] -> [batch, nodes, vocab].
    keeps_logits: whether the acceptance rule reads the logits.
  """

  def verify(cache: Cache, tree: Tree) -> Verified:
    depth, visible = tree.depth, trees.ancestors(tree)
    if depth.ndim == 1:
      depth = depth[None]
    if visible.ndim == 2:
      visible = visible[None]
    hidden, keys, values, probes = block_call(
        tree.tokens, depth, visible, tuple(zip(cache.keys, cache.values)), cache.lengths
    )
    scores = logits(hidden)
    largest, choice = first_max(scores)
    return Verified(
        choice=choice,
        hidden=hidden,
        keys=keys,
        values=values,
        probes=probes,
        logits=scores if keeps_logits else None,
        is_finite=jnp.isfinite(largest),
    )

  return verify
