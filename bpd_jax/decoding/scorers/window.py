"""The newest tokens of each path, the trails of scorers that look a few tokens back."""

import jax.numpy as jnp

from bpd_jax.decoding.types import Array


def begin_windows(certain: Array, num_paths: int) -> Array:
  """Windows of paths without a drafted token.

  Args:
    certain: [batch, n] int32, the newest tokens that are certain, the newest last.
    num_paths: how many paths (static).

  Returns:
    [batch, paths, n] int32.
  """
  batch, length = certain.shape
  return jnp.broadcast_to(certain[:, None], (batch, num_paths, length))


def extend_windows(windows: Array, parents: Array, tokens: Array) -> Array:
  """Moves windows on by a token.

  Args:
    windows: [batch, paths, n] int32.
    parents: [batch, paths] int32, which path each goes on from.
    tokens: [batch, paths] int32.

  Returns:
    [batch, paths, n] int32.
  """
  length = windows.shape[2]
  old = jnp.take_along_axis(windows, parents[..., None], axis=1)
  return jnp.concatenate([old, tokens[..., None]], axis=2)[..., 1 : length + 1]
