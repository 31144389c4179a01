"""The decode loop: draft, re-score, search, verify, accept, commit, until every row ends.

One `lax.while_loop`, batched, every row at its own pace; nothing goes to the
host until it ends. Greedy decoding is this loop with an empty draft. With the
exact acceptance rule the tokens are greedy's whatever the drafter.

Counting (block efficiency): tokens emitted, EOS included, divided by decoder
calls made while the row was live, the first call included. Greedy is exactly 1.

NaN looks like perfect heads: base and drafter both say token 0. So where a number
that decides isn't finite the row ends, and the state says what it was.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from bpd_jax.decoding import accept as acceptance
from bpd_jax.decoding.cache import commit, write_rows
from bpd_jax.decoding.rescoring import Rescorer, RescorerParams
from bpd_jax.decoding.types import (
  AcceptanceRule,
  Array,
  Cache,
  Drafter,
  Search,
  Step,
  Verify,
)

# What `DecodeState.failure` counts; 0 is none.
FAILURES = (
    None, "the base model's largest logit", "a head's largest logit", "what a path is worth",
)


@struct.dataclass
class Trace:
  """What every call did, for display and analysis.

  Attributes:
    drafts: [batch, calls, nodes] int32, the tokens of the verified nodes, root
      first; -1 where a node was not valid or no call was made.
    parents: [batch, calls, nodes] int32, of each node; -1 for the root.
    num_emitted: [batch, calls] int32, tokens emitted by each call, 0 after the
      row's end.
    is_exact: [batch, calls] bool, whether the search proved what it found.
  """

  drafts: Array
  parents: Array
  num_emitted: Array
  is_exact: Array


@struct.dataclass
class DecodeState:
  """The carry of the loop.

  Attributes:
    tokens: [batch, max_length + max_depth + 1] int32, emitted tokens, valid
      below `num_tokens`.
    num_tokens: [batch] int32.
    num_calls: [batch] int32, decoder calls made while the row was live.
    limits: [batch] int32, most tokens of each row; 0 for a row that only pads.
    is_done: [batch] bool.
    failure: [batch] int32, of `FAILURES`, what wasn't finite in the row's last call.
    root: [batch] int32, the newest certain token, not yet in the cache.
    cache: the committed prefix.
    step: what the last call made certain.
    drafter: the drafter's own state.
    rescorer: the scorers' states.
    trace: see `Trace`.
    call: [] int32, calls of the loop so far.
    key: a jax.random key.
  """

  tokens: Array
  num_tokens: Array
  num_calls: Array
  limits: Array
  is_done: Array
  failure: Array
  root: Array
  cache: Cache
  step: Step
  drafter: Any
  rescorer: Any
  trace: Trace
  call: Array
  key: Array


def initial_state(
    cache: Cache,
    step: Step,
    drafter_state: Any,
    rescorer_state: Any = (),
    *,
    limits: Array,
    start_id: int,
    max_length: int,
    num_nodes: int,
    key: Array,
) -> DecodeState:
  """The state before the first call: the root is the start token.

  Args:
    cache: empty, with room for `cache_length(max_length, max_depth)` slots.
    step: a step with `num_tokens` 0 and the shapes that the loop produces; see
      `empty_step`.
    drafter_state: from `drafter.init`.
    rescorer_state: from `rescorer.init`.
    limits: [batch] int32, at most `max_length`.
    start_id: the decoder's start token.
    max_length: most tokens of any row (static).
    num_nodes: nodes of the trees (static).
    key: for drafters and rules that sample.
  """
  batch, block = step.tokens.shape
  return DecodeState(
      tokens=jnp.zeros([batch, max_length + block], jnp.int32),
      num_tokens=jnp.zeros([batch], jnp.int32),
      num_calls=jnp.zeros([batch], jnp.int32),
      limits=limits,
      is_done=limits <= 0,
      failure=jnp.zeros([batch], jnp.int32),
      root=jnp.full([batch], start_id, jnp.int32),
      cache=cache,
      step=step,
      drafter=drafter_state,
      rescorer=rescorer_state,
      trace=Trace(
          drafts=jnp.full([batch, max_length, num_nodes], -1, jnp.int32),
          parents=jnp.full([batch, max_length, num_nodes], -1, jnp.int32),
          num_emitted=jnp.zeros([batch, max_length], jnp.int32),
          is_exact=jnp.ones([batch, max_length], bool),
      ),
      call=jnp.zeros([], jnp.int32),
      key=key,
  )


def empty_step(hidden: Array, max_depth: int, probes: Array | None = None) -> Step:
  """The step before the first call: nothing became certain.

  Args:
    hidden: [batch, d] zeros of the model's dtype.
    max_depth: largest depth of the trees (static).
    probes: [batch, k, d] zeros, or None.
  """
  none = jnp.zeros([hidden.shape[0], max_depth + 1], jnp.int32)
  return Step(
      tokens=none, num_tokens=none[:, 0], path=none, hidden=hidden,
      is_finite=none[:, 0] == 0, probes=probes,
  )


def cut_step(step: Step, budget: Array) -> Step:
  """Cuts what a call made certain to the tokens that a row may still emit."""
  return step.replace(num_tokens=jnp.minimum(step.num_tokens, budget))


def decode(
    verify: Verify,
    drafter: Drafter,
    drafter_params: Any,
    state: DecodeState,
    *,
    search: Search,
    rescorer: Rescorer = Rescorer(),
    rescorer_params: RescorerParams = RescorerParams(),
    rule: AcceptanceRule = acceptance.ExactMatch(),
    eos_id: int,
) -> DecodeState:
  """Decodes every row to its EOS or limit.

  Args:
    verify: one decoder call over a tree.
    drafter: proposes lattices.
    drafter_params: its parameters, any pytree.
    state: from `initial_state`; donate it to the jitted caller.
    search: from a lattice, the root and what paths are worth to a tree.
    rescorer: what else than the drafter's scores a path is worth.
    rescorer_params: its weights and its scorers' parameters.
    rule: which drafted tokens pass.
    eos_id: the id that ends a row.

  Returns:
    The last state.
  """

  def call_once(state: DecodeState) -> DecodeState:
    key = jax.random.fold_in(state.key, state.call)
    lattice, drafter_state = drafter.propose(
        drafter_params, state.drafter, state.step, key
    )
    # A drafter may have scores in the model's dtype, too few bits to add and to mask.
    wide = jnp.promote_types(lattice.scores.dtype, jnp.float32)
    lattice = lattice.replace(scores=lattice.scores.astype(wide))
    rescorer_state = rescorer.start(rescorer_params, state.rescorer, state.step)
    score = rescorer.path_score(rescorer_params, rescorer_state, lattice)
    tree = search(lattice, state.root, score)
    verified = verify(state.cache, tree)
    step = acceptance.accept(rule, tree, verified, eos_id=eos_id)
    budget = jnp.where(state.is_done, 0, state.limits - state.num_tokens)
    step = cut_step(step, budget)

    slot = jnp.arange(step.tokens.shape[1])
    ends = ((step.tokens == eos_id) & (slot < step.num_tokens[:, None])).any(-1)
    num_tokens = state.num_tokens + step.num_tokens
    ends |= num_tokens >= state.limits
    # A choice that isn't needed may be none.
    bad = (~step.is_finite & ~ends, _is_bad(lattice.is_finite), _is_bad(tree.is_finite))
    failure = jnp.select(bad, range(1, len(FAILURES)), 0)
    failure = jnp.where(state.is_done, state.failure, failure.astype(jnp.int32))
    drafts = jnp.where(tree.is_valid & ~state.is_done[:, None], tree.tokens, -1)
    parents = jnp.broadcast_to(tree.parents, drafts.shape)
    is_exact = jnp.ones_like(state.is_done) if tree.is_exact is None else tree.is_exact
    called = Trace(drafts, parents, step.num_tokens, is_exact)
    trace = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, state.call, axis=1),
        state.trace, called,
    )
    return state.replace(
        tokens=write_rows(state.tokens, step.tokens, state.num_tokens, axis=1),
        num_tokens=num_tokens,
        num_calls=state.num_calls + ~state.is_done,
        is_done=state.is_done | ends | (failure > 0),
        failure=failure,
        root=step.newest(state.root),
        cache=commit(state.cache, verified, step),
        step=step,
        drafter=drafter_state,
        rescorer=rescorer_state,
        trace=trace,
        call=state.call + 1,
    )

  return jax.lax.while_loop(lambda s: ~s.is_done.all(), call_once, state)


def _is_bad(is_finite: Array | None) -> Array | bool:
  """Not `is_finite`, where that is known."""
  return False if is_finite is None else ~is_finite
