"""The model: causal, blind to padding, and the same however it is called."""

import functools
import json
from pathlib import Path

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpd_jax.addons.addon import ADDON_VIEW
from bpd_jax.addons.heads import Heads, HeadsReader
from bpd_jax.decoding import tree as trees
from bpd_jax.decoding.types import Params, Tree
from bpd_jax.errors import InputError
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import decode_view, EncoderDecoder, init_boxed, init_params
from bpd_jax.partitioning import single_device

PLACE = single_device()
T5_1_1 = ModelConfig(
    vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_encoder_layers=2,
    num_decoder_layers=3, relpos_buckets=8, relpos_max_distance=20,
)
HEADS = Heads(3, 12)
CONFIGS = {
    "t5_1_1": T5_1_1,
    "t5": T5_1_1.replace(activation="relu", is_gated=False, is_tied=True),
}
GOLDEN = Path(__file__).parent / "testdata" / "parameters.json"


def program(config, is_view=False):
  """run(params, method, *inputs): a method of the model, compiled once for each shape."""
  model = EncoderDecoder(config, PLACE, is_view)
  apply = lambda method, params, *inputs: model.apply({"params": params}, *inputs, method=method)
  compiled = jax.jit(apply, static_argnums=0)
  return lambda params, method, *inputs: compiled(method, params, *inputs)


@pytest.fixture(scope="module", params=CONFIGS)
def setup(request):
  """A float64 config, its methods and parameters of which none is at a special value."""
  with jax.enable_x64(True):
    config = CONFIGS[request.param].with_dtype("float64")
    rng = np.random.default_rng(1)
    params = init_params(config, PLACE, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape), params)
    yield config, program(config), params


@pytest.fixture(scope="module")
def rows():
  rng = np.random.default_rng(2)
  mask = np.arange(7) < np.array([[7], [3]])
  return rng.integers(2, 40, [2, 7]), mask, rng.integers(2, 40, [2, 10])


def test_seeds_give_what_they_always_gave():
  """What a layer of a stack starts with, and what dropout drops."""
  config = T5_1_1.replace(dropout_rate=0.5)
  params = init_params(config, PLACE, jax.random.key(2))
  wo = [params[stack]["layers"]["mlp"]["wo"][1, 0, :2] for stack in ("encoder", "decoder")]
  np.testing.assert_allclose(
      wo, [[0.22864388, -0.24464163], [-0.02729624, -0.00159063]], atol=1e-7
  )
  tokens = jnp.ones([2, 3], jnp.int32)
  logits = EncoderDecoder(config, PLACE).apply(
      {"params": params}, tokens, tokens > 0, tokens, True, rngs={"dropout": jax.random.key(1)}
  )
  np.testing.assert_allclose(logits[0, :, 0], [-0.1179257, -0.3261725, -0.6879423], atol=1e-5)


def test_decoder_is_causal_by_gradient(setup, rows):
  config, run, params = setup
  tokens, mask, targets = rows
  model, encoded = EncoderDecoder(config, PLACE), run(params, "encode", tokens, mask)

  def state(embedded, at):
    decode = lambda self, x: self.decoder(x, encoded, mask)
    return model.apply({"params": params}, embedded, method=decode)[:, at].sum()

  pull_at = jax.jit(jax.grad(state))
  embedded = run(params, "embed", targets)
  for at in (0, 4, 9):
    pull = np.abs(pull_at(embedded, at)).sum(-1) > 0
    assert (pull == (np.arange(10) <= at)).all()


def test_padding_of_the_input_does_not_leak(setup, rows):
  _, run, params = setup
  tokens, mask, targets = rows
  expected = run(params, "__call__", tokens, mask, targets)
  changed = np.where(mask, tokens, 39 - tokens)
  np.testing.assert_array_equal(run(params, "__call__", changed, mask, targets), expected)
  short = run(params, "__call__", tokens[1:, :3], mask[1:, :3], targets[1:])
  np.testing.assert_allclose(short[0], expected[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("splits", [[[1] * 10, [1] * 10], [[3, 4, 3], [1, 5, 4]], [[10], [10]]])
def test_blocks_over_the_cache_are_the_whole_pass(setup, rows, splits):
  """The view, layer by layer and block by block, against the scan over whole targets."""
  config, run, params = setup
  tokens, mask, targets = rows
  encoded = run(params, "encode", tokens, mask)
  expected = run(params, "decode", encoded, mask, targets)
  view, read = decode_view(config, params), program(config, is_view=True)
  np.testing.assert_array_equal(read(view, "encode", tokens, mask), encoded)
  cross = read(view, "cross_keys_values", encoded)
  cache = np.zeros([config.num_decoder_layers, 2, 2, 2, 14, 8])  # layer, K or V, batch, heads
  lengths = np.zeros([2], np.int32)
  # One width for all calls; the nodes after a row's own share are left out below.
  width = max(map(max, splits))
  step = np.arange(width, dtype=np.int32)
  visible = trees.ancestors(Tree(None, step, step - 1, None, width - 1))[None]
  for sizes in zip(*splits):
    at = np.minimum(lengths[:, None] + step, 9)
    hidden, keys, values, _ = read(
        view, "decode_block", np.take_along_axis(targets, at, 1), step[None], visible,
        [(k.swapaxes(2, 3), v) for k, v in cache], lengths, cross, mask,
    )
    for row, size in enumerate(sizes):
      start, end = lengths[row], lengths[row] + size
      np.testing.assert_allclose(
          hidden[row, :size], expected[row, start:end], rtol=0, atol=1e-10
      )
      for layer in range(config.num_decoder_layers):
        cache[layer, 0, row, :, start:end] = keys[layer][row, :, :, :size].swapaxes(1, 2)
        cache[layer, 1, row, :, start:end] = values[layer][row, :, :size]
      lengths[row] = end
  assert lengths.tolist() == [10, 10]


def head_states(config, own, hidden, num_heads):
  """States of the first heads, [heads, ..., d_model], as training and as decoding read them."""
  reader = HeadsReader(EncoderDecoder(config, PLACE, is_view=True))
  return (
      HEADS.states(config, own, hidden)[:num_heads],
      np.moveaxis(
          reader.head_states(Params(None, ADDON_VIEW(HEADS, own)), hidden, num_heads), -2, 0
      ),
  )


def test_heads_are_their_formula_then_the_base_projection(setup):
  config, run, params = setup
  rng = np.random.default_rng(3)
  hidden = rng.standard_normal([4, 16])
  own = HEADS.begin(config, PLACE, jax.random.key(1))
  own = jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape), own)
  act = nn.relu if config.activation == "relu" else nn.gelu
  kernel = params["embedding"].T * 16**-0.5 if config.is_tied else params["logits_kernel"]
  for num_heads in (1, 2):
    for found in head_states(config, own, hidden, num_heads):
      logits = run(params, "logits", found)
      assert logits.shape == (num_heads, 4, 40)
      for i in range(num_heads):
        state = hidden + act(hidden @ own["w1"][i]) @ own["w2"][i]
        np.testing.assert_allclose(found[i], state, rtol=0, atol=1e-10)
        np.testing.assert_allclose(logits[i], state @ kernel, rtol=0, atol=1e-10)
  for number in (2, 3):
    (alone,) = HEADS.states(config, own, hidden, jnp.int32(number))
    np.testing.assert_allclose(alone, found[number - 2], rtol=0, atol=1e-12)


def test_fresh_heads_repeat_head_1():
  params, run = init_params(T5_1_1, PLACE, jax.random.key(0)), program(T5_1_1)
  own = HEADS.begin(T5_1_1, PLACE, jax.random.key(0))
  assert own["w1"].any(axis=(1, 2)).all()
  hidden = np.random.default_rng(3).standard_normal([4, 16]).astype(np.float32)
  base = np.asarray(run(params, "logits", hidden))
  for found in head_states(T5_1_1, own, hidden, 2):
    np.testing.assert_array_equal(run(params, "logits", found), np.stack([base, base]))


def test_one_head_has_no_parameters():
  head_1 = Heads(1)
  assert head_1.begin(T5_1_1, PLACE, jax.random.key(0)) == head_1.abstract(T5_1_1, PLACE) == {}


def test_bfloat16_runs_and_keeps_float32_parameters_and_logits(rows):
  config = T5_1_1.replace(dtype="bfloat16")
  params = init_params(config, PLACE, jax.random.key(0))
  own = HEADS.begin(config, PLACE, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves((params, own))} == {jnp.dtype("float32")}
  run, (tokens, mask, targets) = program(config), rows
  logits = run(params, "__call__", tokens, mask, targets)
  assert logits.dtype == jnp.float32
  assert run(params, "encode", tokens, mask).dtype == jnp.bfloat16
  exact = program(T5_1_1)(params, "__call__", tokens, mask, targets)
  assert 0 < np.abs(logits - exact).max() < 0.1
  # Batch 2 takes other products than batch 1.
  found = Generator(config, params, own_heads=(HEADS, own)).generate(
      [[5, 6, 7], [8]], "blockwise", max_length=4, batch_size=2, buckets=(8,)
  )
  assert [len(row) for row in found.tokens] == [4, 4]


def parameter_table(init):
  """name -> [shape, dtype, logical axes] of what a function of a key makes."""
  boxed = jax.eval_shape(init, jax.random.key(0))
  leaves = jax.tree_util.tree_leaves_with_path(
      boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
  )
  return {
      "/".join(key.key for key in path): [
          list(leaf.value.shape), str(leaf.value.dtype), list(leaf.names)
      ]
      for path, leaf in leaves
  }


def parameter_tables():
  """Of each model, and of heads behind one."""
  inits = {
      name: functools.partial(init_boxed, config, PLACE) for name, config in CONFIGS.items()
  }
  inits["heads"] = functools.partial(HEADS.init, T5_1_1)
  return {name: parameter_table(init) for name, init in inits.items()}


def test_parameters_are_those_of_the_golden_file():
  """A change here breaks every checkpoint on disk. To accept one on purpose:

  PYTHONPATH=tests python -c "import test_model; test_model.write_golden()"
  """
  assert parameter_tables() == json.loads(GOLDEN.read_text())


def write_golden():
  models = [
      f'"{model}": {{\n' + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in table.items()) + "\n}"
      for model, table in parameter_tables().items()
  ]
  GOLDEN.parent.mkdir(exist_ok=True)
  GOLDEN.write_text("{\n" + ",\n".join(models) + "\n}\n")


@pytest.mark.parametrize(
    "field, value",
    [("d_model", 0), ("num_heads", 2.0), ("scan_unroll", True), ("activation", "tanh"),
     ("relpos_buckets", 6), ("relpos_max_distance", 4), ("dropout_rate", 1.0), ("eos_id", 40),
     ("dtype", "int8")],
)
def test_config_names_the_field_that_is_wrong(field, value):
  with pytest.raises(InputError, match=rf"ModelConfig\.{field} = .*: allowed is"):
    T5_1_1.replace(**{field: value})


@pytest.mark.parametrize("field, value", [
    ("block_size", True), ("block_size", 0), ("block_size", 2.0), ("d_ff", 0), ("d_ff", False),
])
def test_heads_name_the_field_that_is_wrong(field, value):
  with pytest.raises(InputError, match=rf"^Heads\.{field} = .*: allowed is"):
    Heads(**{"block_size": 2, field: value})
