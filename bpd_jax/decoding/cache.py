"""The decoder's self-attention cache: made here, written here and nowhere else.

`verify` only reads the cache and returns the keys and values of its own nodes.
`commit` moves those of the accepted path to consecutive slots, outside every
conditional: a write inside a branch would copy the whole cache.
"""

import jax
import jax.numpy as jnp

from bpd_jax.decoding.types import Array, Cache, Step, Verified


def empty_cache(
    num_layers: int, batch: int, num_heads: int, length: int, head_dim: int, dtype
) -> Cache:
  """A cache with nothing in it.

  Args:
    num_layers: decoder layers.
    batch: rows.
    num_heads: attention heads.
    length: slots; see `cache_length`.
    head_dim: features a head.
    dtype: of keys and values.

  Returns:
    A cache of zeros, all lengths 0.
  """
  make = lambda *sizes: tuple(
      jnp.zeros((batch, num_heads, *sizes), dtype) for _ in range(num_layers)
  )
  return Cache(
      keys=make(head_dim, length),
      values=make(length, head_dim),
      lengths=jnp.zeros([batch], jnp.int32),
  )


def cache_length(max_length: int, max_depth: int) -> int:
  """Slots needed so that no write is clamped back over committed ones.

  A call writes `max_depth + 1` slots from a row's length on, whatever it
  accepted, and a row's length can be `max_length`.
  """
  return max_length + max_depth + 1


def write_rows(buffer: Array, block: Array, starts: Array, axis: int) -> Array:
  """Writes a block into every row of a buffer at the row's own offset.

  Args:
    buffer: [batch, …].
    block: as buffer, shorter along `axis`.
    starts: [batch] int32, offsets along `axis`.
    axis: an axis of `buffer`, at least 1.

  Returns:
    The buffer with the blocks in it.
  """

  def write(row, row_block, start):
    return jax.lax.dynamic_update_slice_in_dim(row, row_block, start, axis - 1)

  return jax.vmap(write)(buffer, block, starts)


def commit(cache: Cache, verified: Verified, step: Step) -> Cache:
  """Appends the accepted path to every row's prefix.

  Args:
    cache: before the call.
    verified: keys and values of the nodes.
    step: path [batch, max_depth + 1] and how many of its entries count.

  Returns:
    The cache with `step.num_tokens` more slots in use in each row.
  """
  # No token is negative, which XLA doesn't know: the write waits for the call's
  # last result, so every layer reads its cache before that is overwritten. A
  # tree of one node has no other such tie, and XLA would copy the whole cache.
  starts = jnp.where(step.tokens[:, 0] >= 0, cache.lengths, 0)

  def append(buffer: Array, nodes: Array, axis: int) -> Array:
    path = jnp.expand_dims(step.path, sorted({1, 2, 3} - {axis}))
    block = jnp.take_along_axis(nodes, path, axis=axis).astype(buffer.dtype)
    return write_rows(buffer, block, starts, axis=axis)

  return Cache(
      keys=tuple(append(*pair, 3) for pair in zip(cache.keys, verified.keys)),
      values=tuple(append(*pair, 2) for pair in zip(cache.values, verified.values)),
      lengths=cache.lengths + step.num_tokens,
  )


def append_chain(
    cache: Cache, keys: tuple[Array, ...], values: tuple[Array, ...], num_tokens: Array
) -> Cache:
  """Appends the first `num_tokens` of a chain of nodes to every row's prefix.

  For a model beside the base model, whose nodes were certain before they were read.

  Args:
    cache: with room for the whole chain behind every row's length.
    keys: one array a layer, [batch, heads, head_dim, nodes].
    values: likewise, [batch, heads, nodes, head_dim].
    num_tokens: [batch] int32.
  """
  write = lambda buffer, block, axis: write_rows(
      buffer, block.astype(buffer.dtype), cache.lengths, axis=axis
  )
  return Cache(
      keys=tuple(write(*pair, 3) for pair in zip(cache.keys, keys)),
      values=tuple(write(*pair, 2) for pair in zip(cache.values, values)),
      lengths=cache.lengths + num_tokens,
  )
