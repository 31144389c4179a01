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
  """

  tokens: Array
  scores: Array
  num_steps: Array
  is_finite: Array | None = None


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
    hidden: [batch, d] hidden state of the last accepted node.
    is_finite: [batch] bool; False where the base model had no choice after that node, so
      that there are the accepted tokens alone.
    probes: [batch, k, d] probe states of that node, or None.
  """

  tokens: Array
  num_tokens: Array
  path: Array
  hidden: Array
  is_finite: Array
  probes: Array | None = None

  def newest(self, old: Array) -> Array:
    """The last token that is certain, [batch]; `old` where this made none certain."""
    last = jnp.maximum(self.num_tokens - 1, 0)[:, None]
    token = jnp.take_along_axis(self.tokens, last, axis=1)[:, 0]
    return jnp.where(self.num_tokens > 0, token, old)


@struct.dataclass
class Prompt:
  """The inputs of a batch, as drafters and scorers may read them.

  Attributes:
    tokens: [batch, input length] int32, the encoder's input tokens.
    lengths: [batch] int32, how many of them count.
    references: [batch, length] int32, a text that is known beforehand; None but
      for the methods that show what is possible.
  """

  tokens: Array
  lengths: Array
  references: Array | None = None


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


class Drafter(Protocol):
  """Proposes candidates for the tokens after the root.

  Attributes:
    depth: most tokens it drafts a call (static). 0 is plain greedy decoding.
  """

  depth: int

  def init(self, params: Any, prompt: Prompt) -> Any:
    """Makes the state (any pytree, arrays batch first) from the inputs."""

  def propose(
      self, params: Any, state: Any, step: Step, key: Array
  ) -> tuple[Lattice, Any]:
    """Drafts after `step`, the tokens certain since the last proposal.

    Before the first call `step.num_tokens` is 0 and `step.hidden` is zero.
    """


class Scorer(Protocol):
  """Judges candidates by the tokens before them, whatever the drafter thinks.

  A search calls it step by step, in a loop that is compiled once: what the scorer has to
  know of the drafted tokens of each path is in its *trails*, a pytree of one shape
  throughout a search.

  Attributes:
    context: how many of the newest drafted tokens a score depends on, besides all
      tokens that are certain; -1 for the whole draft (static).
  """

  context: int

  def init(self, params: Any, prompt: Prompt) -> Any:
    """Makes the state (any pytree, arrays batch first) from the inputs."""

  def start(self, params: Any, state: Any, step: Step) -> Any:
    """Takes in `step`, the tokens certain since the last call; the last is the root."""

  def begin(self, params: Any, state: Any, num_paths: int, depth: int) -> Any:
    """Trails of paths without a drafted token.

    Args:
      params: the scorer's.
      state: from `start`.
      num_paths: how many paths (static).
      depth: most tokens that a path will have (static).
    """

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


class AcceptanceRule(Protocol):
  """Says which drafted tokens pass, given what the base model would choose."""

  reads_logits: bool
  """Whether `Verified.logits` must be filled."""

  def passes(self, tree: Tree, verified: Verified) -> Array:
    """[batch, nodes] bool: may node i follow its parent? Column 0 is unused."""
