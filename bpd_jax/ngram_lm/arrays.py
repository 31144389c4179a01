"""The device form: n-grams found by a perfect hash, two gathers a lookup.

The n-grams after a context are split by the low bits of their tokens into buckets of
about three. A bucket has one displacement, chosen offline so that its n-grams, at
displacement + token, fall on places that no other bucket uses. A place holds its
bucket beside its value. In a bucket different tokens have different places, so the
bucket alone proves that it is the right n-gram, and no answer is ever another's.

`device_arrays` builds it, `log_probs` scores.
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.errors import InputError
from bpd_jax.ngram_lm.backoff import BackOff

Array = jax.Array

# Most n-grams of a bucket on average: fewer take more displacements, more leave more
# places empty.
BUCKET_SIZE = 4
# Part of the places that is taken, to begin with.
FULL = 0.92
# Displacements that are tried in one round, over all buckets.
TRIALS = 1 << 20


@struct.dataclass
class NgramArrays:
  """A back-off model on the device.

  A *node* is an n-gram as a context: a token's node is its id, a longer n-gram's is
  `vocab_size` + its place, and the last node stands for contexts that aren't there.

  Attributes:
    unigrams: [vocab] float32 natural logs.
    buckets: [nodes] int32, the first bucket of what follows a node; 0 where nothing
      does, a bucket that no place holds.
    masks: [nodes] int32, a power of two less one: `buckets` + (token & mask) is the
      bucket of a token.
    back_offs: [nodes] float32 natural logs.
    displacements: [buckets] int32.
    slots: [2 * places] int32: the bucket of each place, -1 where it is empty, and the
      bits of its float32 log-probability. One beside the other, as both are read from
      one cache line. Places of orders below the highest come first.
    order: tokens of the longest n-grams (static).
    vocab_size: ids that a token can have (static).
  """

  unigrams: Array
  buckets: Array
  masks: Array
  back_offs: Array
  displacements: Array
  slots: Array
  order: int = struct.field(pytree_node=False)
  vocab_size: int = struct.field(pytree_node=False)

  @property
  def num_bytes(self) -> int:
    """Memory that the arrays take."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def log_probs(arrays: NgramArrays, history: Array, candidates: Array) -> Array:
  """Scores candidates after histories.

  Args:
    arrays: the model.
    history: [..., histories, context] int32, the last tokens, the newest last; -1,
      before all others, where there is none. The start of a sequence is a token as
      well. A context of more or fewer than order - 1 tokens will do: what is too long
      isn't read.
    candidates: [..., k] int32, ids of the vocabulary, the same for all histories.

  Returns:
    [..., histories, k] float32 natural logs of P(candidate | history).
  """
  candidates = jnp.clip(candidates, 0, arrays.vocab_size - 1)
  scores = _get(arrays.unigrams, candidates)[..., None, :]
  candidates = candidates[..., None, :]
  length = min(arrays.order - 1, history.shape[-1])
  nodes = _find_nodes(arrays, history, length)
  # What is a context's is read once, not once a candidate, because of the barrier.
  firsts, masks, back_offs = jax.lax.optimization_barrier(
      tuple(_get(array, nodes) for array in (arrays.buckets, arrays.masks, arrays.back_offs))
  )
  for i in range(length):
    bucket = firsts[i, ..., None] + (candidates & masks[i, ..., None])
    place = _get(arrays.displacements, bucket) + candidates
    # Without this barrier XLA finds the place twice, once for each half of it.
    place = 2 * jax.lax.optimization_barrier(place)
    value = jax.lax.bitcast_convert_type(_get(arrays.slots, place + 1), jnp.float32)
    is_there = _get(arrays.slots, place) == bucket
    scores = jnp.where(is_there, value, scores + back_offs[i, ..., None])
  return jnp.broadcast_to(scores, (*history.shape[:-1], candidates.shape[-1]))


def _find_nodes(arrays: NgramArrays, history: Array, length: int) -> Array:
  """[length, ..., histories] int32 nodes of the last 1, 2, … tokens; the last node for none.

  A node is found from its first token on. Nodes that still need tokens take their next
  ones at once, as many small operations would take longer at small batches.
  """
  if length == 0:
    return jnp.zeros([0, *history.shape[:-1]], jnp.int32)
  nowhere = len(arrays.buckets) - 1
  is_token = (history >= 0) & (history < arrays.vocab_size)
  newest_first = lambda x: jnp.moveaxis(x, -1, 0)[::-1][:length]
  node = newest_first(jnp.where(is_token, history, nowhere))
  token = newest_first(jnp.where(is_token, history, 0))
  found = [node[0]]
  for left in range(length - 1, 0, -1):
    # The first of what is left needs one token more, the newest; the next needs two.
    node, token = node[1:], token[:left]
    bucket = _get(arrays.buckets, node) + (token & _get(arrays.masks, node))
    place = _get(arrays.displacements, bucket) + token
    node = jnp.where(_get(arrays.slots, 2 * place) == bucket, arrays.vocab_size + place, nowhere)
    found.append(node[0])
  return jnp.stack(found)


def _get(array: Array, index: Array) -> Array:
  """Elements of an array; every index here is inside by construction."""
  return array.at[index].get(mode="promise_in_bounds")


def device_arrays(model: BackOff) -> NgramArrays:
  """Builds the device form; the same arrays for the same model.

  Raises:
    InputError: where the model has more n-grams than int32 can number.
  """
  vocab_size, orders = model.vocab_size, model.orders
  random = np.random.default_rng(0)
  # Buckets of every context that has something after it, from 1 on.
  firsts, masks, bucket_of, num_buckets = [], [], [], 1
  for grams, longer in zip(orders, orders[1:]):
    size = np.bincount(longer.context, minlength=len(grams))
    exponent = np.ceil(np.log2(np.maximum(size, 1) / BUCKET_SIZE)).astype(np.int64)
    num = 1 << np.maximum(exponent, 0)
    ends = num_buckets + np.cumsum(np.where(size > 0, num, 0))
    firsts.append(np.where(size > 0, ends - num, 0))
    masks.append(np.where(size > 0, num - 1, 0))
    num_buckets = int(ends[-1])
    bucket_of.append(firsts[-1][longer.context] + (longer.token & masks[-1][longer.context]))
  displacements = np.zeros(num_buckets, np.int64)
  # Those that can be contexts come first, as every one of their places is a node.
  places, regions, size = [], [], 0
  for part in (slice(1, model.order - 1), slice(max(model.order - 1, 1), model.order)):
    tokens = [grams.token for grams in orders[part]]
    if not tokens:
      regions.append(size)
      continue
    bucket = np.concatenate(bucket_of[part.start - 1 : part.stop - 1])
    found, length = _place_buckets(bucket, np.concatenate(tokens), vocab_size, random)
    displacements[bucket] = size + found - np.concatenate(tokens)
    places += np.split(size + found, np.cumsum([len(token) for token in tokens])[:-1])
    size += length
    regions.append(size)
  if 2 * size >= 1 << 31:
    raise InputError("n-grams", sum(model.num_grams), f"fewer: {size:,} places, 2 ** 30 at most")
  slots = np.full([size, 2], -1, np.int32)
  for place, bucket, values in zip(places, bucket_of, model.log_probs[1:]):
    slots[place, 0] = bucket
    slots[place, 1] = values.astype(np.float32).view(np.int32)
  num_nodes = vocab_size + regions[0] + 1
  node_buckets, node_masks = np.zeros([2, num_nodes], np.int32)
  node_back_offs = np.zeros(num_nodes, np.float32)
  nodes = [np.arange(vocab_size), *(vocab_size + place for place in places)]
  for node, first, mask, back_off in zip(nodes, firsts, masks, model.back_offs):
    node_buckets[node], node_masks[node], node_back_offs[node] = first, mask, back_off
  return NgramArrays(
      unigrams=jnp.asarray(model.log_probs[0], jnp.float32),
      buckets=jnp.asarray(node_buckets),
      masks=jnp.asarray(node_masks),
      back_offs=jnp.asarray(node_back_offs),
      displacements=jnp.asarray(displacements, jnp.int32),
      slots=jnp.asarray(slots.reshape(-1)),
      order=model.order,
      vocab_size=vocab_size,
  )


def _place_buckets(
    bucket: np.ndarray, token: np.ndarray, vocab_size: int, random: np.random.Generator
) -> tuple[np.ndarray, int]:
  """Finds places so that place - token is the same all over a bucket, and never negative.

  Buckets are placed from the largest to the smallest, those of one size at once: each
  tries displacements that bring its first token to a free place, then those that fit
  and are not in each other's way are taken.

  Args:
    bucket: [grams] which bucket each belongs to.
    token: [grams], different ones in a bucket.
    vocab_size: ids that may be looked up.
    random: draws the trials.

  Returns:
    [grams] places, and how many places there are, so that no token leads beyond them.
  """
  by_bucket = np.argsort(bucket * vocab_size + token)
  ends = np.flatnonzero(np.diff(bucket[by_bucket], append=-1)) + 1
  sizes = np.diff(ends, prepend=0)
  is_free = np.ones(int(len(token) / FULL) + 2 * vocab_size, bool)
  places = np.empty(len(token), np.int64)
  for size in np.unique(sizes)[::-1]:
    members = by_bucket[(ends - size)[sizes == size][:, None] + np.arange(size)]
    if size == 1:
      free = np.flatnonzero(is_free[vocab_size:-vocab_size]) + vocab_size
      num_more = max(len(members) - len(free), 0)
      free = np.append(free, len(is_free) - vocab_size + np.arange(num_more))
      is_free = np.append(is_free, np.ones(num_more, bool))
      places[members[:, 0]] = free[: len(members)]
      break
    while len(members):
      tokens = token[members]
      free = np.flatnonzero(is_free)
      num_trials = int(np.clip(TRIALS // members.size, 1, 64))
      start = random.choice(free, [len(members), num_trials]) - tokens[:, :1]
      fits = (start >= 0) & (start < len(is_free) - vocab_size)
      for column in tokens.T:
        fits &= is_free[np.where(fits, start + column[:, None], 0)]
      choice = np.argmax(fits, axis=1)
      rows = np.flatnonzero(fits[np.arange(len(fits)), choice])
      wanted = start[rows, choice[rows], None] + tokens[rows]
      # The last that wants a place has it; a bucket needs all of its places.
      owner = np.full(len(is_free), -1, np.int32)
      owner[wanted] = rows[:, None]
      is_taken = (owner[wanted] == rows[:, None]).all(1)
      rows, wanted = rows[is_taken], wanted[is_taken]
      places[members[rows]] = wanted
      is_free[wanted] = False
      if len(rows) * 50 < len(members) * min(num_trials, 8):
        is_free = np.append(is_free, np.ones(max(members.size, len(is_free) // 50), bool))
      members = np.delete(members, rows, axis=0)
  return places, len(is_free)
