"""Lattices from the logits of independent predictors (Kim et al. 2024, §2)."""

import jax
import jax.numpy as jnp

from bpd_jax.decoding.types import Array, Lattice


def first_argmax(logits: Array) -> Array:
  """Index of the largest entry along the last axis, the lowest among equals.

  Same answer as `jnp.argmax` on numbers; a maximum and a search for the first
  equal entry vectorise on a CPU, an argmax reduction doesn't.

  Args:
    logits: [..., vocab].

  Returns:
    [...] int32.
  """
  vocab_size = logits.shape[-1]
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
  first = jnp.min(jnp.where(is_largest, index, vocab_size), axis=-1)
  # Only NaN equals nothing; token 0 keeps later lookups in range.
  return jnp.where(first == vocab_size, 0, first)


def top_k_lattice(logits: Array, k: int, num_steps: Array) -> Lattice:
  """The k best tokens of every step.

  Args:
    logits: [batch, depth, vocab].
    k: candidates a step (static).
    num_steps: [batch] int32.

  Returns:
    A lattice whose scores are log-probabilities over the whole vocabulary.
  """
  if k == 1:
    tokens = first_argmax(logits)[..., None]
    best = jnp.take_along_axis(logits, tokens, axis=-1)
  else:
    best, tokens = jax.lax.top_k(logits, k)
  log_norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  return Lattice(
      tokens=tokens.astype(jnp.int32), scores=best - log_norm, num_steps=num_steps
  )
