"""Folders of add-ons: `addon.json` and Orbax `params/`.

A folder says of which base its add-on is, by the fingerprint of its values, and whose ids
it reads. It is written whole or not at all. A model's folder may hold those of its own
add-ons in `addons/`, of which `heads` are read with the model.
"""

import dataclasses
import importlib
from pathlib import Path
import sys
from typing import Any
import weakref

import jax

from bpd_jax.addons.addon import Addon, Base, Made, make_addon
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import (
    check_shapes,
    leaf_shapes,
    old_heads,
    PARAMS_FOLDER,
    read_arrays,
    read_old_heads,
    save_arrays,
    save_model,
)
from bpd_jax.errors import brief, InputError
from bpd_jax.folders import (
    array_path,
    check_new,
    contents_fingerprint,
    local_path,
    new_folder,
    PathLike,
    read_object,
    write_object,
)
from bpd_jax.model.config import ModelConfig
from bpd_jax.partitioning import single_device
from bpd_jax.vocabulary import open_vocabulary

ADDON_FILE = "addon.json"
# In a model's folder; each of its add-ons lies there under its class's name.
ADDONS_FOLDER = "addons"
HEADS = "heads"


def save_addon(
    folder: PathLike, addon: Addon, own: Any, base: Base, *,
    recipe: dict[str, Any] | None = None, may_replace: bool = False,
) -> None:
  """Writes an add-on's folder.

  Args:
    folder: a path that doesn't exist yet; its parents are made.
    addon: its config.
    own: its parameters.
    base: the model that it was trained behind.
    recipe: what it was trained with, for the reader.
    may_replace: whether something may be at the path.

  Raises:
    InputError: where the folder exists, can't be written or isn't readable afterwards.
  """
  array_path(folder, "addon")
  _check(addon, own, base.config)
  if not may_replace:
    check_new(folder)
  # Where it isn't known, all processes find it out together.
  fingerprint = base.fingerprint
  try:
    with new_folder(folder, may_replace=may_replace) as partial:
      _write(
          partial, addon, own, base.config, fingerprint, base.vocabulary_fingerprint, recipe
      )
  except OSError as error:
    raise InputError(
        "folder", str(folder), f"a path that can be written ({brief(error)})"
    ) from error


def save_model_with(
    folder: PathLike, config: ModelConfig, params: Any, vocabulary_file: PathLike | None,
    addon: Addon, own: Any, *, recipe: dict[str, Any] | None = None, may_replace: bool = False,
) -> None:
  """Writes a model's folder with an add-on in it, both or neither.

  Args:
    folder, config, params, vocabulary_file, may_replace: see `save_model`.
    addon: its config.
    own: its parameters; where there are none, there is no folder of it.
    recipe: what the add-on was trained with.

  Raises:
    InputError: see `save_model` and `save_addon`.
  """
  _check(addon, own, config)
  words = None
  if vocabulary_file is not None:
    words = open_vocabulary(vocabulary_file, config.vocab_size).fingerprint

  def beside(partial: Path, fingerprint: str) -> None:
    place = partial / ADDONS_FOLDER / addon_name(addon)
    place.mkdir(parents=True, exist_ok=True)
    _write(place, addon, own, config, fingerprint, words, recipe)

  save_model(
      folder, config, params, vocabulary_file, may_replace=may_replace,
      beside=beside if jax.tree.leaves(own) else None,
  )


def kind_of(addon: Addon) -> str:
  """An add-on's class as `module:Class`; InputError where nobody else could import it."""
  kind = f"{type(addon).__module__}:{type(addon).__qualname__}"
  if kind.startswith("__main__:") or "<" in kind:
    raise InputError("addon", kind, "of a class of a module that other processes can import")
  return kind


def addon_name(addon: Addon) -> str:
  """What an add-on's folder in a model is called; InputError where it would be the heads'."""
  name = type(addon).__name__.lower()
  if name == HEADS and not isinstance(addon, Heads):
    raise InputError("addon", kind_of(addon), "of a class of another name")
  return name


def own_addon(folder: PathLike, name: str) -> Path:
  """Where a model's folder has its own add-on of a name, if it does."""
  return local_path(folder, "model folder") / ADDONS_FOLDER / name


def _check(addon: Addon, own: Any, config: ModelConfig) -> None:
  """Raises InputError where nobody could read what is to be written."""
  kind_of(addon)
  wanted = addon.abstract(config.with_dtype("float32"), single_device())
  check_shapes(leaf_shapes(own), leaf_shapes(wanted))


def _write(
    partial: Path, addon: Addon, own: Any, config: ModelConfig, fingerprint: str,
    vocabulary: str | None, recipe: dict[str, Any] | None,
) -> None:
  """Fills a folder."""
  save_arrays(partial / PARAMS_FOLDER, own)
  if jax.process_index() == 0:
    write_object(partial / ADDON_FILE, {
        "kind": kind_of(addon),
        "config": dataclasses.asdict(addon),
        "needs": {"base": fingerprint},
        "vocabulary": vocabulary, "d_model": config.d_model,
        "vocab_size": config.vocab_size, "recipe": recipe or {},
    })


def load_heads(folder: PathLike, base: Base) -> tuple[Heads, Any]:
  """The parallel heads of a model's folder; a folder of before has them among its arrays.

  Returns:
    The add-on and its parameters; `Heads(1)`, which has none, where the folder has none.

  Raises:
    InputError: see `load_addon`.
  """
  path = own_addon(folder, HEADS)
  if path.is_dir():
    addon, own = load_addon(path, base)
    if not isinstance(addon, Heads):
      raise InputError(f"{path} kind", kind_of(addon), kind_of(Heads(1)))
    return addon, own
  old = old_heads(folder)
  if old is None:
    return Heads(1), {}
  heads = Heads(*old)
  target = heads.abstract(base.config, base.partitioning)
  base.partitioning.check_params(target)
  return heads, read_old_heads(folder, target)


def load_addon(folder: PathLike, base: Base) -> tuple[Addon, Any]:
  """Reads an add-on of a model.

  Args:
    folder: from `save_addon`.
    base: the model that it was trained behind.

  Returns:
    The add-on, and its parameters where the base's mesh wants them.

  Raises:
    InputError: naming the file or field that isn't as it should be: an unknown kind or
      field, another base, width or vocabulary, arrays that are cut short.
  """
  path = local_path(folder, "addon")
  if not path.is_dir():
    raise InputError("addon", str(folder), "a folder that exists")
  found = read_object(path / ADDON_FILE)
  addon = _read_addon(path / ADDON_FILE, found)
  for field, mine in (
      ("d_model", base.config.d_model), ("vocab_size", base.config.vocab_size),
      ("vocabulary", base.vocabulary_fingerprint),
  ):
    if found.get(field) != mine:
      raise InputError(f"{path} {field}", found.get(field), f"{mine}, the model's")
  needed = (found.get("needs") or {}).get("base")
  if needed != base.fingerprint:
    raise InputError(f"{path} base", needed, f"{base.fingerprint}, the model's fingerprint")
  target = addon.abstract(base.config, base.partitioning)
  base.partitioning.check_params(target)
  return addon, read_arrays(array_path(folder, "addon") / PARAMS_FOLDER, target)


def load_made(
    folder: PathLike, base: Base, block_size: int | None = None, top_k: int = 1
) -> Made:
  """`load_addon`, ready to decode behind its base; read once for all who ask.

  Raises:
    InputError: see `load_addon` and `Addon.make`.
  """
  # By the contents, as another add-on may come to lie there.
  key = (str(folder), contents_fingerprint(folder, "addon"), block_size, top_k)
  made = _MADE.setdefault(base, {})
  if key not in made:
    made[key] = make_addon(*load_addon(folder, base), base, block_size, top_k)
  return made[key]


# Of each model what was loaded behind it, which goes when it goes.
_MADE: weakref.WeakKeyDictionary[Base, dict[Any, Made]] = weakref.WeakKeyDictionary()


def _read_addon(path: Path, found: dict[str, Any]) -> Addon:
  """The add-on that a file describes; its kind's module is imported."""
  kind = found.get("kind")
  try:
    module, _, name = kind.partition(":")
    kind_class = importlib.import_module(module)
    for part in name.split("."):
      kind_class = getattr(kind_class, part)
    is_addon = issubclass(kind_class, Addon) and dataclasses.is_dataclass(kind_class)
  except (AttributeError, ImportError, TypeError, ValueError) as error:
    raise InputError(f"{path} kind", kind, f"module:Class of an add-on ({error})") from error
  if not is_addon:
    raise InputError(f"{path} kind", kind, "module:Class of an add-on")
  fields = [field.name for field in dataclasses.fields(kind_class)]
  config = found.get("config", {})
  for name in config:
    if name not in fields:
      raise InputError(f"{path} config.{name}", config[name], f"one of the fields {fields}")
  as_tuple = lambda x: tuple(map(as_tuple, x)) if isinstance(x, list) else x
  try:
    return kind_class(**{name: as_tuple(value) for name, value in config.items()})
  except TypeError as error:
    raise InputError(f"{path} config", config, f"all of the fields {fields}") from error


def addon_source(folder: PathLike) -> str:
  """The file of the module that an add-on's class is from.

  Raises:
    InputError: where the folder isn't an add-on's, or its module has no file.
  """
  path = local_path(folder, "addon") / ADDON_FILE
  addon = _read_addon(path, read_object(path))
  source = getattr(sys.modules[type(addon).__module__], "__file__", None)
  if source is None:
    raise InputError(f"{path} kind", type(addon).__module__, "a module of a file")
  return source
