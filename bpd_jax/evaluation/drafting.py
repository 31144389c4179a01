"""Drafters by name: what the `draft` of a method's entry in a gin file becomes.

Each source says what drafts; `make` makes it ready for one model. A drafter that learns
nothing needs none.
"""

import dataclasses
import sys
from typing import Any, Protocol

from bpd_jax.addons.folder import addon_source, load_made
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.decoding.types import Drafter, Drafting
from bpd_jax.errors import check_count, InputError
from bpd_jax.folders import contents_fingerprint
from bpd_jax.generation import Generator


class DraftSource(Protocol):
  """What drafts."""

  def make(self, generator: Generator) -> Drafting:
    """The drafter for a model; InputError where it can't draft for it."""


@dataclasses.dataclass(frozen=True)
class Draft:
  """The model's own parallel heads, or an add-on of the model.

  Attributes:
    block_size: h, the most tokens a call emits; all heads draft by default.
    top_k: candidates of each step.
    addon: the folder of what drafts; None for the heads.
  """

  block_size: int | None = None
  top_k: int = 1
  addon: str | None = None

  def make(self, generator: Generator) -> Drafting:
    if self.addon is None:
      return generator.heads(self.block_size, self.top_k)
    made = load_made(self.addon, generator, self.block_size, self.top_k)
    if made.drafting is None or made.scorings or made.policing is not None:
      raise InputError("Draft.addon", self.addon, "an add-on that drafts, and does nothing else")
    return made.drafting


@dataclasses.dataclass(frozen=True)
class Reference:
  """Greedy's own output, the ceiling of every drafter.

  Attributes:
    block_size: h, the most tokens a call emits; by default that of `addon`.
    addon: the folder of what drafts beside it; None for the model's heads.
  """

  block_size: int | None = None
  addon: str | None = None

  def make(self, generator: Generator) -> Drafting:
    block_size = self.block_size
    if block_size is None:
      block_size = Draft(addon=self.addon).make(generator).drafter.depth + 1
    check_count("Reference.block_size", block_size)
    return Drafting(ReferenceDrafter(block_size - 1))


def describe_draft(draft: str | Drafter | DraftSource) -> dict[str, Any]:
  """Kind and fields, for `results.json`; of what isn't a dataclass, what it says of itself."""
  if isinstance(draft, str):
    return {"drafter": draft}
  fields = {}
  if dataclasses.is_dataclass(draft):
    fields = {field.name: getattr(draft, field.name) for field in dataclasses.fields(draft)}
  elif type(draft).__repr__ is not object.__repr__:
    # The default says where in memory an object lies, which is another place every time.
    fields = {"is": draft}
  plain = lambda value: value if isinstance(value, str | int | float | None) else repr(value)
  return {"drafter": type(draft).__name__} | {key: plain(value) for key, value in fields.items()}


def draft_identity(draft: str | Drafter | DraftSource) -> dict[str, Any]:
  """All that results depend on: kind, fields, and the contents of its module."""
  module = sys.modules[type(draft).__module__]
  # What was typed into an interpreter has no file, nor has a text.
  file = getattr(module, "__file__", None)
  identity = describe_draft(draft) | {
      "module": None if file is None else contents_fingerprint(file)
  }
  if getattr(draft, "addon", None) is not None:
    # Where it lies doesn't count, and what its class does is in no folder.
    identity["addon"] = contents_fingerprint(draft.addon, "Draft.addon")
    identity["addon_module"] = contents_fingerprint(addon_source(draft.addon))
  return identity
