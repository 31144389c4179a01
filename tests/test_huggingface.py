"""Import and export agree with transformers on random models of every kind."""

import functools
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hf_models
from pieces import train_pieces
from safetensors.numpy import load_file, save_file
from train_runs import run

from bpd_jax import export, import_checkpoint
from bpd_jax.addons.heads import Heads
from bpd_jax.errors import InputError
from bpd_jax.generation import Generator, load
from bpd_jax.interchange import huggingface
from bpd_jax.interchange.huggingface import export_model, import_model
from bpd_jax.model.config import ACTIVATIONS
from bpd_jax.model.layers import relpos_bucket_table
from bpd_jax.model.model import EncoderDecoder
from bpd_jax.partitioning import single_device

PLACE = single_device()
ROOT = Path(__file__).resolve().parent.parent

# Longer than relative_attention_max_distance, so every bucket is read.
LENGTHS = (27, 9, 1)
TARGET_LENGTH = 25


@pytest.fixture(scope="module", params=hf_models.KINDS)
def kind(request):
  return request.param


@pytest.fixture(scope="module")
def model(kind):
  return hf_models.make_t5(kind, seed=3)


@pytest.fixture(scope="module")
def folder(model, kind, tmp_path_factory):
  path = tmp_path_factory.mktemp(kind)
  hf_models.save(model, path)
  return path


@pytest.fixture
def copy(tmp_path):
  """Makes a folder of a kind that a test may spoil."""

  def make(kind="t5_1_1", **options):
    path = tmp_path / f"{kind}_folder"
    hf_models.save(hf_models.make_t5(kind, seed=5), path, **options)
    return path

  return make


def random_inputs():
  """Prompts padded to the longest, their mask, and decoder inputs from padding."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 97, [len(LENGTHS), max(LENGTHS)])
  mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
  targets = rng.integers(2, 97, [len(LENGTHS), TARGET_LENGTH])
  targets[:, 0] = 0
  return np.where(mask, tokens, 0), mask, targets


def torch_logits(model):
  """Encoder states of real tokens and logits, from transformers."""
  tokens, mask, targets = (torch.from_numpy(np.asarray(x)) for x in random_inputs())
  with torch.no_grad():
    out = model(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=targets)
  encoded = out.encoder_last_hidden_state.to(torch.float64).numpy()
  return encoded * mask.numpy()[:, :, None], out.logits.to(torch.float64).numpy()


def our_logits(config, params):
  """The same from here."""
  tokens, mask, targets = random_inputs()
  encoded, logits = forward(config, params, tokens, mask, targets)
  return np.asarray(encoded, np.float64) * mask[:, :, None], np.asarray(logits, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, mask, targets):
  ours = functools.partial(EncoderDecoder(config, PLACE).apply, {"params": params})
  return ours(tokens, mask, method="encode"), ours(tokens, mask, targets)


def in_float64(config, params):
  return config.with_dtype("float64"), jax.tree.map(lambda leaf: np.float64(leaf), params)


def assert_close(found, expected, tolerance):
  """Largest difference relative to the largest value."""
  for one, other in zip(found, expected):
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def edit_config(folder, **fields):
  """Sets fields of config.json; None removes one."""
  path = folder / "config.json"
  known = json.loads(path.read_text()) | fields
  path.write_text(json.dumps({name: x for name, x in known.items() if x is not None}))


def edit_tensors(folder, changes):
  """Sets tensors of model.safetensors; None removes one."""
  path = folder / "model.safetensors"
  tensors = {name: x.copy() for name, x in load_file(path).items()} | changes
  save_file({name: x for name, x in tensors.items() if x is not None}, path)


def random_heads(config, heads):
  """Parameters of heads as numpy arrays, none of them at a special value."""
  own = heads.begin(config, PLACE, jax.random.key(6))
  rng = np.random.default_rng(2)
  return {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in own.items()}


def assert_error(folder, text):
  with pytest.raises(InputError) as caught:
    import_model(folder)
  assert text in str(caught.value)
  assert "\n" not in str(caught.value)


def test_config_is_read(folder, kind):
  config, _, own = import_model(folder)
  assert own == {}
  assert config.to_dict() == {
      "vocab_size": 97, "d_model": 24, "d_ff": 40, "d_kv": 8, "num_heads": 2,
      "num_encoder_layers": 3, "num_decoder_layers": 2,
      "activation": "relu" if kind == "t5" else "gelu", "is_gated": kind != "t5",
      "is_tied": kind == "t5", "relpos_buckets": 8, "relpos_max_distance": 20,
      "norm_epsilon": 1e-6, "dropout_rate": 0.0, "scan_unroll": 1, "pad_id": 0, "eos_id": 1,
      "start_id": 0,
      "dtype": "float32", "param_dtype": "float32", "accum_dtype": "float32",
  }


def test_logits_agree_in_float32(folder, model):
  assert_close(our_logits(*import_model(folder)[:2]), torch_logits(model), 1e-5)


def test_logits_agree_in_float64(folder, kind):
  expected = torch_logits(hf_models.make_t5(kind, seed=3, dtype=torch.float64))
  with jax.enable_x64(True):
    found = our_logits(*in_float64(*import_model(folder)[:2]))
  assert_close(found, expected, 1e-10)


def test_public_sizes_of_relative_bias_agree(tmp_path):
  """32 buckets up to distance 128, read over 140 positions."""
  sizes = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
  model = hf_models.make_t5("t5_1_1", seed=1, dtype=torch.float64, **sizes)
  hf_models.save(model, tmp_path)
  tokens = np.random.default_rng(1).integers(2, 97, [1, 140])
  mask = np.ones_like(tokens, bool)
  with torch.no_grad():
    ids = torch.from_numpy(tokens)
    expected = model(input_ids=ids, decoder_input_ids=ids).logits.numpy()
  with jax.enable_x64(True):
    config, params = in_float64(*import_model(tmp_path)[:2])
    _, found = forward(config, params, tokens, mask, tokens)
    assert_close([np.asarray(found)], [expected], 1e-10)


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (16, 64), (32, 256)])
@pytest.mark.parametrize("is_bidirectional", [True, False])
def test_buckets_are_those_of_transformers(buckets, max_distance, is_bidirectional):
  from transformers.models.t5.modeling_t5 import T5Attention

  distance = torch.arange(max_distance + 1)
  expected = T5Attention._relative_position_bucket(
      -distance, is_bidirectional, buckets, max_distance
  )
  side = buckets // 2 if is_bidirectional else buckets
  np.testing.assert_array_equal(relpos_bucket_table(side, max_distance), expected.numpy())


def test_greedy_tokens_agree_in_float64(tmp_path, kind):
  reference = hf_models.make_t5(kind, seed=3, dtype=torch.float64, eos_scale=2.0)
  hf_models.save(reference, tmp_path)
  rng = np.random.default_rng(4)
  prompts = [rng.integers(2, 97, length).tolist() for length in (3, 30, 12, 7, 21, 1, 16, 5)]
  expected = []
  for prompt in prompts:
    row = reference.generate(
        torch.tensor([prompt]), max_new_tokens=24, num_beams=1, do_sample=False
    )[0].tolist()
    expected.append(row[1:])
  with jax.enable_x64(True):
    generator = Generator(*in_float64(*import_model(tmp_path)[:2]))
    found = generator.generate(prompts, "greedy", max_length=24, batch_size=4)
  assert [row.tolist() for row in found.tokens] == expected
  ends = [row[-1] == 1 for row in expected]
  assert any(ends) and not all(ends) and len({tuple(row) for row in expected}) > 4, expected


def test_config_as_published_folders_have_it(copy):
  """Before transformers 5 `tie_word_embeddings` alone said whether to scale."""
  folder = copy("t5_1_1")
  expected = import_model(folder)
  edit_config(folder, tie_word_embeddings=False, scale_decoder_outputs=None)
  config, params, _ = import_model(folder)
  assert config == expected[0]
  assert_same(params, expected[1])
  folder = copy("t5")
  edit_config(
      folder, tie_word_embeddings=None, scale_decoder_outputs=None, is_gated_act=None,
      dense_act_fn=None, relative_attention_max_distance=None, num_decoder_layers=None,
      decoder_start_token_id=None, num_layers=2,
  )
  edit_tensors(folder, {
      name: None for name in load_file(folder / "model.safetensors") if "encoder.block.2" in name
  })
  config, _, _ = import_model(folder)
  assert config.is_tied and config.activation == "relu"
  assert config.num_decoder_layers == 2
  assert config.relpos_max_distance == 128


def test_tied_without_scale_gets_a_kernel_of_its_own(tmp_path):
  """transformers ties an mT5 that has no lm_head.weight, and never scales it."""
  model = hf_models.make_t5("mt5", seed=2, tie_word_embeddings=True)
  hf_models.save(model, tmp_path)
  assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
  config, params, _ = import_model(tmp_path)
  assert not config.is_tied
  np.testing.assert_array_equal(params["logits_kernel"], params["embedding"].T)
  assert_close(our_logits(config, params), torch_logits(model), 1e-5)


def test_repeated_embeddings_are_checked(copy):
  folder = copy("t5")
  expected = import_model(folder)[1]
  table = load_file(folder / "model.safetensors")["shared.weight"].copy()
  names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
  unread = huggingface.IGNORED
  edit_tensors(folder, {name: table for name in names} | {unread: np.ones([8, 2], np.float32)})
  assert_same(import_model(folder)[1], expected)
  edit_tensors(folder, {"shared.weight": None})
  assert_same(import_model(folder)[1], expected)
  edit_tensors(folder, {"decoder.embed_tokens.weight": table + 1})
  assert_error(folder, "tensor decoder.embed_tokens.weight = 'other values'")
  edit_tensors(folder, {"decoder.embed_tokens.weight": None, "lm_head.weight": table + 1})
  assert_error(folder, "config.json tie_word_embeddings = True: allowed is false, as the values")


def test_vocabulary_size_is_the_rows_of_the_embedding(copy):
  folder = copy("t5")
  edit_config(folder, vocab_size=64)
  assert import_model(folder)[0].vocab_size == 97


def test_sharded_folder(copy, folder, kind):
  sharded = copy(kind, max_shard_size="8KB")
  assert len(list(sharded.glob("*.safetensors"))) > 3
  whole = copy(kind)  # the same folder, with model.safetensors beside the shards
  found = import_model(sharded)
  for path in whole.glob("model-*.safetensors"):
    path.unlink()
  assert_same(found[1], import_model(whole)[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_folder_becomes_float32(tmp_path, dtype):
  model = hf_models.make_t5("t5_1_1", seed=7, dtype=getattr(torch, dtype))
  hf_models.save(model, tmp_path)
  config, params, _ = import_model(tmp_path)
  assert config.param_dtype == "float32"
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  assert_close(our_logits(config, params), torch_logits(model.float()), 1e-5)


def test_import_needs_no_torch(copy):
  code = (
      "import sys\n"
      "from bpd_jax.interchange.huggingface import export_model, import_model\n"
      "for folder in sys.argv[1:]:\n"
      "  import_model(folder)\n"
      "  print([name for name in ('torch', 'transformers', 'tensorflow') if name in sys.modules])"
  )
  done = subprocess.run(
      [sys.executable, "-c", code, *map(copy, hf_models.KINDS)], cwd=ROOT, capture_output=True,
      text=True, check=True,
  )
  assert done.stdout == "[]\n" * len(hf_models.KINDS)


@pytest.mark.parametrize("max_shard_bytes", [huggingface.MAX_SHARD_BYTES, 8000])
def test_export_loads_in_transformers(tmp_path, folder, model, kind, max_shard_bytes):
  config, params, _ = import_model(folder)
  out = tmp_path / "out"
  export_model(out, config, params, max_shard_bytes=max_shard_bytes)
  shards = [path.stat().st_size for path in out.glob("*.safetensors")]
  if max_shard_bytes == 8000:
    # The embedding is larger than a shard and has a file for itself.
    assert len(shards) > 3 and sorted(shards)[-3 if kind != "t5" else -2] < 12_000
  else:
    assert len(shards) == 1
  loaded, report = transformers.T5ForConditionalGeneration.from_pretrained(
      out, output_loading_info=True
  )
  assert not any(report.values()), report
  assert loaded.dtype == torch.float32
  loaded.eval()
  for one, other in zip(torch_logits(loaded), torch_logits(model)):
    np.testing.assert_array_equal(one, other)
  prompt = torch.tensor([[5, 6, 7, 1]])
  options = {"max_new_tokens": 6, "num_beams": 1, "do_sample": False}
  assert loaded.generate(prompt, **options).tolist() == (
      model.generate(prompt, **options).tolist()
  )


@pytest.mark.parametrize("block_size", [1, 4])
def test_import_export_import_is_bitwise(tmp_path, folder, block_size):
  pieces = train_pieces(90)
  (tmp_path / "pieces").write_bytes(pieces)
  config, params, _ = import_model(folder)
  own = random_heads(config, Heads(block_size))
  export_model(tmp_path / "out", config, params, tmp_path / "pieces", heads=own)
  again, *params_again = import_model(tmp_path / "out")
  assert again == config
  assert_same(params_again, [params, own])
  assert (tmp_path / "out" / huggingface.HEADS_FILE).exists() == (block_size > 1)
  assert (tmp_path / "out" / "spiece.model").read_bytes() == pieces
  assert sorted(os.listdir(tmp_path)) == ["out", "pieces"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("is_gated", [False, True])
def test_every_feed_forward_agrees(tmp_path, folder, is_gated, activation):
  config, params, _ = import_model(folder)
  for stack in ("encoder", "decoder"):
    mlp = params[stack]["layers"]["mlp"]
    first = mlp.get("wi", mlp.get("wi_0"))
    wi = {"wi_0": first, "wi_1": first[:, ::-1].copy()} if is_gated else {"wi": first}
    params[stack]["layers"]["mlp"] = wi | {"wo": mlp["wo"]}
  config = config.replace(is_gated=is_gated, activation=activation)
  export_model(tmp_path / "out", config, params)
  loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
  assert_close(our_logits(config, params), torch_logits(loaded), 1e-5)
  assert import_model(tmp_path / "out")[0] == config


def test_export_keeps_bfloat16(tmp_path, folder):
  config, params, _ = import_model(folder)
  params, own = jax.tree.map(
      lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (params, random_heads(config, Heads(3)))
  )
  export_model(tmp_path / "out", config.with_dtype("bfloat16"), params, heads=own)
  loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
  assert loaded.dtype == torch.bfloat16
  assert load_file(tmp_path / "out" / huggingface.HEADS_FILE)["w1"].dtype == jnp.bfloat16
  _, *again = import_model(tmp_path / "out")
  assert_same(again, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), [params, own]))


def test_export_refuses(tmp_path, folder):
  config, params, _ = import_model(folder)
  with pytest.raises(InputError, match="nothing is yet"):
    export_model(folder, config, params)
  with pytest.raises(InputError, match="^embedding shape"):
    export_model(tmp_path / "out", config.replace(vocab_size=96), params)
  with pytest.raises(InputError, match="^max_shard_bytes"):
    export_model(tmp_path / "out", config, params, max_shard_bytes=0)
  assert not os.listdir(tmp_path)


@pytest.fixture
def imported(tmp_path):
  """Imports a folder by the command; the model, as it is loaded."""

  def make(folder, *options):
    to = tmp_path / f"model_{len(list(tmp_path.iterdir()))}"
    assert run(["--from", str(folder), "--to", str(to), *options], import_checkpoint.main) == 0
    return load(to)

  return make


def test_fresh_heads_repeat_head_1(folder, imported):
  sizes = ("--block-size", "3", "--head-d-ff", "200")
  model, same, other = (imported(folder, *sizes, "--seed", seed) for seed in "112")
  heads, own = model.own_heads
  assert heads == Heads(3, 200)
  assert own["w1"].shape == (2, 24, 200)
  assert not own["w2"].any()
  assert abs(own["w1"].std() * 24**0.5 - 1) < 0.02
  assert_same(same.own_heads[1], own)
  assert (other.own_heads[1]["w1"] != own["w1"]).mean() > 0.99
  hidden = np.random.default_rng(0).standard_normal([2, 24]).astype(np.float32)
  ours, variables = EncoderDecoder(model.config, PLACE), {"params": model.params}
  base = ours.apply(variables, hidden, method="logits")
  found = ours.apply(variables, heads.states(model.config, own, hidden), method="logits")
  np.testing.assert_allclose(found, np.repeat(base[None], 2, axis=0), rtol=1e-5, atol=1e-5)


def test_import_makes_heads_as_wide_as_the_model_or_none(copy, imported):
  folder = copy()
  assert imported(folder, "--block-size", "4").own_heads[1]["w1"].shape == (3, 24, 40)
  for options in ((), ("--block-size", "1"), ("--head-d-ff", "12")):
    model = imported(folder, *options)
    assert (model.block_size, model.own_heads[1]) == (1, {})


def test_heads_travel_with_the_folder(tmp_path, folder, imported, capsys):
  config, params, _ = import_model(folder)
  own = random_heads(config, Heads(4, 12))
  out = tmp_path / "out"
  export_model(out, config, params, heads=own)
  again, *params_again = import_model(out)
  assert again == config
  assert_same(params_again, [params, own])
  for options in ((), ("--block-size", "4"), ("--head-d-ff", "12", "--seed", "9")):
    heads, found = imported(out, *options).own_heads
    assert heads == Heads(4, 12)
    assert_same(jax.tree.map(np.asarray, found), own)
  for option, value, text in (
      ("block-size", 3, "block-size = 3: allowed is 4, the folder's heads"),
      ("block-size", 1, "block-size = 1: allowed is 4, the folder's heads"),
      ("head-d-ff", 40, "head-d-ff = 40: allowed is 12, of the folder's heads"),
  ):
    argv = ["--from", str(out), "--to", str(tmp_path / "there"), f"--{option}", str(value)]
    capsys.readouterr()
    assert_one_line(run(argv, import_checkpoint.main), *capsys.readouterr(), text)
  assert not (tmp_path / "there").exists()
  w1, w2 = own["w1"], own["w2"]
  save_file({"w1": w1, "w2": w2[:2]}, out / huggingface.HEADS_FILE)
  assert_error(out, "parallel_heads.safetensors w2 shape = (2, 12, 24): allowed is (3, 12, 24)")
  save_file({"w1": w1[0], "w2": w2}, out / huggingface.HEADS_FILE)
  assert_error(out, "parallel_heads.safetensors w1 shape = (24, 12)")
  save_file({"w1": w1[:, :20], "w2": w2}, out / huggingface.HEADS_FILE)
  assert_error(
      out, "parallel_heads.safetensors w1 shape = (3, 20, 12): allowed is (heads, 24, width)"
  )
  save_file({"w1": w1}, out / huggingface.HEADS_FILE)
  assert_error(out, "parallel_heads.safetensors tensors = ['w1']")


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"model_type": "umt5"}, "config.json model_type = 'umt5': allowed is one of"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj = 'gelu': allowed is one of ('relu'"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj = 'gated-tanh'"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj = ['relu']"),
        ({"dense_act_fn": "gelu"}, "config.json dense_act_fn = 'gelu': allowed is 'gelu_new'"),
        ({"is_gated_act": False}, "config.json is_gated_act = False: allowed is True"),
        (
            {"decoder_start_token_id": 2},
            "generation_config.json decoder_start_token_id = 0: allowed is 2, as in config.json",
        ),
        ({"pad_token_id": 1}, "generation_config.json pad_token_id = 0: allowed is 1, as in"),
        ({"decoder_start_token_id": True}, "decoder_start_token_id = True: allowed is an integer"),
        ({"d_kv": "8"}, "config.json d_kv = '8': allowed is an integer"),
        ({"d_model": None}, "config.json d_model = None: allowed is an integer"),
        ({"eos_token_id": [1, 2]}, "config.json eos_token_id = [1, 2]"),
        ({"num_layers": 0}, "num_encoder_layers = 0: allowed is a positive integer"),
        ({"layer_norm_epsilon": True}, "config.json layer_norm_epsilon = True"),
        (
            {"d_ff": 48},
            "tensor encoder.block.0.layer.1.DenseReluDense.wi_0.weight shape = (40, 24): "
            "allowed is (48, 24), from config.json",
        ),
        (
            {"d_model": 32},
            "tensor shared.weight shape = (97, 24): allowed is (97, 32), from config.json",
        ),
        (
            {"relative_attention_num_buckets": 16},
            "SelfAttention.relative_attention_bias.weight shape = (8, 2): allowed is (16, 2)",
        ),
        (
            {"num_decoder_layers": 3},
            "tensor decoder.block.2.layer.0.SelfAttention.q.weight = 'missing': "
            "allowed is a tensor of shape (16, 24)",
        ),
        (
            {"num_decoder_layers": 1},
            "tensor decoder.block.1.layer.0.SelfAttention.k.weight = 'unknown'",
        ),
    ],
)
def test_config_errors(copy, fields, text):
  folder = copy()
  edit_config(folder, **fields)
  assert_error(folder, text)


def test_start_token_in_the_generation_config(copy):
  folder = copy()
  edit_config(folder, decoder_start_token_id=None)
  path = folder / "generation_config.json"
  path.write_text(json.dumps({"decoder_start_token_id": 3}))
  assert import_model(folder)[0].special_ids == {"pad_id": 0, "eos_id": 1, "start_id": 3}
  path.write_text(json.dumps({"decoder_start_token_id": 97}))
  assert_error(folder, "ModelConfig.start_id = 97: allowed is an id below 97")
  path.unlink()
  assert import_model(folder)[0].start_id == 0


def test_madlads_special_ids_go_there_and_back(tmp_path):
  """Start 0, padding 1, EOS 2: tokens are transformers', and so is what is exported."""
  ids = {"decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
  reference = hf_models.make_t5("t5_1_1", seed=8, dtype=torch.float64, **ids)
  with torch.no_grad():
    reference.lm_head.weight[2] *= 2
  hf_models.save(reference, tmp_path / "madlad")
  prompts = np.random.default_rng(4).integers(3, 97, [6, 9]).tolist()
  expected = [
      reference.generate(torch.tensor([prompt]), max_new_tokens=16, num_beams=1,
                         do_sample=False)[0].tolist() for prompt in prompts
  ]
  config, params, _ = import_model(tmp_path / "madlad")
  assert config.special_ids == {"start_id": 0, "pad_id": 1, "eos_id": 2}
  with jax.enable_x64(True):
    generator = Generator(*in_float64(config, params))
    found = generator.generate(prompts, "greedy", max_length=16, batch_size=2)
  assert [[0, *row.tolist()] for row in found.tokens] == expected
  assert any(row[-1] == 2 for row in expected)
  export_model(tmp_path / "out", config, params)
  assert import_model(tmp_path / "out")[0] == config
  loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
  for field, token in ids.items():
    assert getattr(loaded.config, field) == getattr(loaded.generation_config, field) == token


def test_tensor_errors(copy):
  folder = copy()
  q = "decoder.block.1.layer.1.EncDecAttention.q.weight"
  edit_tensors(folder, {q: np.zeros([16, 25], np.float32)})
  assert_error(folder, f"tensor {q} shape = (16, 25): allowed is (16, 24), from config.json")
  edit_tensors(folder, {q: np.zeros([16, 24], np.int8)})
  assert_error(folder, f"tensor {q} dtype = 'I8'")
  edit_tensors(folder, {q: None})
  assert_error(folder, f"tensor {q} = 'missing'")
  folder = copy()
  edit_tensors(folder, {"encoder.block.0.adapter.weight": np.zeros([2], np.float32)})
  assert_error(folder, "tensor encoder.block.0.adapter.weight = 'unknown'")
  folder = copy()
  edit_tensors(folder, {"lm_head.weight": np.zeros([90, 24], np.float32)})
  assert_error(folder, "tensor lm_head.weight shape = (90, 24): allowed is (97, 24)")
  edit_config(folder, tie_word_embeddings=False)
  edit_tensors(folder, {"lm_head.weight": None})
  assert_error(folder, "tensor lm_head.weight = 'missing'")
  edit_tensors(folder, {"shared.weight": None})
  assert_error(folder, "tensor shared.weight = 'missing'")
  edit_tensors(folder, {"shared.weight": np.zeros([97], np.float32)})
  assert_error(folder, "tensor shared.weight shape = (97,)")


def test_file_errors(copy, tmp_path):
  assert_error(tmp_path / "absent", "a folder that exists")
  folder = copy(max_shard_size="8KB")
  index = folder / "model.safetensors.index.json"
  fields = json.loads(index.read_text())
  shard = sorted(set(fields["weight_map"].values()))[1]
  shutil.copy(folder / shard, tmp_path / "shard")
  whole = (folder / shard).read_bytes()
  (folder / shard).write_bytes(whole[:-8])
  assert_error(folder, f"{shard}': allowed is a whole safetensors file")
  (folder / shard).unlink()
  assert_error(folder, f"shard in model.safetensors.index.json = '{shard}': allowed is a file in")
  index.write_text(json.dumps({"weight_map": {"shared.weight": "../shard"}}))
  assert_error(folder, "shard in model.safetensors.index.json = '../shard'")
  index.write_text(json.dumps({"weight_map": 3}))
  assert_error(folder, "weight_map = 3")
  index.write_text("{")
  assert_error(folder, "allowed is JSON")
  index.unlink()
  assert_error(folder, "model.safetensors or model.safetensors.index.json")
  (folder / "config.json").unlink()
  assert_error(folder, "config.json")


def command(module, *args):
  """Runs an entry point as a user does."""
  return subprocess.run(
      [sys.executable, "-m", module, *map(str, args)],
      cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
      check=False,
  )


def test_commands_there_and_back(copy, tmp_path):
  folder = copy("t5")
  (folder / "spiece.model").write_bytes(train_pieces(90))
  there, back = tmp_path / "there", tmp_path / "back"
  done = command(
      "bpd_jax.import_checkpoint", "--from", folder, "--to", there, "--block-size", 3,
      "--head-d-ff", 20, "--seed", 4,
  )
  assert done.returncode == 0, done.stderr
  config, params, _ = import_model(folder)
  own = jax.tree.map(np.asarray, Heads(3, 20).begin(config, PLACE, jax.random.key(4)))
  expected, model = [params, own], load(there)
  assert model.config == config
  assert model.own_heads[0] == Heads(3, 20)
  assert_same([model.params, model.own_heads[1]], expected)
  count = sum(leaf.size for leaf in jax.tree.leaves(expected))
  assert done.stdout.splitlines() == [
      f"parameters  {count:,}",
      f"size        {4 * count / 1e6:,.1f} MB of float32",
      "heads       3, 2 of them parallel heads of width 20",
      f"written to  {there}",
  ]
  done = command("bpd_jax.export", "--from", there, "--to", back)
  assert done.returncode == 0, done.stderr
  assert f"parameters  {count:,}" in done.stdout
  assert "heads       3, 2 of them parallel heads of width 20" in done.stdout
  again, *params_again = import_model(back)
  assert again == config
  assert_same(params_again, expected)
  assert (back / "spiece.model").read_bytes() == (folder / "spiece.model").read_bytes()


def assert_one_line(status, out, err, text):
  assert status == 2
  assert out == ""
  assert len(err.splitlines()) == 1, err
  assert err.startswith("error: ") and text in err


def test_commands_say_errors_in_one_line(copy, tmp_path, capsys):
  folder = copy(max_shard_size="8KB")
  import_it = ["--from", str(folder), "--to", str(tmp_path / "there")]

  def says(main, argv, text):
    capsys.readouterr()
    assert_one_line(run(argv, main), *capsys.readouterr(), text)

  edit_config(folder, d_ff=48)
  name = "tensor encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
  done = command("bpd_jax.import_checkpoint", *import_it)
  text = f"{name} shape = (40, 24): allowed is (48, 24)"
  assert_one_line(done.returncode, done.stdout, done.stderr, text)
  edit_config(folder, d_ff=40)
  pointer = folder / "spiece.model"
  pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 791656\n")
  says(import_checkpoint.main, import_it, "git-LFS pointer, for `git lfs pull`")
  pointer.unlink()
  (folder / "added_tokens.json").write_text('{"{": 97}')
  (folder / "spiece.model").write_bytes(train_pieces(90))
  text = "added tokens = ['{']: allowed is those of a tokenizer.json"
  says(import_checkpoint.main, import_it, text)
  shard = sorted(folder.glob("model-00002-*.safetensors"))[0]
  shard.unlink()
  says(import_checkpoint.main, import_it, shard.name)
  assert not (tmp_path / "there").exists()
  export_it = ["--from", str(tmp_path / "absent"), "--to", str(tmp_path / "out")]
  says(export.main, export_it, "a folder that exists")


@pytest.mark.parametrize("option, text", [
    ("--block-size=0", "block_size = 0: allowed is a positive integer"),
    ("--block-size=-1", "block_size = -1: allowed is a positive integer"),
    ("--head-d-ff=0", "d_ff = 0: allowed is a positive integer"),
])
def test_sizes_of_heads_that_are_none(copy, tmp_path, capsys, option, text):
  argv = ["--from", str(copy()), "--to", str(tmp_path / "there"), option]
  assert_one_line(run(argv, import_checkpoint.main), *capsys.readouterr(), text)
  assert not (tmp_path / "there").exists()
