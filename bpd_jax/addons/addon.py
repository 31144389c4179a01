"""The form of everything that is learned beside a base model, and what it makes of it."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax

from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.types import Drafting, Policing
from bpd_jax.model.config import ModelConfig
from bpd_jax.partitioning import Partitioning
from bpd_jax.reader import ModelReader


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
  """What an add-on is good for in decoding; any of it, or all.

  Attributes:
    drafting: what drafts; None for what doesn't.
    scorings: what re-scores lattices.
    policing: what decides which rows draft.
  """

  drafting: Drafting | None = None
  scorings: tuple[Scoring, ...] = ()
  policing: Policing | None = None


class Addon:
  """What is learned beside a base model.

  A frozen dataclass, whose fields are its config: numbers, texts, truth values, None, and
  tuples of them. An instance is hashable and equal by its values.
  """

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


def abstract_own(addon: Addon, config: ModelConfig, partitioning: Partitioning) -> Any:
  """Shapes and dtypes with shardings of an add-on's parameters."""
  boxed = jax.eval_shape(lambda: addon.init(config, jax.random.key(0)))

  def place(leaf):
    names, value = (leaf.names, leaf.value) if isinstance(leaf, nn.Partitioned) else ((), leaf)
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=partitioning.sharding(names))

  return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def init_own(
    addon: Addon, config: ModelConfig, partitioning: Partitioning, key: jax.Array
) -> Any:
  """An add-on's first parameters, placed by the partitioning; plain dicts."""
  return _init_program(addon, config, partitioning)(key)


@functools.lru_cache
def _init_program(
    addon: Addon, config: ModelConfig, partitioning: Partitioning
) -> Callable[[jax.Array], Any]:
  places = jax.tree.map(lambda leaf: leaf.sharding, abstract_own(addon, config, partitioning))
  return jax.jit(lambda key: nn.unbox(addon.init(config, key)), out_shardings=places)
