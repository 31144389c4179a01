"""The decode loop: draft, re-score, search, verify, accept, commit, until every row ends.

One `lax.while_loop`, batched, every row at its own pace; nothing goes to the
host until it ends. Greedy decoding is this loop with an empty draft. With the
exact acceptance rule the tokens are greedy's whatever the drafter.

Counting (block efficiency): tokens emitted, EOS included, divided by decoder
calls made while the row was live, the first call included. Greedy is exactly 1.

NaN looks like perfect heads: base and drafter both say token 0. So where a number
that decides isn't finite the row ends, and the state says what it was.
"""

import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding import accept as acceptance
from bpd_jax.decoding.cache import commit, write_rows
from bpd_jax.decoding.rescoring import Rescorer, RescorerParams
from bpd_jax.decoding.types import (
    AcceptanceRule,
    Array,
    Cache,
    Context,
    Drafter,
    Lattice,
    Params,
    Policy,
    Prompt,
    Search,
    Step,
    Tree,
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
    accepted: [batch, calls, depth] int32, the nodes whose tokens were emitted, the root's
      child first; -1 beyond the last.
    sources: [batch, calls, nodes] int32, which drafter each node is from, as
      `Lattice.sources` says; 0 where there is one.
    num_emitted: [batch, calls] int32, tokens emitted by each call, 0 after the
      row's end.
    is_exact: [batch, calls] bool, whether the search proved what it found.
  """

  drafts: Array
  parents: Array
  accepted: Array
  sources: Array
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
    step: what the last call made certain, for scorers; None where there are none, and once
      all rows are done.
    drafter: the drafter's own state.
    rescorer: the scorers' states.
    policy: the policy's state.
    trace: see `Trace`.
    call: [] int32, calls of the loop so far.
  """

  tokens: Array
  num_tokens: Array
  num_calls: Array
  limits: Array
  is_done: Array
  failure: Array
  root: Array
  cache: Cache
  step: Step | None
  drafter: Any
  rescorer: Any
  policy: Any
  trace: Trace
  call: Array


@struct.dataclass
class Called:
  """One call of the loop, for who looks on.

  Attributes:
    lattice: what was drafted.
    rescorer: the scorers' states in which it was judged.
    tree: what was verified.
    step: what became certain.
  """

  lattice: Lattice
  rescorer: Any
  tree: Tree
  step: Step


def cut_step(step: Step, budget: Array) -> Step:
  """Cuts what a call made certain to the tokens that a row may still emit."""
  return step.replace(num_tokens=jnp.minimum(step.num_tokens, budget))


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
  """The parts of a decoding, and their parameters.

  Attributes:
    verify: one decoder call over a tree.
    drafter: proposes lattices.
    params: what it reads.
    search: from a lattice, the root and what paths are worth to a tree.
    eos_id: the id that ends a row.
    rescorer: what else than the drafter's scores a path is worth.
    rescorer_params: its weights and its scorers' parameters.
    policy: how many tokens each row drafts; None for all that the drafter can.
    policy_params: what it reads.
    widths: block sizes that calls are compiled for where there is a policy, rising from 1
      to the drafter's.
    rule: which drafted tokens pass.
  """

  verify: Verify
  drafter: Drafter
  params: Params
  search: Search
  eos_id: int
  rescorer: Rescorer = Rescorer()
  rescorer_params: RescorerParams = RescorerParams()
  policy: Policy | None = None
  policy_params: Any = ()
  widths: tuple[int, ...] = ()
  rule: AcceptanceRule = acceptance.ExactMatch()

  def start(
      self, cache: Cache, root: Array, prompt: Prompt, limits: Array,
      context: Context | None = None, *, hidden: Array, num_nodes: int,
  ) -> DecodeState:
    """The state before the first call.

    Args:
      cache: what is certain but for the root, with room for
        `cache_length(prompt.max_length, depth)` slots more.
      root: [batch] int32, the newest certain token, which was emitted before or never is.
      prompt: the inputs.
      limits: [batch] int32, at most `prompt.max_length`; 0 for rows that only pad.
      context: what the model made of the inputs.
      hidden: [batch, d] zeros of the model's dtype.
      num_nodes: nodes of the trees (static).
    """
    batch, length, depth = limits.shape[0], prompt.max_length, self.drafter.depth
    none = jnp.zeros([batch], jnp.int32)
    policy = () if self.policy is None else self.policy.init(self.policy_params, prompt, context)
    unused = lambda *shape: jnp.full([batch, length, *shape], -1, jnp.int32)
    return DecodeState(
        tokens=jnp.zeros([batch, length + depth + 1], jnp.int32),
        num_tokens=none, num_calls=none, limits=limits, is_done=limits <= 0, failure=none,
        root=root, cache=cache,
        step=empty_step(hidden, depth, self.drafter.num_probes) if self.rescorer.scorers else None,
        drafter=self.drafter.init(self.params, prompt, context),
        rescorer=self.rescorer.init(self.rescorer_params, prompt, context),
        policy=policy,
        trace=Trace(
            drafts=unused(num_nodes), parents=unused(num_nodes), accepted=unused(depth),
            sources=jnp.zeros([batch, length, num_nodes], jnp.int32),
            num_emitted=jnp.zeros([batch, length], jnp.int32),
            is_exact=jnp.ones([batch, length], bool),
        ),
        call=jnp.zeros([], jnp.int32),
    )

  def call(
      self, state: DecodeState, lattice: Lattice | None = None
  ) -> tuple[DecodeState, Called]:
    """One call: what it leaves, and what it did.

    Args:
      state: before it.
      lattice: what was drafted, of the drafter's depth or less; all that it can by default,
        whatever a policy would want.
    """
    if lattice is None:
      lattice = self._draft(state)
    depth = self.drafter.depth
    proposed = deepen(lattice, depth)
    rescorer = self.rescorer.start(self.rescorer_params, state.rescorer, state.step, proposed)
    score = self.rescorer.path_score(self.rescorer_params, rescorer, lattice)
    tree = self.search(lattice, state.root, score)
    verified = self.verify(state.cache, tree)
    step = acceptance.accept(self.rule, tree, verified, eos_id=self.eos_id)
    budget = jnp.where(state.is_done, 0, state.limits - state.num_tokens)
    step = cut_step(step, budget)

    slot = jnp.arange(step.tokens.shape[1])
    ends = ((step.tokens == self.eos_id) & (slot < step.num_tokens[:, None])).any(-1)
    num_tokens = state.num_tokens + step.num_tokens
    ends |= num_tokens >= state.limits
    # A choice that isn't needed may be none.
    bad = (~step.is_finite & ~ends, _is_bad(lattice.is_finite), _is_bad(tree.is_finite))
    failure = jnp.select(bad, range(1, len(FAILURES)), 0)
    failure = jnp.where(state.is_done, state.failure, failure.astype(jnp.int32))
    trace = jax.tree.map(
        lambda old, new: write_call(old, new, state.call), state.trace,
        _record(lattice, tree, step, state.is_done),
    )
    is_done = state.is_done | ends | (failure > 0)
    newest, tokens = step.newest(state.root), step.tokens
    cache = commit(state.cache, verified, step)
    # Whoever takes it in has arrays of one shape, however wide the call was.
    step = widen_step(step, depth)
    policy = state.policy
    if self.policy is not None:
      policy = self.policy.start(self.policy_params, policy, step, ~is_done)
    after = state.replace(
        tokens=write_rows(state.tokens, tokens, state.num_tokens, axis=1),
        num_tokens=num_tokens,
        num_calls=state.num_calls + ~state.is_done,
        is_done=is_done,
        failure=failure,
        root=newest,
        cache=cache,
        step=step if self.rescorer.scorers else None,
        drafter=self.drafter.start(self.params, state.drafter, step, proposed),
        rescorer=rescorer,
        policy=policy,
        trace=trace,
        call=state.call + 1,
    )
    return after, Called(proposed, rescorer, tree, step)

  def decode(self, state: DecodeState) -> DecodeState:
    """Decodes every row to its EOS or limit.

    Args:
      state: from `start`; its cache is best donated to the jitted caller.

    Returns:
      The last state, without what only a next call would read.
    """
    is_live = lambda state: ~state.is_done.all()
    if self.policy is None:
      last = jax.lax.while_loop(is_live, lambda state: self.call(state)[0], state)
    else:
      last, _ = jax.lax.while_loop(
          lambda carry: is_live(carry[0]), self._round, (state, jnp.zeros([], jnp.int32))
      )
    return last.replace(step=None, drafter=(), rescorer=())

  def _round(self, carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
    """Calls over the roots alone as long as the policy pauses, then one over what rows drafted.

    Calls of a width are the body of a loop of their own, which the last of these is gone
    through once or not at all: a conditional around a call would copy the cache, and a loop
    writes it where it lies. The second part of the carry is 1 where no row had a token to
    draft: that call is left to the next round's pause, as calls of width 1 are compiled there.
    """
    state, has_no_draft = carry
    narrow = lambda lattice, width: jax.tree.map(
        lambda leaf: leaf[:, : width - 1] if leaf.ndim > 1 else leaf, lattice
    )
    nothing = narrow(empty_lattice(jax.eval_shape(self._draft, state)), 1)
    plain = dataclasses.replace(self, policy=None)
    is_live = lambda state: ~state.is_done.all()
    began = state.call
    pause = jnp.maximum(self.policy.pause(self.policy_params, state.policy), has_no_draft)
    state = jax.lax.while_loop(
        lambda state: is_live(state) & (state.call - began < pause),
        lambda state: plain.call(state, nothing)[0], state,
    )
    state = state.replace(
        policy=self.policy.rested(self.policy_params, state.policy, state.call - began)
    )
    lattice = self._propose(state)
    width = 1 + lattice.num_steps.max()
    for least, most in zip(self.widths, self.widths[1:]):
      state, _ = jax.lax.while_loop(
          lambda carry: carry[1],
          lambda carry, most=most: (
              self.call(carry[0], narrow(lattice, most))[0], jnp.zeros([], bool)
          ),
          (state, (width > least) & (width <= most)),
      )
    return state, (width == 1).astype(jnp.int32)

  def _draft(self, state: DecodeState, depth: int | None = None) -> Lattice:
    """The drafter's lattice, or the first `depth` steps of it, in the loop's dtypes."""
    drafter = self.drafter if depth is None else self.drafter.shallower(depth)
    lattice = drafter.propose(self.params, state.drafter, None, state.cache)
    # A drafter may have scores in the model's dtype, too few bits to add and to mask.
    wide = jnp.promote_types(lattice.scores.dtype, jnp.float32)
    return lattice.replace(
        tokens=lattice.tokens.astype(jnp.int32), scores=lattice.scores.astype(wide),
        num_steps=lattice.num_steps.astype(jnp.int32),
    )

  def _propose(self, state: DecodeState) -> Lattice:
    """What is drafted of the rows and steps that the policy wants, none of rows that ended."""
    wants = self.policy.wants(self.policy_params, state.policy)
    wants = jnp.where(state.is_done, 0, jnp.clip(wants, 0, self.drafter.depth))
    nothing = empty_lattice(jax.eval_shape(self._draft, state))
    depths = np.array(self.widths) - 1
    draft = lambda depth: deepen(self._draft(state, int(depth)), self.drafter.depth)
    lattice = jax.lax.switch(
        jnp.searchsorted(depths, wants.max()),
        [lambda: nothing, *(functools.partial(draft, depth) for depth in depths[1:])],
    )
    lattice = lattice.replace(num_steps=jnp.minimum(lattice.num_steps, wants))
    steps = self.policy.trim(self.policy_params, state.policy, lattice)
    return lattice.replace(num_steps=jnp.clip(steps, 0, lattice.num_steps))


def empty_lattice(like: Lattice) -> Lattice:
  """No draft, in the shapes of a lattice."""
  return jax.tree.map(
      lambda leaf: jnp.ones(leaf.shape, leaf.dtype) if leaf.dtype == bool
      else jnp.zeros(leaf.shape, leaf.dtype),
      like,
  )


def pad_axis(values: Array, length: int, fill: int = 0) -> Array:
  """Fills axis 1 up with `fill`."""
  pad = [(0, 0)] * values.ndim
  pad[1] = (0, length - values.shape[1])
  return jnp.pad(values, pad, constant_values=fill) if pad[1][1] else values


def deepen(lattice: Lattice, depth: int) -> Lattice:
  """A lattice with steps without a draft up to `depth`."""
  return jax.tree.map(
      lambda leaf: pad_axis(leaf, depth) if leaf.ndim > 1 else leaf, lattice
  )


def widen_step(step: Step, max_depth: int) -> Step:
  """A step of a call over shallower trees in the shapes of one of `max_depth`."""
  pad = lambda values: pad_axis(values, max_depth + 1)
  return step.replace(tokens=pad(step.tokens), path=pad(step.path), states=pad(step.states))


def write_call(buffer: Array, values: Array, call: Array) -> Array:
  """Writes a call's part of a trace: [batch, calls, n], and [batch, n or fewer]."""
  values = jnp.expand_dims(values, 1)
  none = jnp.zeros_like(call)
  start = (none, call) + (none,) * (values.ndim - 2)
  return jax.lax.dynamic_update_slice(buffer, values, start)


def empty_step(hidden: Array, max_depth: int, num_probes: int = 0) -> Step:
  """The step before the first call: nothing became certain.

  Args:
    hidden: [batch, d] zeros of the model's dtype.
    max_depth: largest depth of the trees (static).
    num_probes: of a node (static).
  """
  batch, d = hidden.shape
  none = jnp.zeros([batch, max_depth + 1], jnp.int32)
  return Step(
      tokens=none, num_tokens=none[:, 0], path=none,
      states=jnp.zeros([batch, max_depth + 1, d], hidden.dtype), hidden=hidden,
      is_finite=none[:, 0] == 0, num_verified=none[:, 0],
      probes=jnp.zeros([batch, num_probes, d], hidden.dtype) if num_probes else None,
  )


def _record(lattice: Lattice, tree: Tree, step: Step, is_done: Array) -> Trace:
  """A call's part of the trace; nothing of rows that were done."""
  is_live = ~is_done[:, None]
  # Beyond the last accepted node a path repeats it.
  is_new = step.path[:, 1:] != step.path[:, :-1]
  is_emitted = jnp.arange(is_new.shape[1]) < step.num_tokens[:, None]
  is_exact = jnp.ones_like(is_done) if tree.is_exact is None else tree.is_exact
  return Trace(
      drafts=jnp.where(tree.is_valid & is_live, tree.tokens, -1),
      parents=jnp.broadcast_to(tree.parents, tree.tokens.shape),
      accepted=jnp.where(is_new & is_emitted, step.path[:, 1:], -1),
      sources=_node_sources(lattice, tree),
      num_emitted=step.num_tokens,
      is_exact=is_exact,
  )


def _node_sources(lattice: Lattice, tree: Tree) -> Array:
  """Which drafter each node is from, [batch, nodes] int32."""
  if lattice.sources is None or not lattice.tokens.shape[1]:
    return jnp.zeros(tree.tokens.shape, jnp.int32)
  # Candidates of a step are distinct, so a node's depth and token name its candidate.
  depth = jnp.broadcast_to(tree.depth, tree.tokens.shape)[..., None]
  tokens, sources = (
      jnp.take_along_axis(leaf, jnp.maximum(depth - 1, 0), axis=1)
      for leaf in (lattice.tokens, lattice.sources)
  )
  is_it = (tokens == tree.tokens[..., None]) & (depth > 0)
  return jnp.where(is_it, sources, 0).sum(-1, dtype=jnp.int32)


def _is_bad(is_finite: Array | None) -> Array | bool:
  """Not `is_finite`, where that is known."""
  return False if is_finite is None else ~is_finite
