"""Exactness with the real model: float64 token for token, float32 up to proved near ties."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hf_models

from bpd_jax.evaluation.exactness import check_differences, Difference, find_differences
from bpd_jax.generation import Generator
from bpd_jax.interchange.huggingface import import_model
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device

MAX_LENGTH = 18
NUM_MODELS = 50  # Two batches of prompts each, of both kinds: 200 cases.
BATCH = 4
# (block size, verify width); one compiled loop each.
SHAPES = ((2, 2), (4, 3), (6, 6), (10, 10))


def random_heads(rng, config, scale):
  """Parallel heads that say something else than head 1, right now and then."""
  heads = config.block_size - 1
  return {
      "w1": rng.standard_normal([heads, config.d_model, config.head_d_ff]) / 5,
      "w2": scale * rng.standard_normal([heads, config.head_d_ff, config.d_model]) / 6,
  }


def random_prompts(rng):
  """Four prompts of different lengths, the longest within one bucket."""
  return [rng.integers(2, 97, n).tolist() for n in rng.choice(np.arange(1, 31), 4, replace=False)]


@pytest.mark.parametrize("kind", ["t5", "t5_1_1"])
def test_float64_blockwise_is_greedy_is_transformers(kind, tmp_path):
  rng = np.random.default_rng(len(kind))
  ended, rows, drafted = 0, 0, 0
  for number in range(NUM_MODELS):
    model = hf_models.make_t5(kind, seed=number, dtype=torch.float64, eos_scale=2.0)
    folder = tmp_path / str(number)
    hf_models.save(model, folder)
    config, params = import_model(folder, block_size=10, head_d_ff=16)
    with jax.enable_x64(True):
      params = jax.tree.map(np.float64, params)
      config = config.with_dtype("float64")
      params["heads"] = random_heads(rng, config, scale=0.3)
      generator = Generator(config, params)
      for _ in range(2):
        prompts = random_prompts(rng)
        longest = max(map(len, prompts))
        padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
        expected = model.generate(
            padded, attention_mask=mask, max_new_tokens=MAX_LENGTH, num_beams=1, do_sample=False
        )[:, 1:].tolist()
        expected = [row[: row.index(1) + 1] if 1 in row else row for row in expected]
        options = {"max_length": MAX_LENGTH, "batch_size": BATCH, "buckets": (32,)}
        greedy = generator.generate(prompts, "greedy", **options)
        assert [row.tolist() for row in greedy.tokens] == expected, (kind, number)
        assert greedy.calls == [len(row) for row in expected]
        limits = rng.integers(1, MAX_LENGTH + 1, 4).tolist()
        limits[number % 4] = MAX_LENGTH
        block_size, width = SHAPES[number % len(SHAPES)]
        options |= {"block_size": block_size, "verify_width": width, "limits": limits}
        found = generator.generate(prompts, "blockwise", **options)
        cut = [row[:limit] for row, limit in zip(expected, limits)]
        assert [row.tolist() for row in found.tokens] == cut, (kind, number, block_size)
        perfect = generator.generate(prompts, "reference", references=expected, **options)
        assert [row.tolist() for row in perfect.tokens] == cut
        assert perfect.calls == [1 + -(-(len(row) - 1) // width) for row in cut]
        useless = [[(token + 1) % 97 for token in row] for row in expected]
        none = generator.generate(prompts, "reference", references=useless, **options)
        assert [row.tolist() for row in none.tokens] == cut
        assert none.calls == [len(row) for row in cut]
        ended += sum(row[-1] == 1 and len(row) < MAX_LENGTH for row in expected)
        rows += len(expected)
        drafted += sum(map(len, found.tokens)) - sum(found.calls)
  # Neither EOS nor accepted drafts are rare, or this would show little.
  assert 0.1 < ended / rows < 0.9, ended / rows
  assert drafted > rows / 10, drafted / rows


FLOAT32 = ModelConfig(
    vocab_size=2048, d_model=512, d_ff=1024, d_kv=64, num_heads=6, num_encoder_layers=2,
    num_decoder_layers=2, block_size=8, head_d_ff=256,
)


@pytest.fixture(scope="module")
def wide():
  """A model as wide as T5 1.1 small, prompts, and greedy's tokens."""
  params = jax.device_get(init_params(FLOAT32, single_device(), jax.random.key(5)))
  rng = np.random.default_rng(6)
  w2 = params["heads"]["w2"]
  params["heads"]["w2"] = rng.standard_normal(w2.shape).astype(np.float32) / 40
  prompts = [rng.integers(2, 2048, n).tolist() for n in rng.integers(4, 33, 256)]
  generator = Generator(FLOAT32, params)
  greedy = generator.generate(prompts, "greedy", max_length=32, batch_size=32)
  return params, generator, prompts, greedy


def test_float32_differs_in_near_ties_alone(wide):
  params, generator, prompts, greedy = wide
  known = {"blockwise": None, "reference": greedy.tokens}
  for method, references in known.items():
    found = generator.generate(
        prompts, method, references=references, max_length=32, batch_size=32
    )
    differences = find_differences(FLOAT32, params, prompts, greedy.tokens, found.tokens)
    for difference in differences:
      print(method, difference)
    assert check_differences(differences, len(prompts)), list(map(str, differences))
  assert len({tuple(row) for row in greedy.tokens}) > 250


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
