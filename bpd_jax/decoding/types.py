"""The arrays that the parts of the decode loop hand to each other.

A drafter proposes a `Lattice`; scorers re-score it; a search turns it into a
`Tree`; `Verify` runs one decoder call over the tree; an acceptance rule turns the
answer into a `Step`, what this call made certain. Everything is batched and every
row moves at its own pace.

Words. *Prefix*: the tokens that are certain. *Root*: the newest certain token,
emitted but not yet fed to the decoder. It is node 0 of every tree.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Protocol

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@struct.dataclass
class Lattice:
  """Candidates for the tokens that follow the root, before any search.

  Attributes:
    tokens: [batch, depth, k] int32, distinct within a step, best first.
    scores: [batch, depth, k] float, log-probabilities; the loop makes them float32 at
      least.
    num_steps: [batch] int32, how many steps of the row hold a draft, <= depth.
    is_finite: [batch] bool, whether what the draft comes from is numbers and not NaN or
      infinite; None where it always is.
    states: [batch, depth, d], what each step was predicted from, for scorers that read
      it; None where the drafter has none.
    sources: [batch, depth, k] int32, which of several drafters a candidate is from; None
      where there is one.
  """

  tokens: Array
  scores: Array
  num_steps: Array
  is_finite: Array | None = None
  states: Array | None = None
  sources: Array | None = None


@struct.dataclass
class Tree:
  """Nodes that one decoder call verifies.

  Node 0 is the root. `parents[i] < i`, so nodes are in topological order, and
  the children of a node hold distinct tokens.

  Attributes:
    tokens: [batch, nodes] int32.
    depth: [batch, nodes] or [nodes] int32, 0 for the root.
    parents: [batch, nodes] or [nodes] int32, -1 for the root. A numpy array
      where the shape of the tree is known when the loop is traced.
    is_valid: [batch, nodes] bool; an invalid node is never accepted. The root
      is always valid.
    max_depth: largest depth that any node can have (static).
    is_exact: [batch] bool, whether the search proved that it found what it looked
      for; None where it always does.
    is_finite: [batch] bool, whether no path that it kept was worth NaN; None where it
      looked at no path's worth.
  """

  tokens: Array
  depth: Array | np.ndarray
  parents: Array | np.ndarray
  is_valid: Array
  max_depth: int = struct.field(pytree_node=False)
  is_exact: Array | None = None
  is_finite: Array | None = None


@struct.dataclass
class Cache:
  """Keys and values of the committed prefix; only `commit` writes it.

  Attributes:
    keys: one array a decoder layer, [batch, heads, head_dim, length]. Slots
      last, because a product with queries of several nodes is then twice as
      fast on a CPU.
    values: one array a decoder layer, [batch, heads, length, head_dim].
    lengths: [batch] int32; slots at and above a row's length hold no meaning.
  """

  keys: tuple[Array, ...]
  values: tuple[Array, ...]
  lengths: Array


@struct.dataclass
class Drafted:
  """Nodes that were read in earlier calls and aren't certain, beside a cache.

  Attributes:
    keys: one array a layer, [batch, heads, head_dim, slots].
    values: likewise, [batch, heads, slots, head_dim].
    depth: [batch or 1, slots] int32, as in `Tree`.
    visible: [batch, nodes, slots] bool, which of them each node of this call sees.
  """

  keys: tuple[Array, ...]
  values: tuple[Array, ...]
  depth: Array | np.ndarray
  visible: Array


@struct.dataclass
class Verified:
  """What one decoder call over a tree says.

  Attributes:
    choice: [batch, nodes] int32, the base model's greedy token after each node.
    hidden: [batch, nodes, d] normed last hidden states.
    keys: one array a layer, [batch, heads, head_dim, nodes]: the nodes' own.
    values: likewise, [batch, heads, nodes, head_dim].
    probes: [batch, nodes, k, d] probe states, or None where the drafter has no
      probe that enters below the last layer.
    logits: [batch, nodes, vocab], or None where no acceptance rule reads them.
    is_finite: [batch, nodes] bool, whether the largest logit is a finite number; where it
      isn't there is no choice. None where it always is.
  """

  choice: Array
  hidden: Array
  keys: tuple[Array, ...]
  values: tuple[Array, ...]
  probes: Array | None = None
  logits: Array | None = None
  is_finite: Array | None = None


@struct.dataclass
class Step:
  """What one call made certain.

  Attributes:
    tokens: [batch, max_depth + 1] int32: the accepted tokens, then the base
      model's choice after the last of them. Valid below `num_tokens`.
    num_tokens: [batch] int32; 0 before the first call and in finished rows.
    path: [batch, max_depth + 1] int32: nodes whose keys and values become part
      of the prefix, root first. Valid below `num_tokens`.
    states: [batch, max_depth + 1, d] hidden states along `path`.
    hidden: [batch, d] hidden state of the last accepted node.
    is_finite: [batch] bool; False where the base model had no choice after that node, so
      that there are the accepted tokens alone.
    num_verified: [batch] int32, drafted nodes that the call verified.
    probes: [batch, k, d] probe states of the last accepted node, or None.
  """

  tokens: Array
  num_tokens: Array
  path: Array
  states: Array
  hidden: Array
  is_finite: Array
  num_verified: Array
  probes: Array | None = None

  def newest(self, old: Array) -> Array:
    """The last token that is certain, [batch]; `old` where this made none certain."""
    last = jnp.maximum(self.num_tokens - 1, 0)[:, None]
    token = jnp.take_along_axis(self.tokens, last, axis=1)[:, 0]
    return jnp.where(self.num_tokens > 0, token, old)


@struct.dataclass
class Params:
  """What a drafter reads, traced.

  Attributes:
    base: the base model's parameters as decoding reads them.
    own: the drafter's.
  """

  base: Any
  own: Any = ()


@struct.dataclass
class Prompt:
  """The inputs of a batch, as drafters, scorers and policies may read them.

  Attributes:
    tokens: [batch, input length] int32, the encoder's input tokens.
    lengths: [batch] int32, how many of them count.
    max_length: most tokens of an output (static).
    keys: [batch] of jax.random keys, each row's own whatever the batch; None where nothing
      is drawn.
    references: [batch, length] int32, a text that is known beforehand; None but
      for what shows what is possible.
  """

  tokens: Array
  lengths: Array
  max_length: int = struct.field(pytree_node=False)
  keys: Array | None = None
  references: Array | None = None


@struct.dataclass
class Context:
  """What the model made of the prompts before the first call.

  Attributes:
    encoded: [batch, input length, d], the encoder's states.
    mask: [batch, input length] bool, which input tokens count.
    cross: a pair a decoder layer, keys [batch, heads, d_kv, input length] and
      values [batch, heads, input length, d_kv].
  """

  encoded: Array
  mask: Array
  cross: tuple[tuple[Array, Array], ...]


@dataclasses.dataclass(frozen=True)
class PathScore:
  """What a search maximises: a sum over the steps of a path through a lattice.

  Attributes:
    context: how many of the newest drafted tokens an addend depends on; -1 for
      all of them (static).
    begin: (number of paths) -> trails of so many paths without a drafted token.
    extend: (trails, parents [batch, paths] int32, tokens [batch, paths] int32, i) ->
      trails of paths that are each one of those, `parents`, and a token of step i more.
    addends: (trails, i) -> [batch, paths or 1, k], what each candidate of step i adds to
      each path.
    bounds: () -> [batch, depth - 1, k or 1, k], what the addends of the steps after the
      first never exceed, by the candidate before; where `context` is 0 or 1, the addends.
  """

  context: int
  begin: Callable[[int], Any]
  extend: Callable[[Any, Array, Array, Array | int], Any]
  addends: Callable[[Any, Array | int], Array]
  bounds: Callable[[], Array]


Verify = Callable[[Cache, Tree], Verified]
Search = Callable[[Lattice, Array, PathScore], Tree]


class Drafter:
  """Proposes candidates for the tokens after the root.

  A drafter is hashable and equal by its values, as the compiled loop is kept by it: a
  frozen dataclass without arrays and closures. What it learned is in `Params.own`.

  Attributes:
    depth: most tokens it drafts a call (static). 0 is plain greedy decoding.
    num_candidates: k of its lattices (static).
    num_probes: probes of a node, of `probes` (static).
    reads_references: whether `Prompt.references` must be there (static).
  """

  depth: int
  num_candidates: int = 1
  num_probes: int = 0
  reads_references: bool = False

  def init(self, params: Params, prompt: Prompt, context: Context | None) -> Any:
    """Makes the state (any pytree, arrays batch first) before the first call.

    A first `propose` may come before any `start`: nothing is certain then, and few have
    anything to draft.

    Args:
      params: see `Params`.
      prompt: the inputs.
      context: what the model made of them; None without a model.
    """
    return ()

  def start(self, params: Params, state: Any, step: Step, proposed: Lattice) -> Any:
    """The state after a call; the only place where it changes.

    Args:
      params: see `Params`.
      state: before it.
      step: what the call made certain; `num_tokens` is 0 in finished rows.
      proposed: the lattice that it verified of; without a step where nothing was drafted.
    """
    return state

  def propose(self, params: Params, state: Any, noise: None, past: Cache) -> Lattice:
    """Drafts after the root.

    Args:
      params: see `Params`.
      state: of `init` or `start`.
      noise: what perturbs the logits; None where the rows are decoded greedily.
      past: the base model's cache, to read.
    """
    raise NotImplementedError

  def shallower(self, depth: int) -> "Drafter":
    """One that drafts `depth` tokens at most from the same state, if that is less work."""
    return self

  def probes(self, params: Params) -> Any:
    """Columns that the decoder call carries for this drafter; None for none.

    A `bpd_jax.model.probes.ProbeSpec`, of which the loop knows nothing: it hands the states
    that came of the last accepted node on in `Step.probes`.
    """
    return None


class Policy:
  """Says how many tokens each row drafts, and how many of those are verified. Changes no token.

  Hashable and equal by its values, as a `Drafter` is.

  Attributes:
    widths: block sizes that calls are compiled for, beside 1 and the drafter's own (static):
      a call has the least of them that holds every draft, root included.
  """

  widths: tuple[int, ...] = ()

  def init(self, params: Any, prompt: Prompt, context: Context | None) -> Any:
    """Makes the state, any pytree, before the first call."""
    return ()

  def start(self, params: Any, state: Any, step: Step, is_live: Array) -> Any:
    """The state after a call over drafts.

    Args:
      params: the policy's.
      state: before it.
      step: what the call made certain.
      is_live: [batch] bool, the rows that go on.
    """
    return state

  def wants(self, params: Any, state: Any) -> Array:
    """[batch] int32, most tokens that each row drafts."""
    raise NotImplementedError

  def pause(self, params: Any, state: Any) -> Array:
    """[] int32, calls over the roots alone to come before the next draft."""
    return jnp.where(self.wants(params, state).any(), 0, 1)

  def rested(self, params: Any, state: Any, num_calls: Array) -> Any:
    """The state after so many calls over the roots alone, [] int32."""
    return state

  def trim(self, params: Any, state: Any, lattice: Lattice) -> Array:
    """[batch] int32, how many steps of each row's draft are worth verifying."""
    return lattice.num_steps

  def remember(self, params: Any, state: Any) -> Any:
    """Parameters for the next batch, from the last state of this one."""
    return params


@dataclasses.dataclass(frozen=True, eq=False)
class Drafting:
  """A drafter, ready to draft.

  Attributes:
    drafter: what drafts.
    params: what it learned, `Params.own`.
  """

  drafter: Drafter
  params: Any = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Policing:
  """A policy, ready to decide.

  Attributes:
    policy: what decides.
    params: what it reads.
  """

  policy: Policy
  params: Any = ()


class Scorer:
  """Judges candidates by the tokens before them, whatever the drafter thinks.

  A search calls it step by step, in a loop that is compiled once: what the scorer has to
  know of the drafted tokens of each path is in its *trails*, a pytree of one shape
  throughout a search. Hashable and equal by its values, as a `Drafter` is.

  Attributes:
    context: how many of the newest drafted tokens a score depends on, besides all
      tokens that are certain; -1 for the whole draft (static).
    reads_references: whether `Prompt.references` must be there (static).
  """

  context: int
  reads_references: bool = False

  def init(self, params: Any, prompt: Prompt, context: Context | None) -> Any:
    """Makes the state (any pytree, arrays batch first) before the first call."""
    return ()

  def start(self, params: Any, state: Any, step: Step, lattice: Lattice) -> Any:
    """The state before a search.

    Args:
      params: the scorer's.
      state: before it.
      step: the tokens certain since the last call; the last is the root.
      lattice: what is to be judged.
    """
    return state

  def begin(self, params: Any, state: Any, num_paths: int, depth: int) -> Any:
    """Trails of paths without a drafted token.

    Args:
      params: the scorer's.
      state: from `start`.
      num_paths: how many paths (static).
      depth: most tokens that a path will have (static).
    """
    return ()

  def extend(
      self, params: Any, state: Any, trails: Any, parents: Array, tokens: Array, i: Array | int
  ) -> Any:
    """Trails of paths that are each one of the old ones and a token more.

    Args:
      params: the scorer's.
      state: from `start`.
      trails: of the paths before.
      parents: [batch, paths] int32, which of them each path goes on from.
      tokens: [batch, paths] int32, candidates of step i.
      i: the step, the tokens that the old paths have; 0 for the token after the root.
    """
    return trails

  def score(
      self, params: Any, state: Any, trails: Any, candidates: Array, i: Array | int
  ) -> Array:
    """Log-probabilities, at most 0, of a step's candidates.

    Args:
      params: the scorer's.
      state: from `start`.
      trails: of paths of i tokens.
      candidates: [batch, k] int32, of step i.
      i: the step.

    Returns:
      [batch, paths or 1, k].
    """
    raise NotImplementedError

  def bound(
      self, params: Any, state: Any, before: Array, candidates: Array, i: Array | int
  ) -> Array:
    """At least `score` after a token, whatever stands before it; `score` where that says it.

    Args:
      params: the scorer's.
      state: from `start`.
      before: [batch, paths] int32, tokens of step i - 1.
      candidates: [batch, k] int32, of step i.
      i: the step, at least 1.

    Returns:
      [batch, paths or 1, k or 1]; 0 is always right where `context` is above 1, where it
      is 0 or 1 the score is wanted.
    """
    raise NotImplementedError


class AcceptanceRule(Protocol):
  """Says which drafted tokens pass, given what the base model would choose."""

  reads_logits: bool
  """Whether `Verified.logits` must be filled."""

  def passes(self, tree: Tree, verified: Verified) -> Array:
    """[batch, nodes] bool: may node i follow its parent? Column 0 is unused."""
