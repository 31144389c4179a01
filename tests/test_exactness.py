"""Exactness with the real model: float64 token for token, float32 up to proved near ties."""

import jax
import numpy as np
import pytest

from bpd_jax.addons.heads import Heads
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.evaluation.exactness import check_differences, Difference, find_differences
from bpd_jax.generation import Generator
from bpd_jax.interchange.huggingface import import_model
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import decode_view, EncoderDecoder, init_params
from bpd_jax.partitioning import single_device

MAX_LENGTH = 18
# Models of a kind, each with its own batch of prompts: some in every run, in a slow one 200.
FEW, MANY = 15, 100
HEADS = Heads(10, 16)
# Block sizes of the heads and of references; each is one compiled loop.
BLOCK_SIZES = (2, 3, 4, 8, 10)
REFERENCES = (4, 9)
# Four rows a batch, and one that only pads.
OPTIONS = {"max_length": MAX_LENGTH, "batch_size": 5, "buckets": (32,)}
VIEW = jax.jit(decode_view, static_argnums=0)


@pytest.fixture(scope="module")
def hf_models():
  """Models of transformers, on one thread: those this small lose time to a pool of them."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  import hf_models

  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield hf_models
  torch.set_num_threads(before)


def make_generator(config, params, own):
  """A generator whose view is made by one program for all models of a config."""
  generator = Generator(config, params, own_heads=(HEADS, own))
  generator._view = VIEW(config, params)
  return generator


def random_model(hf_models, kind, seed, folder):
  """A model of transformers, its config and parameters in float64, and random heads."""
  model = hf_models.make_t5(kind, seed=seed, dtype=hf_models.torch.float64, eos_scale=2.0)
  hf_models.save(model, folder)
  config, params, _ = import_model(folder)
  rng = np.random.default_rng(seed)
  w1, w2 = (leaf.shape for leaf in HEADS.abstract(config, single_device()).values())
  # Small W2 says what head 1 says, right where a text repeats itself; large W2 anything.
  scale = rng.choice([0.02, 0.2, 1.0])
  own = {"w1": rng.standard_normal(w1) / 5, "w2": scale * rng.standard_normal(w2) / 4}
  return model, config.with_dtype("float64"), jax.tree.map(np.float64, params), own


def torch_greedy(model, prompts):
  """Greedy tokens of transformers for a padded batch, EOS included."""
  import torch

  longest = max(map(len, prompts))
  padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
  mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
  rows = model.generate(
      padded, attention_mask=mask, max_new_tokens=MAX_LENGTH, num_beams=1, do_sample=False
  )[:, 1:].tolist()
  return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


# Each shape is a loop to compile in float64. Those of t5_1_1's heads are used again below.
@pytest.mark.parametrize("kind, num_models, heads, references", [
    ("t5", FEW, BLOCK_SIZES[1:3], REFERENCES[:1]),
    ("t5_1_1", FEW, BLOCK_SIZES, REFERENCES[:1]),
    pytest.param("t5", MANY, BLOCK_SIZES, REFERENCES, marks=pytest.mark.slow),
    pytest.param("t5_1_1", MANY, BLOCK_SIZES, REFERENCES, marks=pytest.mark.slow),
])
def test_float64_blockwise_is_greedy_is_transformers(
    hf_models, kind, num_models, heads, references, tmp_path
):
  rng = np.random.default_rng(len(kind))
  ended, lengths = 0, []
  accepted = {kind: {} for kind in ("heads", "reference")}
  for number in range(num_models):
    model, config, params, own = random_model(
        hf_models, kind, number, tmp_path / str(number)
    )
    prompts = [
        rng.integers(2, 97, n).tolist() for n in rng.choice(np.arange(1, 31), 4, replace=False)
    ]
    expected = torch_greedy(model, prompts)
    limits = rng.integers(1, MAX_LENGTH + 1, 4).tolist()
    limits[number % 4] = MAX_LENGTH
    cut = [row[:limit] for row, limit in zip(expected, limits)]
    with jax.enable_x64(True):
      generator = make_generator(config, params, own)

      def decode(block_size, known=None):
        method = generator.heads(block_size) if known is None else ReferenceDrafter(block_size - 1)
        found = generator.generate(prompts, method, references=known, limits=limits, **OPTIONS)
        assert [row.tolist() for row in found.tokens] == cut, (kind, number, method)
        return found

      def note(drafter, block_size, found):
        seen = {call.num_accepted for row in found.traces for call in row}
        accepted[drafter].setdefault(block_size, set()).update(seen)

      greedy = generator.generate(prompts, "greedy", **OPTIONS)
      assert [row.tolist() for row in greedy.tokens] == expected, (kind, number)
      assert greedy.calls == [len(row) for row in expected]
      block_size = heads[number % len(heads)]
      note("heads", block_size, decode(block_size))

      block_size = references[number % len(references)]
      perfect = decode(block_size, expected)
      assert perfect.calls == [1 + -(-(len(row) - 1) // block_size) for row in cut]
      useless = decode(block_size, [[(t + 1) % 97 for t in row] for row in expected])
      assert useless.calls == [len(row) for row in cut]
      noisy = [
          np.where(rng.random(len(row)) < 0.25, rng.integers(0, 97, len(row)), row)
          for row in expected
      ]
      note("reference", block_size, decode(block_size, noisy))
    ended += sum(row[-1] == 1 for row in expected)
    lengths += map(len, expected)
  # EOS comes in about half of the rows, at every place, and drafts of every length pass: or
  # all this would show little.
  assert 0.35 < ended / len(lengths) < 0.65, ended / len(lengths)
  places = set(range(1, MAX_LENGTH + 1))
  assert set(lengths) == places or num_models == FEW and len(set(lengths)) > 7, set(lengths)
  for block_size in references:
    assert accepted["reference"][block_size] == set(range(block_size)), (block_size, accepted)
  for block_size in heads:
    least = block_size / 2 if num_models == MANY else 1
    assert len(accepted["heads"][block_size]) > least, (block_size, accepted)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_heads_always_wrong_need_a_call_a_token(hf_models, block_size, tmp_path):
  """Heads that say 96, which the base model can't: its logit reads a feature that is 0."""
  _, config, params, own = random_model(hf_models, "t5_1_1", 0, tmp_path / "model")
  params["decoder"]["norm"]["scale"][-1] = 0
  params["logits_kernel"][:, 96] = 0
  params["logits_kernel"][-1, 96] = 1e6
  w1, w2 = own["w1"], own["w2"]
  # gelu(z) + gelu(-z) is positive.
  w1[:, :, 1] = -w1[:, :, 0]
  w2[:] = 0
  w2[:, :2, -1] = 1
  prompts = [[5, 6, 7], list(range(2, 30)), [9] * 12]
  with jax.enable_x64(True):
    generator = make_generator(config, params, own)
    greedy = generator.generate(prompts, "greedy", **OPTIONS)
    found = generator.generate(prompts, generator.heads(block_size), **OPTIONS)
  for row, calls, expected in zip(found.tokens, found.calls, greedy.tokens):
    np.testing.assert_array_equal(row, expected)
    assert calls == len(row)
  for first, *later in found.traces:
    assert later and first.draft == [] and all(
        call.draft == [96] * (block_size - 1) for call in later
    )


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_heads_always_right_need_one_call_and_a_ceiling(hf_models, block_size, tmp_path):
  """Where all tokens score alike greedy says 0 for ever, and so does every head."""
  _, config, params, own = random_model(hf_models, "t5_1_1", 0, tmp_path / "model")
  params["logits_kernel"][:] = 0
  prompts, limits = [[5, 6, 7], list(range(2, 30)), [9] * 12, [8]], [MAX_LENGTH, 1, 7, 11]
  with jax.enable_x64(True):
    generator = make_generator(config, params, own)
    found = generator.generate(prompts, generator.heads(block_size), limits=limits, **OPTIONS)
  assert [row.tolist() for row in found.tokens] == [[0] * limit for limit in limits]
  assert found.calls == [1 + -(-(limit - 1) // block_size) for limit in limits]


FLOAT32 = ModelConfig(
    vocab_size=2048, d_model=512, d_ff=512, d_kv=64, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2,
)
FLOAT32_HEADS = Heads(8, 256)


@pytest.fixture(scope="module")
def wide():
  """A model as wide as T5 1.1 small, prompts, and greedy's tokens."""
  params = jax.device_get(init_params(FLOAT32, single_device(), jax.random.key(5)))
  rng = np.random.default_rng(6)
  own = jax.device_get(FLOAT32_HEADS.begin(FLOAT32, single_device(), jax.random.key(7)))
  own["w2"] = rng.standard_normal(own["w2"].shape).astype(np.float32) / 40
  prompts = [rng.integers(2, 2048, n).tolist() for n in rng.integers(4, 33, 64)]
  generator = Generator(FLOAT32, params, own_heads=(FLOAT32_HEADS, own))
  greedy = generator.generate(prompts, "greedy", max_length=32, batch_size=32)
  return params, generator, prompts, greedy


def float64_logits(params, prompt, tokens):
  """[length, vocab] of one row, without padding."""
  with jax.enable_x64(True):
    model = EncoderDecoder(FLOAT32.with_dtype("float64"), single_device())
    variables = {"params": jax.tree.map(np.float64, params)}
    targets = np.array([[0, *tokens[:-1]]])
    mask = np.ones([1, len(prompt)], bool)
    return np.asarray(jax.jit(model.apply)(variables, np.array([prompt]), mask, targets))[0]


def test_float32_differs_in_near_ties_alone(wide):
  params, generator, prompts, greedy = wide
  known = {"blockwise": None, ReferenceDrafter(7): greedy.tokens}
  for method, references in known.items():
    found = generator.generate(
        prompts, method, references=references, max_length=32, batch_size=32
    )
    differences = find_differences(FLOAT32, params, prompts, greedy.tokens, found.tokens)
    for difference in differences:
      print(method, difference)
    assert check_differences(differences, len(prompts)), list(map(str, differences))
  assert len({tuple(row) for row in greedy.tokens}) > 62


def test_real_flips_are_near_ties_and_too_many_fail(wide):
  """Every token gets a twin whose logit differs by less than float32's own noise."""
  params, whole, prompts, _ = wide
  rng = np.random.default_rng(8)
  kernel = params["logits_kernel"].copy()
  noise = rng.standard_normal([512, 1024]).astype(np.float32)
  kernel[:, 1024:] = kernel[:, :1024] * (1 + 1e-7 * noise)
  twins = {**params, "logits_kernel": kernel}
  generator = Generator(FLOAT32, twins, own_heads=whole.own_heads)
  options = {"max_length": 32, "batch_size": 32}
  greedy = generator.generate(prompts, "greedy", **options).tokens
  found = generator.generate(prompts, "blockwise", **options).tokens
  differences = find_differences(FLOAT32, twins, prompts, greedy, found)
  assert len(differences) > 8 and all(x.is_near_tie for x in differences)
  assert all(abs(x.token - x.greedy_token) == 1024 for x in differences)
  assert check_differences(differences[:1], 64) and not check_differences(differences, 64)


def test_a_wrong_token_is_not_a_near_tie(wide):
  params, _, prompts, greedy = wide
  wrong = [row.copy() for row in greedy.tokens[:9]]
  wrong[3][7] = (wrong[3][7] + 5) % 2048
  wrong[8] = wrong[8][:4]
  found = find_differences(FLOAT32, params, prompts[:9], greedy.tokens[:9], wrong)
  assert [(x.row, x.position) for x in found] == [(3, 7), (8, 4)]
  assert found[0].token == wrong[3][7] and found[0].greedy_token == greedy.tokens[3][7]
  assert found[1].token == 1 and found[1].greedy_token == greedy.tokens[8][4]
  assert all(not x.is_near_tie and x.margin > 1e-2 for x in found)
  for x in found:
    logits = float64_logits(params, prompts[x.row], greedy.tokens[x.row])[x.position]
    assert abs(abs(logits[x.token] - logits[x.greedy_token]) - x.margin) < 1e-9
  assert "NOT a near tie" in str(found[0]) and "position 7" in str(found[0])
  assert not check_differences(found, 10_000)


def test_a_planted_near_tie_is_one(wide):
  params, _, prompts, greedy = wide
  row = greedy.tokens[0]
  twin = 2000
  assert twin not in row
  kernel = params["logits_kernel"].copy()
  kernel[:, twin] = kernel[:, row[5]]
  kernel[0, twin] *= 1 + 1e-6
  other = row.copy()
  other[5] = twin
  changed = {**params, "logits_kernel": kernel}
  (found,) = find_differences(FLOAT32, changed, prompts[:1], [row], [other])
  assert found.is_near_tie and 0 < found.margin < 1e-3 and found.position == 5
  assert check_differences([found], 20)


def test_share_of_near_ties_is_bounded():
  tie = [Difference(row, 0, 2, 3, 1e-5, True) for row in range(5)]
  assert check_differences([], 1) and check_differences(tie[:1], 1)
  assert not check_differences(tie, 1000) and check_differences(tie, 1001)
