"""Model folders: what is saved comes back bit for bit, and nothing else does."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

from devices import device_flags
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bpd_jax import checkpoints, folders
from bpd_jax.addons.folder import ADDON_FILE, load_heads, save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import (
    load_fingerprint,
    load_model,
    params_fingerprint,
    save_arrays,
    save_model,
)
from bpd_jax.errors import InputError
from bpd_jax.generation import load
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params, init_params
from bpd_jax.partitioning import single_device
from bpd_jax.vocabulary import vocabulary_path

CONFIG = ModelConfig(
    vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=2,
    num_decoder_layers=3, norm_epsilon=3e-6, dropout_rate=0.125,
)
HEADS = Heads(4, 24)
PLACE = single_device()
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG, PLACE, jax.random.key(0))


@pytest.fixture(scope="module")
def own():
  """Parameters of heads, none of them at a special value."""
  own = HEADS.begin(CONFIG, PLACE, jax.random.key(1))
  noise = jax.random.normal(jax.random.key(2), own["w2"].shape)
  return own | {"w2": jax.device_put(noise, own["w2"].sharding)}


@pytest.fixture
def saved(tmp_path, params, own):
  save_model_with(tmp_path / "model", CONFIG, params, None, HEADS, own)
  return tmp_path / "model"


def rewrite(folder, file=checkpoints.CONFIG_FILE, **fields):
  """Changes fields of model.json, or of another file."""
  path = folder / file
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite_params(folder, params):
  """Puts another tree in place of the folder's parameters."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / checkpoints.PARAMS_FOLDER, params, force=True)


def write_old(folder, params, own, **fields):
  """A folder of before, when heads were the model's: its path.

  Args:
    folder: to write.
    params: of the base.
    own: of its heads; none where there are none.
    **fields: of model.json, besides those of CONFIG and of the heads.
  """
  save_arrays(folder / "params", {**params, "heads": own} if own else params)
  sizes = {"block_size": 4 if own else 1, "head_d_ff": 24}
  (folder / "model.json").write_text(json.dumps(CONFIG.to_dict() | sizes | fields))
  return folder


def assert_same(found, expected):
  """Same names, dtypes and bits."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("as_numpy", [False, True])
def test_round_trip_is_bitwise(tmp_path, params, as_numpy):
  tree = jax.tree.map(np.asarray, params) if as_numpy else params
  vocabulary = tmp_path / "some.model"
  vocabulary.write_bytes(b"pieces")
  save_model(tmp_path / "new" / "model", CONFIG, tree, vocabulary)
  config, restored = load_model(tmp_path / "new" / "model", PLACE)
  assert config == CONFIG
  assert_same(restored, params)
  target = abstract_params(CONFIG, PLACE)
  for leaf, abstract in zip(jax.tree.leaves(restored), jax.tree.leaves(target)):
    assert isinstance(leaf, jax.Array)
    assert leaf.sharding == abstract.sharding
  assert vocabulary_path(tmp_path / "new" / "model").read_bytes() == b"pieces"
  assert sorted(os.listdir(tmp_path / "new")) == ["model"]


def test_restored_parameters_can_be_donated(saved, params):
  expected = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params)
  _, restored = load_model(saved, PLACE)
  add_one = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
  assert_same(add_one(restored), expected)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(restored))
  _, again = load_model(saved, PLACE)
  assert_same(again, params)


def test_dtype_converts_config_and_parameters(saved, params):
  config, restored = load_model(saved, PLACE, "bfloat16")
  assert config == CONFIG.with_dtype("bfloat16")
  assert_same(restored, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
  with jax.enable_x64(True):
    config, restored = load_model(saved, PLACE, "float64")
    assert config.accum_dtype == "float64"
    assert_same(restored, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params))
  with pytest.raises(InputError, match="jax_enable_x64"):
    load_model(saved, PLACE, "float64")


def test_wrong_shape_names_the_leaf(saved):
  rewrite(saved, d_ff=48)
  with pytest.raises(InputError) as caught:
    load_model(saved, PLACE)
  assert str(caught.value) == (
      "decoder/layers/mlp/wi_0 shape = (3, 16, 32): allowed is (3, 16, 48), from the config"
  )


@pytest.mark.parametrize("is_old", [False, True])
def test_number_of_heads_is_checked(tmp_path, saved, params, own, is_old):
  folder = saved
  if is_old:
    folder = write_old(tmp_path / "old", params, own, block_size=5)
  else:
    rewrite(saved / "addons/heads", ADDON_FILE, config={"block_size": 5, "d_ff": 24})
  name = "heads/w1" if is_old else "w1"
  with pytest.raises(InputError, match=rf"^{name} shape = \(3, 16, 24\): .*\(4, 16, 24\)"):
    load(folder)


def test_missing_and_unused_leaves_are_named(saved, params, own):
  rewrite_params(saved, {**params, "heads": own})
  with pytest.raises(InputError, match=r"^heads/w1 = 'unused array of shape \(3, 16, 24\)'"):
    load_model(saved, PLACE)
  rewrite(saved, block_size=1)
  with pytest.raises(InputError, match=r"^heads/w1 = 'unused array of shape \(3, 16, 24\)'"):
    load_model(saved, PLACE)
  rewrite_params(saved, params)
  rewrite_params(saved / "addons/heads", {"w1": own["w1"]})
  with pytest.raises(InputError, match=r"^w2 = 'missing'.*\(3, 24, 16\)"):
    load(saved)
  rewrite_params(saved / "addons/heads", {**own, "w3": own["w1"]})
  with pytest.raises(InputError, match=r"^w3 = 'unused array of shape \(3, 16, 24\)'"):
    load(saved)
  rewrite_params(saved, {**params, "encoder": {
      name: leaf for name, leaf in params["encoder"].items() if name != "norm"
  }})
  with pytest.raises(InputError, match=r"^encoder/norm/scale = 'missing'.*\(16,\)"):
    load_model(saved, PLACE)


def test_save_refuses_an_existing_folder(saved, params):
  changed = jax.tree.map(lambda leaf: leaf + 1, params)
  with pytest.raises(InputError, match="nothing is yet"):
    save_model(saved, CONFIG, changed)
  assert_same(load_model(saved, PLACE)[1], params)
  (saved.parent / "empty").mkdir()
  with pytest.raises(InputError, match="nothing is yet"):
    save_model(saved.parent / "empty", CONFIG, params)


def test_save_refuses_parameters_of_another_config(tmp_path, params):
  with pytest.raises(InputError, match="decoder/layers/mlp/wi_0 shape"):
    save_model(tmp_path / "model", CONFIG.replace(d_ff=8), params)
  with pytest.raises(InputError, match="vocabulary_file"):
    save_model(tmp_path / "model", CONFIG, params, tmp_path / "absent.model")
  assert not os.listdir(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with checkpoints.new_folder(tmp_path / "model") as partial:
      (partial / "half").write_text("x")
      raise KeyboardInterrupt
  assert not os.listdir(tmp_path)


def test_finished_files_outlive_a_cut(tmp_path):
  def go_on(identity, ends, wanted):
    try:
      with folders.resumable_folder(tmp_path / "results", identity) as partial:
        assert {path.name for path in partial.glob("[!.]*")} == wanted
        if identity["seed"]:
          (partial / f"part {len(wanted)}").write_text("x")
        if not ends:
          raise KeyboardInterrupt
    except KeyboardInterrupt:
      assert not (tmp_path / "results").exists()

  go_on({"seed": 1}, False, set())
  go_on({"seed": 1}, False, {"part 0"})
  # Another identity is refused, and takes nothing away.
  with pytest.raises(InputError, match="^seed = 2: allowed is 1, as when .*/results was begun; to "
                     r"begin anew, remove .*/\.results\.partial$"):
    go_on({"seed": 2}, False, set())
  with pytest.raises(InputError, match="^more.x = 3: allowed is None, as when"):
    go_on({"seed": 1, "more": {"x": 3}}, False, set())
  go_on({"seed": 1}, True, {"part 0", "part 1"})
  assert sorted(os.listdir(tmp_path / "results")) == ["part 0", "part 1", "part 2"]
  with pytest.raises(InputError, match="a path where nothing is yet"):
    go_on({"seed": 1}, True, set())
  shutil.rmtree(tmp_path / "results")
  go_on({"seed": 0}, False, set())  # Nothing was written.
  assert not os.listdir(tmp_path)


def test_a_folder_is_one_processs_and_replaces_nothing_that_came_meanwhile(tmp_path):
  folder = tmp_path / "results"
  with folders.resumable_folder(folder, {"seed": 1}) as partial:
    (partial / "part").write_text("x")
    with pytest.raises(InputError, match="^folder = .*: allowed is one that no other process"):
      with folders.resumable_folder(folder, {"seed": 1}):
        pass
  assert os.listdir(folder) == ["part"]
  for make in (lambda: folders.new_folder(tmp_path / "new"),
               lambda: folders.resumable_folder(tmp_path / "new", {})):
    with pytest.raises(InputError, match="a path where nothing is yet"):
      with make() as partial:
        (partial / "mine").write_text("x")
        (tmp_path / "new").mkdir()
        (tmp_path / "new/theirs").write_text("y")
    assert os.listdir(tmp_path / "new") == ["theirs"]
    shutil.rmtree(tmp_path / "new")


def test_what_is_wrong_beside_a_vocabulary_is_named(tmp_path, params):
  (tmp_path / "words").mkdir()
  vocabulary = tmp_path / "words/spiece.model"
  shutil.copyfile(ROOT / "bpd_jax/data/files/docstrings.model", vocabulary)
  (tmp_path / "words/tokenizer_config.json").write_text('{"extra_ids": 500}')
  with pytest.raises(InputError, match=r"^.*tokenizer_config\.json extra_ids = 500: allowed is 0"):
    save_model(tmp_path / "model", CONFIG, params, vocabulary)
  assert not (tmp_path / "model").exists()


def test_unwritable_place_is_an_input_error(tmp_path, params):
  (tmp_path / "file").write_text("x")
  with pytest.raises(InputError, match="^folder = .*a path that can be written"):
    save_model(tmp_path / "file" / "model", CONFIG, params)


def test_missing_parts_are_input_errors(saved):
  with pytest.raises(InputError, match="model folder = .*absent"):
    load_model(saved.parent / "absent", PLACE)
  os.rename(saved / "params", saved / "elsewhere")
  with pytest.raises(InputError, match="^params = .*Orbax"):
    load_model(saved, PLACE)
  (saved / "params").mkdir()
  with pytest.raises(InputError, match="^params = .*Orbax"):
    load_model(saved, PLACE)
  os.remove(saved / "model.json")
  with pytest.raises(InputError, match=r"model\.json"):
    load_model(saved, PLACE)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "JSON"),
        ("[1]", "a JSON object"),
        ('{"d_modell": 3}', "ModelConfig.d_modell = 3"),
        ('{"dropout_rate": "much"}', "a ModelConfig's fields and types"),
        ('{"d_model": 2.5}', "ModelConfig.d_model = 2.5"),
    ],
)
def test_bad_model_json_is_one_line(saved, text, message):
  (saved / "model.json").write_text(text)
  with pytest.raises(InputError) as caught:
    load_model(saved, PLACE)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


ON_A_MESH = """
import sys
import jax, numpy as np
from bpd_jax.addons.folder import save_model_with
from bpd_jax.checkpoints import load_model
from bpd_jax.errors import InputError
from bpd_jax.generation import load
from bpd_jax.model.model import abstract_params
from bpd_jax.partitioning import make_partitioning

place = make_partitioning(data=2, fsdp=2, model=2)
is_same = lambda a, b: a.sharding == b.sharding
for folder, back in zip(sys.argv[1:3], sys.argv[3:5]):
  model = load(folder, partitioning=place)
  config, (heads, own) = model.config, model.own_heads
  assert jax.tree.all(jax.tree.map(is_same, model.params, abstract_params(config, place)))
  assert jax.tree.all(jax.tree.map(is_same, own, heads.abstract(config, place)))
  assert {shard.data.shape for shard in own["w1"].addressable_shards} == {(3, 8, 12)}
  print(model.fingerprint)
  save_model_with(back, config, model.params, None, heads, own)
try:
  load_model(sys.argv[1], make_partitioning(data=1, fsdp=1, model=8))
except InputError as error:
  print(error)
try:
  load_model(sys.argv[5], place)
except InputError as error:
  print(error)
"""


def test_folders_load_on_a_mesh_and_back(saved, params, own, tmp_path):
  # A vocabulary of 63 doesn't divide over two devices.
  odd = CONFIG.replace(vocab_size=63)
  save_model(tmp_path / "odd", odd, init_params(odd, PLACE, jax.random.key(0)))
  old = write_old(tmp_path / "old", params, own)
  backs = [tmp_path / "back", tmp_path / "old_back"]
  flags = {"XLA_FLAGS": device_flags(8), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
      [sys.executable, "-c", ON_A_MESH, saved, old, *backs, tmp_path / "odd"],
      cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr
  *fingerprints, joined, vocabulary = done.stdout.splitlines()
  assert fingerprints == [params_fingerprint(params)] * 2
  assert joined == (
      "decoder/relpos_bias/rel_embedding shape = (2, 32): "
      "allowed is multiples of 8 on the mesh axes ('model',)"
  )
  assert vocabulary.startswith("embedding shape = (63, 16): allowed is multiples of 2")
  for back in map(load, backs):
    assert back.own_heads[0] == HEADS
    assert_same((back.params, back.own_heads[1]), (params, own))


# Of float32 the bits are those that were written; in float16 the fingerprint stays.
@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("has_fingerprint", [False, True])
def test_a_folder_of_before_is_read_alike(tmp_path, saved, params, own, dtype, has_fingerprint):
  known = {"fingerprint": load_fingerprint(saved)} if has_fingerprint else {}
  old = write_old(tmp_path / "old", params, own, **known)
  (config, base), (old_config, old_base) = (load_model(x, PLACE, dtype) for x in (saved, old))
  assert old_config == config
  assert_same(old_base, base)
  model, old_model = (load(x, dtype=dtype) for x in (saved, old))
  assert old_model.config == config
  assert_same(old_model.params, model.params)
  assert old_model.fingerprint == model.fingerprint == params_fingerprint(params)
  for folder in (saved, old):
    for found in (old_model.own_heads, load_heads(folder, old_model), load_heads(folder, model)):
      assert found[0] == HEADS
      assert_same(found[1], jax.tree.map(lambda leaf: leaf.astype(config.param_dtype), own))


@pytest.mark.parametrize("is_old", [False, True])
def test_a_folder_without_heads_has_head_1(tmp_path, params, is_old):
  folder = tmp_path / "model"
  if is_old:
    write_old(folder, params, {})
  else:
    save_model_with(folder, CONFIG, params, None, Heads(1), {})
  model = load(folder)
  assert not (folder / "addons").exists()
  assert_same(model.params, params)
  assert model.own_heads == load_heads(folder, model) == (Heads(1), {})
  assert model.block_size == 1


def test_heads_of_another_base_are_refused(tmp_path, saved, params, own):
  other = jax.tree.map(lambda leaf: leaf + 1, params)
  save_model_with(tmp_path / "other", CONFIG, other, None, HEADS, own)
  shutil.rmtree(saved / "addons")
  shutil.copytree(tmp_path / "other/addons", saved / "addons")
  mine, theirs = params_fingerprint(params), params_fingerprint(other)
  assert mine != theirs
  with pytest.raises(InputError) as caught:
    load(saved)
  assert str(caught.value) == (
      f"{saved}/addons/heads base = {theirs!r}: allowed is {mine}, the model's fingerprint"
  )
  assert_same(load_model(saved, PLACE)[1], params)


def test_describe_counts(params, own):
  tree = {"base": params, "own": own}
  table = checkpoints.describe(tree, HEADS.describe(CONFIG))
  count = sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert f"parameters  {count:,}" in table
  assert f"{4 * count / 1e6:,.1f} MB of float32" in table
  assert "heads       4, 3 of them parallel heads of width 24" in table
