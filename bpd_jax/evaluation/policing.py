"""Policies by name: what the `policy` of a method's entry in a gin file becomes."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Protocol

from bpd_jax.call_costs import CallCosts, costs_key, load_costs
from bpd_jax.decoding.types import Drafting, Policing
from bpd_jax.errors import InputError
from bpd_jax.folders import contents_fingerprint
from bpd_jax.generation import Generator


@dataclasses.dataclass(frozen=True)
class Decision:
  """A policy ready for one model, drafter and batch size.

  Attributes:
    policing: the policy, with nothing seen yet.
    costs: what it decides by.
  """

  policing: Policing
  costs: CallCosts

  def describe(self) -> dict[str, Any]:
    """For `results.json`."""
    return {"policy": "goodput", "costs": self.costs.describe()}


class PolicySource(Protocol):
  """What decides how many tokens rows draft."""

  def make(
      self, generator: Generator, drafting: Drafting, rows: Sequence[Sequence[int]],
      batch_size: int, max_length: int,
  ) -> Decision:
    """The policy; InputError where it can't decide for these."""

  def identity(self) -> dict[str, Any]:
    """All that results depend on."""


@dataclasses.dataclass(frozen=True)
class GoodputSource:
  """The block size that promises most tokens a second, as "auto" chooses it.

  Attributes:
    costs: a file of what calls cost, as `python -m bpd_jax.decode --save-costs` writes it;
      None for what is kept or measured.
    is_fresh: whether costs are measured whatever is kept.
  """

  costs: str | None = None
  is_fresh: bool = False

  def __post_init__(self):
    if self.is_fresh and self.costs is not None:
      raise InputError("GoodputSource.is_fresh", True, "False beside GoodputSource.costs")

  def make(
      self, generator: Generator, drafting: Drafting, rows: Sequence[Sequence[int]],
      batch_size: int, max_length: int,
  ) -> Decision:
    if self.costs is None:
      costs = generator.call_costs(
          drafting, rows, batch_size, max_length, is_fresh=self.is_fresh
      )
    else:
      costs = load_costs(self.costs)
      key = costs_key(generator.config, generator.partitioning, drafting, batch_size)
      costs.check(key, drafting.drafter.depth + 1)
    return Decision(costs.policing(), costs)

  def identity(self) -> dict[str, Any]:
    costs = None if self.costs is None else contents_fingerprint(self.costs, "GoodputSource.costs")
    return {"policy": "goodput", "costs": costs, "is_fresh": self.is_fresh}
