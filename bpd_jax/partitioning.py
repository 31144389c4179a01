"""Where arrays live on a mesh: one frozen object given to whatever needs it.

Parameters and activations carry logical axis names; `rules` map those to the
mesh axes `data`, `fsdp` and `model`. Nothing here is global: an unknown axis
name raises wherever it is used, under any mesh.
"""

import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from bpd_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "model")

# Earlier rules win; a mesh axis is used once in an array. The second rule of
# `embed` serves activations, whose batch has taken `fsdp`.
DEFAULT_RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", "fsdp"),
    ("embed", None),
    ("kv", None),
    ("length", None),
    ("layers", None),
    ("block", None),
    ("fused", None),
    ("relpos_buckets", None),
)


@dataclasses.dataclass(frozen=True)
class Partitioning:
  """A mesh and the rules from logical axes to its axes.

  Attributes:
    mesh: devices with the axes of `MESH_AXES`.
    rules: pairs (logical axis, mesh axis, tuple of mesh axes, or None).
  """

  mesh: Mesh
  rules: tuple[tuple[str, Any], ...] = DEFAULT_RULES

  def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes.

    Raises:
      ValueError: for a name that no rule knows.
    """
    known = {name for name, _ in self.rules}
    for name in names:
      if name is not None and name not in known:
        raise ValueError(
            f"logical axis {name!r} in {names}: known axes are {sorted(known)}"
        )
    return nn.logical_to_mesh_axes(names, self.rules)

  def sharding(self, names: tuple[str | None, ...]) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(self.mesh, self.spec(names))

  def constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Pins the sharding of `x` inside jit; one name an axis."""
    spec = self.spec(names)
    if self.mesh.size == 1:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

  def shardings(self, boxed_params) -> Any:
    """Shardings of a tree of `nn.Partitioned` leaves, as returned by `init`."""
    return jax.tree.map(
        lambda leaf: self.sharding(leaf.names),
        boxed_params,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )

  def replicated(self) -> "Partitioning":
    """The same mesh, of which each device holds all of every parameter."""
    rules = [(name, axes if name == "batch" else None) for name, axes in self.rules]
    return dataclasses.replace(self, rules=tuple(dict(rules).items()))

  def check_params(self, params: Any) -> None:
    """Raises InputError where a leaf can't be split evenly over its mesh axes.

    Args:
      params: a tree of dicts with `jax.ShapeDtypeStruct` leaves that have shardings.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      for size, axes in zip(leaf.shape, leaf.sharding.spec):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        split = math.prod(self.mesh.shape[axis] for axis in axes)
        if size % split:
          name = jax.tree_util.keystr(path, simple=True, separator="/")
          raise InputError(
              f"{name} shape", leaf.shape, f"multiples of {split} on the mesh axes {axes}"
          )

  @property
  def batch_split(self) -> int:
    """In how many parts a batch lies on the mesh."""
    axes = dict(self.rules)["batch"]
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(self.mesh.shape[axis] for axis in axes)

  def round_batch(self, rows: int) -> int:
    """The least batch that divides over the mesh and holds so many rows."""
    return -(-rows // self.batch_split) * self.batch_split

  def check_batch(self, batch_size: int) -> None:
    """Raises InputError where a batch doesn't divide over its mesh axes."""
    if batch_size < 1 or batch_size % self.batch_split:
      axes = dict(self.rules)["batch"]
      raise InputError(
          "batch_size", batch_size,
          f"a positive multiple of {self.batch_split}, the mesh axes {axes}",
      )


def make_partitioning(
    data: int = -1, fsdp: int = 1, model: int = 1, devices=None, rules=DEFAULT_RULES
) -> Partitioning:
  """Lays devices out on a mesh ('data', 'fsdp', 'model').

  Of several devices of one process 1 × 1 × 1 is the first.

  Args:
    data: devices along the batch only; -1 takes what is left.
    fsdp: devices along the batch and the parameters' `embed` axis; -1 likewise.
    model: devices along heads, mlp and vocabulary; -1 likewise.
    devices: which devices; all by default.
    rules: from logical to mesh axes.

  Raises:
    InputError: where the sizes don't give the number of devices.
  """
  devices = np.asarray(jax.devices() if devices is None else devices).reshape(-1)
  sizes = {"data": data, "fsdp": fsdp, "model": model}
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise InputError("mesh", tuple(sizes.values()), "at most one -1")
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise InputError(f"mesh.{name}", size, "-1 or a positive integer")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if free:
    sizes[free[0]] = devices.size // fixed
  if math.prod(sizes.values()) == 1 and jax.process_count() == 1:
    devices = devices[:1]
  if math.prod(sizes.values()) != devices.size:
    raise InputError(
        "mesh", (data, fsdp, model), f"sizes whose product is {devices.size}, the devices"
    )
  return Partitioning(Mesh(devices.reshape(tuple(sizes.values())), MESH_AXES), rules)


def single_device(device=None) -> Partitioning:
  """A mesh of one device."""
  return make_partitioning(1, 1, 1, [jax.devices()[0] if device is None else device])
