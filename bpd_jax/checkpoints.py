"""Model folders: `model.json`, Orbax `params/`, an optional vocabulary; add-ons may lie beside.

`save_model` writes a folder whole or not at all; `load_model` restores every
parameter straight into its sharding, after comparing what is on disk with what
`model.json` asks for. Both take a path on a local disk, without characters of patterns.
"""

from collections.abc import Callable
import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bpd_jax.errors import brief, InputError
from bpd_jax.folders import (
    array_path,
    check_new,
    local_path,
    new_folder,
    PathLike,
    read_object,
    write_object,
)
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params
from bpd_jax.partitioning import Partitioning, single_device
from bpd_jax.vocabulary import copy_vocabulary

CONFIG_FILE = "model.json"
PARAMS_FOLDER = "params"
# Of the base, beside the config's fields; folders of before have none.
FINGERPRINT = "fingerprint"
# A folder of before had parallel heads among its parameters, under this name, and their h
# and width among the config's fields, with these defaults.
HEADS = "heads"
OLD_HEADS = {"block_size": 1, "head_d_ff": 1024}


def save_model(
    folder: PathLike, config: ModelConfig, params: Any, vocabulary_file: PathLike | None = None,
    *, may_replace: bool = False, beside: Callable[[Path, str], None] | None = None,
) -> None:
  """Writes a model folder.

  Args:
    folder: a path that doesn't exist yet; its parents are made.
    config: of the model.
    params: the stored tree, numpy or jax arrays.
    vocabulary_file: a SentencePiece model, a tokenizer.json, or ByT5's
      tokenizer_config.json, to copy into the folder.
    may_replace: whether something may be at the path, which stays until the new
      folder is whole.
    beside: writes what else belongs there, given the folder in the making and the base's
      fingerprint; called by every process.

  Raises:
    InputError: where the folder exists, can't be written or isn't readable afterwards,
      or the parameters aren't the config's.
  """
  array_path(folder)
  if not may_replace:
    check_new(folder)
  check_shapes(leaf_shapes(params), leaf_shapes_of(config))
  vocabulary_file = check_vocabulary(vocabulary_file)
  fingerprint = params_fingerprint(params)
  with new_folder(folder, may_replace=may_replace) as partial:
    save_arrays(partial / PARAMS_FOLDER, params)
    if jax.process_index() == 0:
      try:
        write_object(partial / CONFIG_FILE, config.to_dict() | {FINGERPRINT: fingerprint})
        if vocabulary_file is not None:
          copy_vocabulary(vocabulary_file, partial)
      except OSError as error:
        raise InputError(
            "folder", str(folder), f"a path that can be written ({brief(error)})"
        ) from error
    if beside is not None:
      beside(partial, fingerprint)


def save_arrays(folder: Path, arrays: Any) -> None:
  """Writes dicts of arrays by Orbax, and reads one of them again.

  Raises:
    InputError: where the folder can't be written, or isn't readable afterwards.
  """
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder, arrays)
    name, leaf = min(_flatten(arrays).items(), key=lambda item: item[1].size)
    read_back(folder, traverse_util.unflatten_dict({name: leaf}, sep="/"))
  except InputError:
    raise
  except (OSError, ValueError) as error:  # TensorStore's are ValueErrors.
    raise InputError(
        "folder", str(folder), f"a path that can be written ({brief(error)})"
    ) from error


def read_arrays(folder: Path, target: Any, *, is_part: bool = False) -> Any:
  """Reads what `save_arrays` wrote, each array into its place.

  Args:
    folder: of the arrays.
    target: dicts of `jax.ShapeDtypeStruct` with shardings.
    is_part: whether the folder's outermost dict may hold more, which isn't read.

  Raises:
    InputError: naming the array that is missing or of another shape; where the folder is
      cut short.
  """
  with ocp.PyTreeCheckpointer() as checkpointer:
    found = _shapes_on_disk(checkpointer, folder)
    if is_part:
      found = {name: shape for name, shape in found.items() if name.split("/")[0] in target}
    check_shapes(found, leaf_shapes(target))
    try:
      return checkpointer.restore(folder, ocp.args.PyTreeRestore(
          item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target),
          partial_restore=is_part,
      ))
    except Exception as error:  # Orbax raises a bare Exception for arrays that are cut.
      raise InputError("params", str(folder), f"a whole Orbax folder ({brief(error)})") from error


def load_config(folder: PathLike) -> ModelConfig:
  """Reads `model.json` of a model folder; InputError where it doesn't hold a config."""
  folder = local_path(folder, "model folder")
  if not folder.is_dir():
    raise InputError("model folder", str(folder), "a folder that exists")
  path = folder / CONFIG_FILE
  if not path.is_file() and (folder / "config.json").is_file():
    raise InputError(
        "model folder", str(folder),
        "a model folder; python -m bpd_jax.import_checkpoint makes one of transformers'",
    )
  fields = read_object(path)
  for name in (FINGERPRINT, *OLD_HEADS):
    fields.pop(name, None)
  try:
    return ModelConfig.from_dict(fields)
  except InputError:
    raise
  except (TypeError, ValueError) as error:
    raise InputError(str(path), str(error), "a ModelConfig's fields and types") from error


def load_model(
    folder: PathLike, partitioning: Partitioning, dtype: str | None = None
) -> tuple[ModelConfig, Any]:
  """Reads a model folder.

  Args:
    folder: from `save_model`.
    partitioning: where the parameters go; each device reads its own part.
    dtype: to store and compute everything in, instead of the folder's.

  Returns:
    The config, and the parameters as jax arrays of `config.param_dtype`.

  Raises:
    InputError: naming the file, field or leaf that isn't as it should be.
  """
  config = load_config(folder)
  if dtype is not None:
    config = config.with_dtype(dtype)
  if config.param_dtype == "float64" and not jax.config.jax_enable_x64:
    raise InputError(
        "param_dtype", "float64", "bfloat16, float16 or float32 unless jax_enable_x64 is on"
    )
  target = abstract_params(config, partitioning)
  partitioning.check_params(target)
  path = array_path(folder, "model folder") / PARAMS_FOLDER
  return config, read_arrays(path, target, is_part=old_heads(folder) is not None)


def old_heads(folder: PathLike) -> tuple[int, int] | None:
  """h and width of the heads among a folder's parameters; None where there are none."""
  fields = read_object(local_path(folder, "model folder") / CONFIG_FILE)
  block_size, width = (fields.get(name, default) for name, default in OLD_HEADS.items())
  return (block_size, width) if isinstance(block_size, int) and block_size > 1 else None


def read_old_heads(folder: PathLike, target: Any) -> Any:
  """Those heads' arrays, see `read_arrays`."""
  path = array_path(folder, "model folder") / PARAMS_FOLDER
  return read_arrays(path, {HEADS: target}, is_part=True)[HEADS]


def read_back(folder: Path, part: Any) -> None:
  """Proves that what Orbax wrote is readable, by some of its arrays.

  Of some paths Orbax says that all is well and writes what nobody can open. What opens one
  array of a folder opens the others, so a small one will do.

  Args:
    folder: of the arrays.
    part: some of what was written, in dicts of dicts.

  Raises:
    InputError: where an array can't be read, or isn't what was written.
  """
  places = jax.tree.map(
      lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding) if isinstance(leaf, jax.Array)
      else ocp.RestoreArgs(restore_type=np.ndarray),
      part,
  )
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), part)
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      found = checkpointer.restore(folder, ocp.args.PyTreeRestore(
          item=shapes, restore_args=places, partial_restore=True
      ))
  except Exception as error:  # Orbax raises a bare Exception for arrays that are cut.
    raise InputError(
        "folder", str(folder), f"a path that can be read back ({brief(error)})"
    ) from error
  for wanted, leaf in zip(jax.tree.leaves(part), jax.tree.leaves(found)):
    # Of arrays on several hosts each sees its own part.
    if getattr(wanted, "is_fully_addressable", True) and (
        np.asarray(wanted).tobytes() != np.asarray(leaf).tobytes()
    ):
      raise InputError("folder", str(folder), "a path that keeps what is written there")


def load_fingerprint(folder: PathLike) -> str | None:
  """The base's fingerprint as a model folder has it; None where it was made before."""
  return read_object(local_path(folder, "model folder") / CONFIG_FILE).get(FINGERPRINT)


def params_fingerprint(params: Any) -> str:
  """Sixteen hexadecimal digits of the values of parameters, wherever they lie.

  Each leaf is reduced where it lies, in whole numbers, so that no sharding and no order
  of sums makes a difference; and a leaf of bfloat16 and its copy in float32 are the same.

  Args:
    params: a tree of dicts.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(_flatten(params).items()):
    is_here = isinstance(leaf, np.ndarray) or (
        leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu"
    )
    # What the host has anyway compiles nothing.
    sums = _leaf_sums(np, np.asarray(leaf)) if is_here else _device_sums(leaf)
    digest.update(f"{name} {tuple(leaf.shape)} ".encode() + np.asarray(sums, np.uint32).tobytes())
  return digest.hexdigest()[:16]


def _leaf_sums(xp: ModuleType, leaf: Any) -> list[Any]:
  """Four uint32 of a leaf: sums over its bits, each mixed with its place."""
  uint32 = xp.uint32
  wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
  bits = wide.view(uint32)
  place = xp.ones([1] * bits.ndim, uint32)
  for axis, size in enumerate(bits.shape):  # Not flattened, which would gather what is split.
    along = xp.arange(size, dtype=uint32).reshape([-1] + [1] * (bits.ndim - axis - 1))
    place = place * uint32(size) + along
  place = place * uint32(0x9E3779B1)
  sums = []
  for salt in (0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1):
    x = bits + (place ^ uint32(salt))
    for multiplier in (0x7FEB352D, 0x846CA68B):
      x = (x ^ (x >> uint32(16))) * uint32(multiplier)
    sums.append((x ^ (x >> uint32(16))).sum(dtype=uint32))
  return sums


_device_sums = jax.jit(lambda leaf: jnp.stack(_leaf_sums(jnp, leaf)))


def check_vocabulary(path: PathLike | None) -> Path | None:
  """The path of a vocabulary that was given; InputError where it isn't a file."""
  if path is None:
    return None
  found = local_path(path, "vocabulary_file")
  if not found.is_file():
    raise InputError("vocabulary_file", str(path), "a file that exists")
  return found


def describe(params: Any, heads: str) -> str:
  """A table of what a model holds: parameters, size, and what is said of its heads."""
  leaves = jax.tree.leaves(params)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
  return "\n".join([
      f"parameters  {sum(leaf.size for leaf in leaves):,}",
      f"size        {size / 1e6:,.1f} MB of {dtypes}",
      f"heads       {heads}",
  ])


def leaf_shapes(params: Any) -> dict[str, tuple[int, ...]]:
  """Shape of every leaf by its name, "decoder/layers/mlp/wi_0"."""
  return {name: tuple(leaf.shape) for name, leaf in _flatten(params).items()}


def leaf_shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """`leaf_shapes` of a config's parameters."""
  # The shapes don't depend on the dtype, and float64 needs a flag of JAX's.
  return leaf_shapes(abstract_params(config.with_dtype("float32"), single_device()))


def check_shapes(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
  """Compares two `leaf_shapes`; InputError naming the first leaf that differs."""
  for name, shape in expected.items():
    if name not in found:
      raise InputError(f"{name}", "missing", f"an array of shape {shape}")
    if found[name] != shape:
      raise InputError(f"{name} shape", found[name], f"{shape}, from the config")
  for name, shape in found.items():
    if name not in expected:
      raise InputError(f"{name}", f"unused array of shape {shape}", "a leaf of the config")


def _flatten(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _shapes_on_disk(checkpointer, path: Path) -> dict[str, tuple[int, ...]]:
  """`leaf_shapes` of an Orbax folder, from its metadata alone."""
  try:
    metadata = checkpointer.metadata(path).item_metadata
  except (OSError, ValueError) as error:
    raise InputError("params", str(path), "an Orbax folder with metadata") from error
  if metadata is None:
    raise InputError("params", str(path), "an Orbax folder with metadata")
  return leaf_shapes(metadata.tree)
