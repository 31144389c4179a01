"""The form of everything that is learned beside a base model, and what it makes of it."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Protocol

from flax import linen as nn
import jax

from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.types import Drafting, Policing
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import EncoderDecoder
from bpd_jax.partitioning import Partitioning
from bpd_jax.reader import ModelReader


class Base(Protocol):
  """The model behind which an add-on is, as `bpd_jax.generation.Generator` has it.

  Attributes:
    config: its sizes.
    model: its calls, with `is_view`.
    partitioning: where it lives.
    fingerprint: of its values.
    vocabulary_fingerprint: of its vocabulary; None without one.
  """

  config: ModelConfig
  model: EncoderDecoder
  partitioning: Partitioning
  fingerprint: str
  vocabulary_fingerprint: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
  """What an add-on is good for in decoding; any of it, or all.

  Attributes:
    drafting: what drafts; None for what doesn't.
    scorings: what re-scores lattices.
    policing: what decides how many tokens rows draft.
  """

  drafting: Drafting | None = None
  scorings: tuple[Scoring, ...] = ()
  policing: Policing | None = None


class Addon:
  """What is learned beside a base model.

  A frozen dataclass, whose fields are its config: numbers, texts, truth values, None, and
  tuples of them. An instance is hashable and equal by its values.
  """

  def describe(self, config: ModelConfig) -> str:
    """What is said of a base's heads where this is trained."""
    del config
    return f"1, and {self}"

  def init(self, config: ModelConfig, key: jax.Array) -> Any:
    """Parameters to begin with.

    Args:
      config: of the base model.
      key: of what is drawn.

    Returns:
      A dict, or dicts of dicts, of arrays of `config.param_dtype`; as `nn.Partitioned` with
      logical axes where they are to be split over a mesh.
    """
    raise NotImplementedError

  def view(self, own: Any) -> Any:
    """Parameters as decoding reads them."""
    return own

  def make(
      self, reader: ModelReader, own: Any, *, block_size: int | None = None, top_k: int = 1
  ) -> Made:
    """What decodes.

    Args:
      reader: the base model.
      own: the parameters' view.
      block_size: most tokens of a call; the add-on's own by default.
      top_k: candidates of a step.

    Raises:
      InputError: where it can't be as wide, or offers no such candidates.
    """
    raise NotImplementedError

  def abstract(self, config: ModelConfig, partitioning: Partitioning) -> Any:
    """Shapes and dtypes with shardings of the parameters."""
    boxed = jax.eval_shape(lambda: self.init(config, jax.random.key(0)))

    def place(leaf):
      names, value = (leaf.names, leaf.value) if isinstance(leaf, nn.Partitioned) else ((), leaf)
      return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=partitioning.sharding(names))

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))

  def begin(self, config: ModelConfig, partitioning: Partitioning, key: jax.Array) -> Any:
    """The parameters of `init`, placed by the partitioning; plain dicts."""
    return _init_program(self, config, partitioning)(key)


def make_addon(
    addon: Addon, own: Any, base: Base, block_size: int | None = None, top_k: int = 1
) -> Made:
  """An add-on's parameters, ready to decode behind their base."""
  return addon.make(
      ModelReader(base.model), ADDON_VIEW(addon, own), block_size=block_size, top_k=top_k
  )


# Of an add-on and its parameters, what decoding reads.
ADDON_VIEW = jax.jit(lambda addon, own: addon.view(own), static_argnums=0)


@functools.lru_cache
def _init_program(
    addon: Addon, config: ModelConfig, partitioning: Partitioning
) -> Callable[[jax.Array], Any]:
  places = jax.tree.map(lambda leaf: leaf.sharding, addon.abstract(config, partitioning))
  return jax.jit(lambda key: nn.unbox(addon.init(config, key)), out_shardings=places)
