"""Every dtype: what is summed, masked and compared has bits enough, whatever computes."""

import functools
import math
from pathlib import Path
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_loop

from bpd_jax import plan, programs
from bpd_jax.addons.folder import save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import load_config, save_model
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Prompt
from bpd_jax.errors import InputError
from bpd_jax.evaluation.replay import load_recording, record, replay
from bpd_jax.generation import load
from bpd_jax.model.config import DTYPES, ModelConfig
from bpd_jax.model.layers import attend, mask_bias
from bpd_jax.model.model import EncoderDecoder, init_params
from bpd_jax.partitioning import single_device
from bpd_jax.reader import ModelReader, prefill

ROOT = Path(__file__).resolve().parent.parent
PLACE = single_device()
CONFIG = ModelConfig(
    vocab_size=50, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_encoder_layers=2,
    num_decoder_layers=2,
)
HEADS = Heads(3, 12)
TIED = CONFIG.replace(activation="relu", is_gated=False, is_tied=True)
WIDE = {"bfloat16": "float32", "float16": "float32", "float32": "float32", "float64": "float64"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_dtype_keeps_statistics_wide(dtype):
  config = CONFIG.with_dtype(dtype)
  assert (config.dtype, config.param_dtype, config.accum_dtype) == (dtype, dtype, WIDE[dtype])


@pytest.mark.parametrize("dtype, accum, allowed", [
    ("bfloat16", "bfloat16", "float32 or float64"), ("float16", "float16", "float32 or float64"),
    ("float32", "float16", "float32 or float64"), ("float64", "float32", "float64, as dtype is"),
    ("float32", "int8", "float32 or float64"),
])
def test_statistics_in_fewer_bits_are_refused(dtype, accum, allowed):
  with pytest.raises(InputError) as caught:
    CONFIG.replace(dtype=dtype, accum_dtype=accum)
  assert str(caught.value) == f"ModelConfig.accum_dtype = {accum!r}: allowed is {allowed}"


def test_a_folder_that_asks_for_fewer_bits_gets_enough(tmp_path):
  save_model(tmp_path / "model", CONFIG, init_params(CONFIG, PLACE, jax.random.key(0)))
  path = tmp_path / "model/model.json"
  text = path.read_text()
  path.write_text(text.replace('"accum_dtype": "float32"', '"accum_dtype": "bfloat16"'))
  assert path.read_text() != text
  assert load_config(tmp_path / "model") == CONFIG


def equations(jaxpr):
  """Every equation of a program, those of loops and calls included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def decode_jaxpr(config, search):
  """The encoder and the decode loop, from shapes alone."""
  model = EncoderDecoder(config, PLACE, is_view=True)

  def whole(params, own, tokens, lengths):
    view = programs.decode_view(config, params)
    drafting = HEADS.make(ModelReader(model), HEADS.view(own), top_k=2).drafting
    settings = programs.DecodeSettings(drafting.drafter, search=search)
    context = prefill(model, view, tokens, lengths)
    return programs.decode_batch(
        model, settings, programs.DecodeParams(view, drafting.params), context,
        Prompt(tokens, lengths, 9), lengths, 0, lengths,
        programs.decode_cache(model, settings, 2, 9),
    )

  params = jax.eval_shape(lambda: init_params(config, PLACE, jax.random.key(0)))
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  return jax.make_jaxpr(whole)(params, HEADS.abstract(config, PLACE), ints(2, 5), ints(2))


# Of these each is in a norm, a softmax, a log-probability, a score or a search. A gelu has a
# tanh, and products are sums of the hardware's own.
NARROW_IS_WRONG = {
    "rsqrt", "exp", "log", "reduce_sum", "reduce_max", "reduce_min", "argmax", "top_k", "cumsum",
    "reduce_precision",
}


@pytest.mark.parametrize("config, search", [
    (TIED, SearchSettings()), (CONFIG, SearchSettings()),
    (CONFIG, SearchSettings("p_best", num_paths=3)),
    (CONFIG, SearchSettings("best_first", num_nodes=5)),
], ids=["tied", "chain", "p_best", "best_first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_statistic_softmax_score_or_logit_is_narrow(dtype, search, config):
  with jax.enable_x64(dtype == "float64"):
    config = config.with_dtype(dtype)
    found = list(equations(decode_jaxpr(config, search).jaxpr))
  seen = set()
  for equation in found:
    operands = [x.aval for x in equation.invars if hasattr(x.aval, "shape")]
    floats = {str(x.dtype) for x in operands if jnp.issubdtype(x.dtype, jnp.floating)}
    if equation.primitive.name in NARROW_IS_WRONG and floats:
      assert floats == {WIDE[dtype]}, equation
      seen.add(equation.primitive.name)
    if equation.primitive.name == "dot_general":
      out = equation.outvars[0].aval
      # Scores [batch, heads, queries, keys] and logits [..., vocab].
      is_logits = out.shape[-1] == config.vocab_size
      if is_logits or (out.ndim == 4 and out.shape[-1] != config.d_kv and out.shape[1] == 2):
        assert str(out.dtype) == WIDE[dtype], equation
        seen.add("logits" if is_logits else "scores")
  assert seen >= {"rsqrt", "exp", "reduce_sum", "reduce_max", "logits", "scores"}, seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_is_finite_and_hides(dtype):
  with jax.enable_x64(dtype == "float64"):
    rng = np.random.default_rng(0)
    mask = np.array([[True, True, False, False], [False] * 4])[:, None, None, :]
    bias = mask_bias(jnp.zeros([2, 1, 1, 4], dtype), mask)
    assert bias.dtype == dtype and np.isfinite(np.asarray(bias, float)).all()
    queries, keys, values = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ([2, 1, 2, 8], [2, 2, 8, 4], [2, 2, 4, 8])
    )
    read = lambda keys, values: np.asarray(
        attend(queries, [(keys, values, bias)], WIDE[dtype], lambda weights: weights), float
    )
    found = read(keys, values)
    assert np.isfinite(found).all()
    # What is masked is not read, to the last bit.
    hidden = np.arange(4) >= 2
    changed = read(jnp.where(hidden, -keys, keys), jnp.where(hidden[:, None], 9, values))
    np.testing.assert_array_equal(changed[0], found[0])
    # A row that sees nothing is still numbers: some mean of what there is.
    low, high = (bound(np.asarray(values, float)[1], axis=1) for bound in (np.min, np.max))
    assert (found[1, 0] >= low - 0.02).all() and (found[1, 0] <= high + 0.02).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1e-3, 300])
def test_a_norm_of_large_and_of_small_states_is_float32s(dtype, scale):
  """Squares of 300 are beyond float16, those of 1e-3 are below what it tells from 0."""
  config = CONFIG.replace(num_encoder_layers=1)
  params = init_params(config, PLACE, jax.random.key(1))
  rng = np.random.default_rng(0)
  embedding = scale * rng.choice([-1.0, 1.0], params["embedding"].shape)
  params["embedding"] = jnp.asarray(embedding, jnp.float32)
  tokens = rng.integers(2, 48, [2, 6])
  encode = lambda config, params: np.asarray(
      jax.jit(functools.partial(EncoderDecoder(config, PLACE).apply, method="encode"))(
          {"params": params}, tokens, tokens > 0
      ), np.float32
  )
  low = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  found, expected = encode(config.with_dtype(dtype), low), encode(config, params)
  assert np.isfinite(found).all()
  np.testing.assert_allclose(found, expected, atol=0.15)
  assert math.isclose(float(np.sqrt(np.mean(found**2))), 1, rel_tol=0.05)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shipped_model_writes_code_in_fewer_bits(dtype):
  model = load(ROOT / "experiments/docstrings/model", dtype=dtype)
  found = model.generate(
      ["format:\ndef f( x ):{return x+1}"], "blockwise", max_length=16, batch_size=1
  )
  assert found.texts == ["def f( x ):\n    return x + 1"]
  assert found.calls == [3] and len(found.tokens[0]) == 13


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_drafters_scores_are_wide_before_anything_adds_them(dtype):
  """A drafter of a user's own may have them in its model's dtype."""

  class Narrow(test_loop.NoisyDrafter):

    def propose(self, params, state, noise, past):
      lattice = super().propose(params, state, noise, past)
      return lattice.replace(scores=lattice.scores.astype(dtype))

  rng = np.random.default_rng(0)
  seed, eos_position, limits, greedy = test_loop.make_rows(rng, 32)
  table = test_loop.draft_table(rng, greedy, 3, 0.7)
  seen, chain = [], SearchSettings()

  def search(lattice, root, score):
    seen.append((lattice.scores.dtype, score.addends(score.begin(1), 0).dtype))
    return chain(lattice, root, score)

  state = test_loop.run(
      Narrow(3), table, seed, eos_position, limits, search, 4, test_loop.accept.ExactMatch()
  )
  assert set(seen) == {(jnp.dtype("float32"),) * 2}
  test_loop.check_rows(state, table, greedy, eos_position, limits, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("models") / "model"
  params = init_params(CONFIG, PLACE, jax.random.key(0))
  own = HEADS.begin(CONFIG, PLACE, jax.random.key(2))
  own["w2"] = jax.random.normal(jax.random.key(1), own["w2"].shape) / 4
  save_model_with(path, CONFIG, params, None, HEADS, own)
  return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plan_compiles_what_load_runs(folder, dtype):
  model = load(folder, dtype=dtype)
  settings = model.settings("blockwise")
  tokens, lengths = np.full([2, 32], 5, np.int32), np.full([2], 7, np.int32)
  context = programs.PREFILL(model.model, model.view, tokens, lengths)
  cache = programs.CACHE(model.model, settings, 2, 9)
  runs = programs.DECODE.lower(
      model.model, settings, model.decode_params(), context, Prompt(tokens, lengths, 9),
      lengths, 0, lengths, cache,
  )
  config = plan.decode_config(load_config(folder), dtype)
  planned = plan.decode_program("blockwise", HEADS, config, PLACE, 2, 32, 9)
  # All but names: shapes, dtypes and instructions.
  numbers = lambda compiled: compiled.cost_analysis() | {
      "arguments": compiled.memory_analysis().argument_size_in_bytes,
      "instructions": len(re.findall(r"^ +(?:ROOT )?%\S+ = ", compiled.as_text(), re.MULTILINE)),
  }
  assert numbers(planned.compiled) == numbers(runs.compile())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_recording_in_fewer_bits_is_read_back(folder, tmp_path, dtype):
  model = load(folder, dtype=dtype)
  prompts = [[5, 6, 7], [8, 9]]
  options = {"max_length": 9, "batch_size": 2}
  greedy = model.generate(prompts, "greedy", **options)
  recording = record(model, prompts, greedy, 9)
  recording.save(tmp_path / "recording.npz")
  again = load_recording(tmp_path / "recording.npz", model)
  assert again.hidden.dtype == dtype
  np.testing.assert_array_equal(again.hidden, recording.hidden)
  assert replay(model, again, batch_size=2).calls == replay(model, recording, batch_size=2).calls
