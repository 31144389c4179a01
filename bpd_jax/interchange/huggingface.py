"""Folders of transformers' T5ForConditionalGeneration, in and out.

Reads and writes `config.json` and safetensors of T5, T5 1.1, LM-adapted T5,
Flan-T5, mT5 and ByT5 without PyTorch. Parallel heads travel beside them in
`parallel_heads.safetensors`, which transformers doesn't look at.

Entry points: `import_model`, `export_model`.
"""

import math
from pathlib import Path
from typing import Any

from flax import traverse_util
import numpy as np
from safetensors import safe_open, SafetensorError
from safetensors.numpy import save_file

from bpd_jax.checkpoints import check_shapes, check_vocabulary, leaf_shapes, leaf_shapes_of
from bpd_jax.errors import InputError
from bpd_jax.folders import (
    check_new,
    local_path,
    new_folder,
    PathLike,
    read_object,
    write_object,
)
from bpd_jax.interchange.tokenizer import transformers_files
from bpd_jax.model.config import ModelConfig

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADS_FILE = "parallel_heads.safetensors"
MAX_SHARD_BYTES = 5_000_000_000

MODEL_TYPES = ("t5", "mt5")
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

# feed_forward_proj -> (is_gated, activation, dense_act_fn). Without a gate
# transformers' "gelu" is the exact one, which ModelConfig doesn't have.
FEED_FORWARDS = {
    "relu": (False, "relu", "relu"),
    "gelu_new": (False, "gelu", "gelu_new"),
    "silu": (False, "silu", "silu"),
    "gated-relu": (True, "relu", "relu"),
    "gated-gelu": (True, "gelu", "gelu_new"),
    "gated-gelu_new": (True, "gelu", "gelu_new"),
    "gated-silu": (True, "silu", "silu"),
}

# ModelConfig's special ids: the field in both files of transformers, and T5's default.
SPECIAL_IDS = {
    "pad_id": ("pad_token_id", 0),
    "eos_id": ("eos_token_id", 1),
    "start_id": ("decoder_start_token_id", None),
}

# Tensors that hold the same values: old folders repeat the embedding table.
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
LM_HEAD = "lm_head.weight"
# In some published folders, read by nothing; transformers skips it as well.
IGNORED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

_ENCODER_LAYER = {
    "layer.0.SelfAttention.q": "attention/query",
    "layer.0.SelfAttention.k": "attention/key",
    "layer.0.SelfAttention.v": "attention/value",
    "layer.0.SelfAttention.o": "attention/out",
    "layer.0.layer_norm": "pre_attention_layer_norm/scale",
    "layer.1.DenseReluDense.wi": "mlp/wi",
    "layer.1.DenseReluDense.wi_0": "mlp/wi_0",
    "layer.1.DenseReluDense.wi_1": "mlp/wi_1",
    "layer.1.DenseReluDense.wo": "mlp/wo",
    "layer.1.layer_norm": "pre_mlp_layer_norm/scale",
}
_DECODER_LAYER = {
    "layer.0.SelfAttention.q": "self_attention/query",
    "layer.0.SelfAttention.k": "self_attention/key",
    "layer.0.SelfAttention.v": "self_attention/value",
    "layer.0.SelfAttention.o": "self_attention/out",
    "layer.0.layer_norm": "pre_self_attention_layer_norm/scale",
    "layer.1.EncDecAttention.q": "encoder_decoder_attention/query",
    "layer.1.EncDecAttention.k": "encoder_decoder_attention/key",
    "layer.1.EncDecAttention.v": "encoder_decoder_attention/value",
    "layer.1.EncDecAttention.o": "encoder_decoder_attention/out",
    "layer.1.layer_norm": "pre_cross_attention_layer_norm/scale",
    "layer.2.DenseReluDense.wi": "mlp/wi",
    "layer.2.DenseReluDense.wi_0": "mlp/wi_0",
    "layer.2.DenseReluDense.wi_1": "mlp/wi_1",
    "layer.2.DenseReluDense.wo": "mlp/wo",
    "layer.2.layer_norm": "pre_mlp_layer_norm/scale",
}

# Where a tensor lives: the leaf's name, and the layer in its stack or None.
Place = tuple[str, int | None]


def import_model(folder: PathLike) -> tuple[ModelConfig, Any, dict[str, np.ndarray]]:
  """Reads a folder of transformers.

  Args:
    folder: with `config.json`, and `model.safetensors` or its index and shards.

  Returns:
    The config; the stored tree of parameters as numpy arrays of float32; and those of
    `bpd_jax.addons.heads.Heads`, `w1` and `w2`, where the folder has some.

  Raises:
    InputError: naming the file, field or tensor that isn't as it should be.
      Every shape is checked before anything is converted.
  """
  folder = local_path(folder, "folder")
  if not folder.is_dir():
    raise InputError("folder", str(folder), "a folder that exists")
  fields = read_object(folder / CONFIG_FILE)
  tensors = _open_weights(folder)
  heads = _open_heads(folder)
  embedding = next((name for name in EMBEDDINGS if name in tensors), None)
  if embedding is None:
    raise InputError(f"tensor {EMBEDDINGS[0]}", "missing", f"a tensor in {folder}")
  if len(_shape(tensors, embedding)) != 2:
    raise InputError(
        f"tensor {embedding} shape", _shape(tensors, embedding), "(vocabulary, d_model)"
    )
  is_tied = _is_tied(fields, tensors, embedding)
  config = _read_config(
      fields, folder,
      vocab_size=_shape(tensors, embedding)[0],
      is_tied=is_tied,
  )
  _check_heads(heads, config)
  expected = leaf_shapes_of(config)
  places = _tensor_places(config, expected)
  places = {embedding: places.pop(EMBEDDINGS[0]), **places}
  if not is_tied and LM_HEAD not in tensors:
    places.pop(LM_HEAD)
  _check_tensors(tensors, places, expected)
  leaves = {name: np.empty(shape, np.float32) for name, shape in expected.items()}
  for name, (leaf, layer) in places.items():
    out = leaves[leaf] if layer is None else leaves[leaf][layer]
    out[...] = _turn(leaf, _read(tensors, name))
  if not is_tied and LM_HEAD not in tensors:
    leaves["logits_kernel"][...] = leaves["embedding"].T
  own = {name: _read(heads, name).astype(np.float32) for name in heads}
  return config, traverse_util.unflatten_dict(leaves, sep="/"), own


def export_model(
    folder: PathLike,
    config: ModelConfig,
    params: Any,
    vocabulary_file: PathLike | None = None,
    *,
    heads: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a folder that transformers' T5ForConditionalGeneration reads.

  Args:
    folder: a path that doesn't exist yet; its parents are made.
    config: of the model.
    params: the stored tree; its dtype is the one written.
    vocabulary_file: of the model's vocabulary, see `transformers_files`.
    heads: parameters of parallel heads, which go beside in a file of their own.
    max_shard_bytes: tensors beyond this go to further files, with an index. A
      larger single tensor has a file for itself.

  Raises:
    InputError: where the folder exists, the parameters aren't the config's, or
      transformers can't be given the vocabulary's ids.
  """
  check_new(folder)
  expected = leaf_shapes_of(config)
  check_shapes(leaf_shapes(params), expected)
  vocabulary_file = check_vocabulary(vocabulary_file)
  texts = {} if vocabulary_file is None else transformers_files(vocabulary_file, config)
  if max_shard_bytes < 1:
    raise InputError("max_shard_bytes", max_shard_bytes, "a positive integer")
  leaves = traverse_util.flatten_dict(params, sep="/")
  places = _tensor_places(config, expected)
  sizes = {
      name: math.prod(_tensor_shape(expected, place)) * leaves[place[0]].dtype.itemsize
      for name, place in places.items()
  }
  shards = _split(sizes, max_shard_bytes)
  files = [WEIGHTS_FILE]
  if len(shards) > 1:
    files = [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
  with new_folder(folder) as partial:
    # One shard at a time: a large model isn't held twice.
    for file, names in zip(files, shards):
      tensors = {name: _tensor(leaves, places[name]) for name in names}
      save_file(tensors, partial / file, metadata={"format": "pt"})
    if len(shards) > 1:
      write_object(partial / INDEX_FILE, {
          "metadata": {"total_size": sum(sizes.values())},
          "weight_map": {name: file for file, names in zip(files, shards) for name in names},
      })
    if heads:
      heads = {name: np.asarray(leaf) for name, leaf in heads.items()}
      save_file(heads, partial / HEADS_FILE, metadata={"format": "pt"})
    write_object(partial / CONFIG_FILE, _config_fields(config, str(leaves["embedding"].dtype)))
    write_object(partial / GENERATION_FILE, _token_ids(config))
    for name, content in texts.items():
      (partial / name).write_bytes(content)


def _tensor_places(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Place]:
  """Where each of the model's tensors lives; `shapes` names the leaves there are."""
  places = {EMBEDDINGS[0]: ("embedding", None)}
  stacks = (
      ("encoder", config.num_encoder_layers, _ENCODER_LAYER),
      ("decoder", config.num_decoder_layers, _DECODER_LAYER),
  )
  for stack, num_layers, layer in stacks:
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    places[bias] = (f"{stack}/relpos_bias/rel_embedding", None)
    for i in range(num_layers):
      for name, leaf in layer.items():
        places[f"{stack}.block.{i}.{name}.weight"] = (f"{stack}/layers/{leaf}", i)
    places[f"{stack}.final_layer_norm.weight"] = (f"{stack}/norm/scale", None)
  places[LM_HEAD] = ("logits_kernel", None)
  return {name: place for name, place in places.items() if place[0] in shapes}


def _turn(leaf: str, array: np.ndarray) -> np.ndarray:
  """Between a leaf and its tensor, both ways: PyTorch's kernels are [out, in]."""
  return array if leaf == "embedding" else array.T


def _tensor_shape(shapes: dict[str, tuple[int, ...]], place: Place) -> tuple[int, ...]:
  """Shape that the tensor at a place has, from the leaves' shapes."""
  leaf, layer = place
  shape = shapes[leaf] if layer is None else shapes[leaf][1:]
  return shape if leaf == "embedding" else shape[::-1]


def _tensor(leaves: dict[str, Any], place: Place) -> np.ndarray:
  """The tensor at a place, ready to write."""
  leaf, layer = place
  array = np.asarray(leaves[leaf] if layer is None else leaves[leaf][layer])
  return np.ascontiguousarray(_turn(leaf, array))


def _split(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
  """Cuts the tensors, in order, into shards of at most `max_bytes`."""
  shards, filled = [[]], 0
  for name, size in sizes.items():
    if shards[-1] and filled + size > max_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  return shards


def _open_file(path: Path) -> dict[str, Any]:
  """The open file of every tensor in it, by the tensor's name."""
  try:
    file = safe_open(path, "np")
    return {name: file for name in file.keys()}
  except (SafetensorError, OSError) as error:
    raise InputError("file", str(path), f"a whole safetensors file ({error})") from error


def _open_weights(folder: Path) -> dict[str, Any]:
  """The open file of every tensor of a folder, by the tensor's name."""
  if (folder / WEIGHTS_FILE).is_file():
    return _open_file(folder / WEIGHTS_FILE)
  index = folder / INDEX_FILE
  if not index.is_file():
    raise InputError("folder", str(folder), f"a folder with {WEIGHTS_FILE} or {INDEX_FILE}")
  weight_map = read_object(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise InputError(f"{index} weight_map", weight_map, "an object of tensor names and files")
  tensors = {}
  for shard in sorted(set(map(str, weight_map.values()))):
    if shard != Path(shard).name or not (folder / shard).is_file():
      raise InputError(f"shard in {INDEX_FILE}", shard, f"a file in {folder}")
    tensors.update(_open_file(folder / shard))
  return tensors


def _open_heads(folder: Path) -> dict[str, Any]:
  """The open file of the heads' tensors; empty where the folder has none."""
  path = folder / HEADS_FILE
  if not path.is_file():
    return {}
  heads = _open_file(path)
  if sorted(heads) != ["w1", "w2"]:
    raise InputError(f"{HEADS_FILE} tensors", sorted(heads), "['w1', 'w2']")
  return heads


def _shape(tensors: dict[str, Any], name: str) -> tuple[int, ...]:
  return tuple(tensors[name].get_slice(name).get_shape())


def _read(tensors: dict[str, Any], name: str) -> np.ndarray:
  """One tensor, in the file's own dtype."""
  dtype = tensors[name].get_slice(name).get_dtype()
  if dtype not in FLOAT_DTYPES:
    raise InputError(f"tensor {name} dtype", dtype, f"one of {FLOAT_DTYPES}")
  return tensors[name].get_tensor(name)


def _check_tensors(
    tensors: dict[str, Any], places: dict[str, Place], shapes: dict[str, tuple[int, ...]]
) -> None:
  """Compares the tensors of a folder with the config's; nothing large is read."""
  for name, place in places.items():
    shape = _tensor_shape(shapes, place)
    if name not in tensors:
      raise InputError(f"tensor {name}", "missing", f"a tensor of shape {shape}")
    if _shape(tensors, name) != shape:
      raise InputError(
          f"tensor {name} shape", _shape(tensors, name), f"{shape}, from {CONFIG_FILE}"
      )
  unknown = sorted(set(tensors) - set(places) - {*EMBEDDINGS, LM_HEAD, IGNORED})
  if unknown:
    raise InputError(f"tensor {unknown[0]}", "unknown", f"the tensors of {CONFIG_FILE}'s model")
  present = [name for name in EMBEDDINGS if name in tensors]
  for name in present[1:]:
    if not _is_same(tensors, name, present[0]):
      raise InputError(f"tensor {name}", "other values", f"the values of {present[0]}")


def _is_same(tensors: dict[str, Any], one: str, other: str) -> bool:
  """Whether two tensors are equal."""
  return _shape(tensors, one) == _shape(tensors, other) and np.array_equal(
      _read(tensors, one), _read(tensors, other)
  )


def _is_tied(fields: dict[str, Any], tensors: dict[str, Any], embedding: str) -> bool:
  """Whether the output is the embedding table after a scale, as in T5 1.0.

  transformers 5 writes `tie_word_embeddings: true` for every model, ties where
  the folder has no other `lm_head.weight`, and scales by
  `scale_decoder_outputs`; before, `tie_word_embeddings` said both. mT5 never
  scales. What has no scale has an output kernel of its own here, a copy where
  the folder ties it.
  """
  ties = fields.get("tie_word_embeddings")
  is_scaled = fields.get("model_type") == "t5" and bool(
      fields.get("scale_decoder_outputs", ties is not False)
  )
  if is_scaled and LM_HEAD in tensors and not _is_same(tensors, LM_HEAD, embedding):
    raise InputError(
        f"{CONFIG_FILE} tie_word_embeddings", ties,
        f"false, as the values of {LM_HEAD} aren't those of {embedding}",
    )
  if ties is False and LM_HEAD not in tensors:
    raise InputError(f"tensor {LM_HEAD}", "missing", "a tensor, as tie_word_embeddings is false")
  return is_scaled


def _read_config(fields: dict[str, Any], folder: Path, **known: Any) -> ModelConfig:
  """`config.json` as a ModelConfig; `known` are the fields that tensors fix."""
  model_type = fields.get("model_type")
  if model_type not in MODEL_TYPES:
    raise InputError(f"{CONFIG_FILE} model_type", model_type, f"one of {MODEL_TYPES}")
  is_gated, activation = _read_feed_forward(fields, model_type)
  num_layers = _number(fields, "num_layers")
  d_ff = _number(fields, "d_ff")
  return ModelConfig(
      d_model=_number(fields, "d_model"),
      d_ff=d_ff,
      d_kv=_number(fields, "d_kv"),
      num_heads=_number(fields, "num_heads"),
      num_encoder_layers=num_layers,
      num_decoder_layers=_number(fields, "num_decoder_layers", num_layers),
      activation=activation,
      is_gated=is_gated,
      relpos_buckets=_number(fields, "relative_attention_num_buckets", 32),
      relpos_max_distance=_number(fields, "relative_attention_max_distance", 128),
      norm_epsilon=_number(fields, "layer_norm_epsilon", 1e-6, (int, float)),
      dropout_rate=_number(fields, "dropout_rate", 0.1, (int, float)),
      **_special_ids(fields, folder),
      **known,
  )


def _number(
    fields: dict[str, Any], name: str, default: Any = None, kinds: tuple[type, ...] = (int,)
) -> Any:
  """A number of `config.json`; null and absent are the default."""
  value = fields.get(name)
  if value is None:
    value = default
  if isinstance(value, bool) or not isinstance(value, kinds):
    kind = "a number" if float in kinds else "an integer"
    raise InputError(f"{CONFIG_FILE} {name}", value, kind)
  return value


def _read_feed_forward(fields: dict[str, Any], model_type: str) -> tuple[bool, str]:
  """Whether the feed-forward layers are gated, and their activation."""
  default = "gated-gelu" if model_type == "mt5" else "relu"
  kind = fields.get("feed_forward_proj", default)
  if not isinstance(kind, str) or kind not in FEED_FORWARDS:
    raise InputError(
        f"{CONFIG_FILE} feed_forward_proj", kind, f"one of {tuple(FEED_FORWARDS)}"
    )
  is_gated, activation, dense_act_fn = FEED_FORWARDS[kind]
  # transformers lets these two override feed_forward_proj.
  for name, value in (("is_gated_act", is_gated), ("dense_act_fn", dense_act_fn)):
    if fields.get(name, value) != value:
      raise InputError(
          f"{CONFIG_FILE} {name}", fields[name], f"{value!r}, as feed_forward_proj is {kind!r}"
      )
  return is_gated, activation


def _special_ids(fields: dict[str, Any], folder: Path) -> dict[str, int]:
  """pad_id, eos_id and start_id; InputError where the folder's two files differ.

  transformers generates by `generation_config.json`, and trains by `config.json`.
  """
  path = folder / GENERATION_FILE
  generation = read_object(path) if path.is_file() else {}
  ids = {}
  for name, (field, default) in SPECIAL_IDS.items():
    other = generation.get(field)
    # T5 starts from padding where nothing is said.
    default = ids["pad_id"] if default is None else default
    ids[name] = _number(fields, field, default if other is None else other)
    if other is not None and other != ids[name]:
      raise InputError(f"{GENERATION_FILE} {field}", other, f"{ids[name]}, as in {CONFIG_FILE}")
  return ids


def _check_heads(heads: dict[str, Any], config: ModelConfig) -> None:
  """Raises InputError where heads of a folder aren't of the model's width."""
  if not heads:
    return
  shape = _shape(heads, "w1")
  if len(shape) != 3 or 0 in shape or shape[1] != config.d_model:
    raise InputError(
        f"{HEADS_FILE} w1 shape", shape, f"(heads, {config.d_model}, width), from {CONFIG_FILE}"
    )
  turned = (shape[0], shape[2], shape[1])
  if _shape(heads, "w2") != turned:
    raise InputError(f"{HEADS_FILE} w2 shape", _shape(heads, "w2"), f"{turned}, from w1's")


def _token_ids(config: ModelConfig) -> dict[str, int]:
  return {field: getattr(config, name) for name, (field, _) in SPECIAL_IDS.items()}


def _config_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """The fields of `config.json`, read alike by transformers 4 and 5."""
  kinds = {(gated, act): kind for kind, (gated, act, _) in reversed(FEED_FORWARDS.items())}
  kind = kinds[config.is_gated, config.activation]
  return {
      "architectures": ["T5ForConditionalGeneration"],
      "model_type": "t5",
      "is_encoder_decoder": True,
      "vocab_size": config.vocab_size,
      "d_model": config.d_model,
      "d_ff": config.d_ff,
      "d_kv": config.d_kv,
      "num_heads": config.num_heads,
      "num_layers": config.num_encoder_layers,
      "num_decoder_layers": config.num_decoder_layers,
      "feed_forward_proj": kind,
      "is_gated_act": config.is_gated,
      "dense_act_fn": FEED_FORWARDS[kind][2],
      "tie_word_embeddings": config.is_tied,
      "relative_attention_num_buckets": config.relpos_buckets,
      "relative_attention_max_distance": config.relpos_max_distance,
      "layer_norm_epsilon": config.norm_epsilon,
      "dropout_rate": config.dropout_rate,
      **_token_ids(config),
      "dtype": dtype,
  }
