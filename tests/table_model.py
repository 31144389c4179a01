"""A decoder whose logits are integers from a hash of the prefix, for exact tests.

It implements `Verify` over the real cache: the key of a node is its token, the
value its position + 1, and the hash reads every committed slot. So a slot that
was lost, moved or overwritten changes the tokens that follow.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding import tree as trees
from bpd_jax.decoding.types import Cache, Tree, Verified

_M32 = 0xFFFFFFFF


def _mix(x, xp):
  """Murmur3's finaliser on uint32 arrays (xp is numpy or jax.numpy)."""
  x = x.astype(xp.uint32)
  x = (x ^ (x >> 16)) * xp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * xp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _slot_hash(position, token, xp):
  return _mix(_mix(position, xp) + (token.astype(xp.uint32) + 1) * xp.uint32(0x9E3779B1), xp)


@dataclasses.dataclass(frozen=True)
class TableModel:
  """Greedy tokens are a function of (seed, prefix); EOS only at `eos_position`.

  Attributes:
    vocab_size: ids 0 … vocab_size - 1; 1 is EOS.
  """

  vocab_size: int
  eos_id = 1

  def logits(self, seed, prefix_hash, position, eos_position, xp=jnp):
    """[…, vocab] int32, small integers with many ties.

    Args:
      seed, prefix_hash, position, eos_position: broadcastable […].
      xp: numpy or jax.numpy.
    """
    token = xp.arange(self.vocab_size).astype(xp.uint32)
    state = _mix(prefix_hash.astype(xp.uint32) ^ _mix(seed, xp), xp)
    logits = (_mix(state[..., None] + token * xp.uint32(0x27D4EB2F), xp) % 16).astype(
        xp.int32
    )
    is_end = (position == eos_position)[..., None]
    return xp.where(token == self.eos_id, xp.where(is_end, 99, -1), logits)

  def empty_cache(self, batch: int, length: int) -> Cache:
    shape = (batch, 1, length, 1)
    return Cache(
        keys=(jnp.zeros((batch, 1, 1, length), jnp.int32),),
        values=(jnp.zeros(shape, jnp.int32),),
        lengths=jnp.zeros([batch], jnp.int32),
    )

  def verify(self, seed, eos_position):
    """The `Verify` for rows with these seeds and EOS positions, [batch] each."""

    def run(cache: Cache, tree: Tree) -> Verified:
      slot = jnp.arange(cache.keys[0].shape[3])
      token, tag = cache.keys[0][:, 0, 0], cache.values[0][:, 0, :, 0]
      known = slot < cache.lengths[:, None]
      # The tag must be the slot's own position: a shifted write is then seen.
      committed = jnp.where(
          known, _slot_hash(slot + 7 * (tag - slot - 1), token, jnp), 0
      ).astype(jnp.uint32).sum(-1, dtype=jnp.uint32)
      position = cache.lengths[:, None] + tree.depth
      own = _slot_hash(position, tree.tokens, jnp)
      reach = jnp.broadcast_to(trees.ancestors(tree), own.shape + own.shape[-1:])
      path = jnp.where(reach, own[:, None, :], 0).astype(jnp.uint32).sum(-1, dtype=jnp.uint32)
      logits = self.logits(
          seed[:, None], committed[:, None] + path, position, eos_position[:, None]
      )
      return Verified(
          choice=jnp.argmax(logits, -1).astype(jnp.int32),
          hidden=jnp.zeros(tree.tokens.shape + (1,), jnp.float32),
          keys=(tree.tokens[:, None, None, :],),
          values=((position + 1)[:, None, :, None].astype(jnp.int32),),
          logits=logits,
      )

    return run

  def greedy(self, seed, eos_position, start, length: int):
    """Greedy decoding one token at a time, in numpy, without any of the loop.

    Args:
      seed, eos_position: [rows] integers.
      start: the start token.
      length: tokens to make.

    Returns:
      [rows, length] int32; tokens after EOS are what the table says there.
    """
    with np.errstate(over="ignore"):
      rows = len(seed)
      tokens = np.full([rows, length + 1], start, np.int32)
      total = np.zeros([rows], np.uint32)
      for t in range(length):
        position = np.full([rows], t)
        total += _slot_hash(position, tokens[:, t], np)
        logits = self.logits(np.asarray(seed), total, position, np.asarray(eos_position), np)
        tokens[:, t + 1] = logits.argmax(-1)
      return tokens[:, 1:]
