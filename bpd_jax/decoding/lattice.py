"""Lattices from the logits of independent predictors (Kim et al. 2024, §2)."""

import jax
import jax.numpy as jnp

from bpd_jax.decoding.types import Array, Lattice

# Entries of which `top_k` takes one maximum.
BLOCK = 64


def first_max(logits: Array) -> tuple[Array, Array]:
  """The largest entry along the last axis and its index, the lowest among equals.

  Same index as `jnp.argmax` on numbers; a maximum and a search for the first
  equal entry vectorise on a CPU, an argmax reduction doesn't.

  Args:
    logits: [..., vocab].

  Returns:
    [...], NaN where any entry is, and [...] int32.
  """
  vocab_size = logits.shape[-1]
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  largest = jnp.max(logits, axis=-1, keepdims=True)
  # On a CPU a maximum may pass over NaN, which is neither below a number nor above: what
  # looks for the first of the largest finds it.
  equal = jnp.where(logits == largest, index, vocab_size)
  first = jnp.min(jnp.where(logits <= largest, equal, -1), axis=-1)
  is_nan = first < 0
  # Token 0 keeps later lookups in range. Not a maximum: `commit` must wait for something
  # that XLA can't tell beforehand.
  return jnp.where(is_nan, jnp.nan, largest[..., 0]), jnp.where(is_nan, 0, first)


def top_k(values: Array, k: int) -> tuple[Array, Array]:
  """The k largest along the last axis and their indices, the lowest first among equals.

  Same answer as `jax.lax.top_k`, which in a large program for a CPU becomes a sort of
  the whole axis: 45 ms for 8 heads of 32,128 tokens. The k largest lie in the k blocks
  of largest maxima, so a maximum over each block, which vectorises, leaves
  k × `BLOCK` entries to sort.

  Args:
    values: [..., n].
    k: at most n (static).

  Returns:
    [..., k] values, falling, and [..., k] int32.
  """
  *rest, n = values.shape
  num_blocks = -(-n // BLOCK)
  if num_blocks <= 2 * k:
    best, index = jax.lax.top_k(values, k)
    return best, index.astype(jnp.int32)
  pad = [(0, 0)] * len(rest) + [(0, num_blocks * BLOCK - n)]
  blocks = jnp.pad(values, pad, constant_values=-jnp.inf).reshape(*rest, num_blocks, BLOCK)
  _, chosen = jax.lax.top_k(blocks.max(-1), k)
  # In their own order, so that equal entries stay in order of index.
  chosen = jnp.sort(chosen, axis=-1)
  kept = jnp.take_along_axis(blocks, chosen[..., None], axis=-2).reshape(*rest, k * BLOCK)
  best, place = jax.lax.top_k(kept, k)
  block = jnp.take_along_axis(chosen, place // BLOCK, axis=-1)
  return best, (block * BLOCK + place % BLOCK).astype(jnp.int32)


def at_step(values: Array, i: Array | int) -> Array:
  """What a lattice, or anything laid out like one, has at step i.

  Args:
    values: [batch, depth, …].
    i: the step, traced or not.

  Returns:
    [batch, …].
  """
  return jax.lax.dynamic_index_in_dim(values, i, axis=1, keepdims=False)


def top_k_lattice(logits: Array, k: int, num_steps: Array) -> Lattice:
  """The k best tokens of every step.

  Args:
    logits: [batch, depth, vocab].
    k: candidates a step (static).
    num_steps: [batch] int32.

  Returns:
    A lattice whose scores are log-probabilities over the whole vocabulary. A row isn't
    finite where a step with a draft has a largest logit that isn't.
  """
  log_norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  if k == 1:
    best, tokens = (x[..., None] for x in first_max(logits))
    # Nothing else reads the norm of a single candidate, so it is never computed.
    is_finite = jnp.isfinite(best[..., 0])
  else:
    best, tokens = top_k(logits, k)
    # Of a NaN a sort says nothing; the norm is finite where the largest logit is.
    is_finite = jnp.isfinite(log_norm[..., 0])
  is_drafted = jnp.arange(logits.shape[1]) < num_steps[:, None]
  return Lattice(
      tokens=tokens.astype(jnp.int32), scores=best - log_norm, num_steps=num_steps,
      is_finite=(is_finite | ~is_drafted).all(-1),
  )
