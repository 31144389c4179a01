"""Heads behind a frozen base, on what people wrote and on the base's own outputs."""

import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from train_runs import (
    addon_params,
    arguments,
    assert_same,
    cut,
    error_of,
    HEADS_FILES,
    last_state,
    leaves,
    model_params,
    run,
    write_jsonl,
)

from bpd_jax import generation
from bpd_jax.addons.folder import load_addon, save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import load_model, save_model
from bpd_jax.data.batches import assemble
from bpd_jax.data.token_cache import TokenCache
from bpd_jax.errors import InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import EncoderDecoder, init_params
from bpd_jax.partitioning import single_device
from bpd_jax.train import begin_addon
from bpd_jax.training.states import HiddenStates

# What tests/test_journey.py imports, so that programs are compiled once.
CONFIG = ModelConfig(
    vocab_size=260, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_encoder_layers=2,
    num_decoder_layers=1,
)
HEADS = Heads(3)
OPTIONS = {"STEPS": 6, "BLOCK_SIZE": 3, "LOG_EVERY": 2, "SAVE_EVERY": 2, "NUM_DECODED": 2}


@pytest.fixture(scope="module")
def rows(train_rows):
  return train_rows


@pytest.fixture(scope="module")
def base(rows, tmp_path_factory):
  """A model folder without parallel heads, whose outputs follow their inputs."""
  folder = tmp_path_factory.mktemp("models") / "base"
  save_model(folder, CONFIG, base_params(), rows / "tokenizer_config.json")
  return folder


def base_params():
  params = init_params(CONFIG, single_device(), jax.random.key(7))
  return jax.tree.map(lambda leaf: leaf * (3 if leaf.ndim > 1 else 1), params)


def run_heads(rows, base, workdir, **options):
  return run(arguments(
      rows, workdir, HEADS_FILES, CHECKPOINT=str(base), **(OPTIONS | options)
  ))


def encoded(rows, field):
  """Tokens of the training rows."""
  lines = (rows / "train.jsonl").read_text().splitlines()
  return [[byte + 3 for byte in json.loads(line)[field].encode()] + [1] for line in lines]


@pytest.fixture(scope="module")
def heads_run(rows, base, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "heads"
  assert run_heads(rows, base, workdir) == 0
  return workdir


@pytest.fixture(scope="module")
def distilled_run(rows, base, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "distilled"
  assert run_heads(rows, base, workdir, TEXTS="outputs") == 0
  return workdir


@pytest.mark.parametrize("which", ["heads_run", "distilled_run"])
def test_heads_are_trained_and_the_base_stays_bit_for_bit(which, base, request):
  workdir = request.getfixturevalue(which)
  model = generation.load(base)
  assert model.config == CONFIG and model.own_heads == (Heads(1), {})
  assert_same(leaves(model.params), leaves(base_params()))
  # What is trained is the heads, and nothing else is left of the run.
  addon, own = load_addon(workdir / "addon", model)
  assert addon == HEADS and not (workdir / "model").exists()
  state = last_state(workdir)[1]
  assert_same({f"['params']{name}": leaf for name, leaf in addon_params(workdir, base).items()},
              {name: leaf for name, leaf in state.items() if name.startswith("['params']")})
  assert all("['own']" in name for name, leaf in state.items() if leaf.size > 1)
  # Fresh heads begin with w2 = 0.
  assert own["w2"].shape[0] == 2 and (np.abs(own["w2"]).max(axis=(1, 2)) > 0).all()


@pytest.fixture(scope="module")
def with_heads(rows, base, heads_run, tmp_path_factory):
  """The model folder with the heads that were trained behind it."""
  folder = tmp_path_factory.mktemp("models") / "with_heads"
  heads = load_addon(heads_run / "addon", generation.load(base))
  save_model_with(folder, CONFIG, base_params(), rows / "tokenizer_config.json", *heads)
  return folder


def test_a_run_goes_on_with_the_checkpoints_own_heads(base, heads_run, with_heads):
  begin = lambda folder, is_fresh=False: begin_addon(
      HEADS, generation.load(folder), str(folder), is_fresh, seed=0
  )
  fresh, said = begin(base)
  assert said == "heads: new" and not fresh["w2"].any() and fresh["w1"].any()
  own, said = begin(with_heads)
  assert said == f"heads: from {with_heads}"
  assert_same(leaves({"own": own}), addon_params(heads_run, base))
  own, said = begin(with_heads, is_fresh=True)
  assert said == "heads: new"
  assert_same(leaves(own), leaves(fresh))


def test_heads_of_other_sizes_than_the_checkpoints_own(
    rows, base, heads_run, with_heads, tmp_path, capsys
):
  """They are neither added nor cut; FRESH makes new ones, behind the same base."""
  argv = lambda **options: arguments(
      rows, tmp_path / "run", HEADS_FILES, CHECKPOINT=str(with_heads),
      **(OPTIONS | {"STEPS": 1, "WARMUP_STEPS": 0, "NUM_DECODED": 0, "MAX_STATES": 4} | options),
  )
  for options, found in (
      ({"BLOCK_SIZE": 4}, "block_size=4, d_ff=None"),
      ({"BLOCK_SIZE": 2}, "block_size=2, d_ff=None"),
      ({"Heads__d_ff": 24}, "block_size=3, d_ff=24"),
  ):
    message = (rf"train\.addon = Heads\({found}\): allowed is Heads\(block_size=3, d_ff=None\), "
               rf"as in {with_heads}, or FRESH \(train\.has_fresh_addon\)$")
    assert re.match(message, error_of(argv(**options), capsys))
    assert not (tmp_path / "run").exists()
  assert run(argv(BLOCK_SIZE=2, Heads__d_ff=24, FRESH=True)) == 0
  assert "heads: new" in capsys.readouterr().out
  own = addon_params(tmp_path / "run", with_heads)
  assert own["['own']['w2']"].shape == (1, 24, 16)
  # Heads that a model has beside it don't make another base of it.
  assert_same(own, addon_params(tmp_path / "run", base))


def test_a_joint_run_leaves_base_and_heads_in_one_folder(rows, with_heads, tmp_path, capsys):
  assert run(with_outputs(rows, with_heads, tmp_path)) == 0
  assert f"heads: from {with_heads}" in capsys.readouterr().out
  assert not (tmp_path / "addon").exists()
  found, before = generation.load(tmp_path / "model"), generation.load(with_heads)
  assert found.config == CONFIG and found.own_heads[0] == Heads(3, 16)
  state = last_state(tmp_path)[1]
  learned = model_params(tmp_path)
  assert_same({f"['params']{name}": leaf for name, leaf in learned.items()},
              {name: leaf for name, leaf in state.items() if name.startswith("['params']")})
  started = leaves({"base": before.params, "own": before.own_heads[1]})
  assert set(learned) == set(started)
  assert all((learned[name] != started[name]).any() for name in started)
  # The heads that were there are those of another base now.
  with pytest.raises(InputError, match=f"base = '{before.fingerprint}': .* {found.fingerprint}"):
    load_addon(with_heads / "addons/heads", found)


@pytest.mark.parametrize("which", ["heads_run", "distilled_run"])
def test_cached_states_are_the_base_models(which, rows, base, request):
  workdir = request.getfixturevalue(which)
  config, params = load_model(base, single_device())
  model = EncoderDecoder(config, single_device())
  states, inputs = HiddenStates(workdir / "states/0"), encoded(rows, "inputs")
  assert len(states.lengths) == len(inputs) == 40
  # The examples were drawn; each is here once.
  order = np.random.default_rng([0, 0]).permutation(40)
  targets = [states[i][1].tolist() for i in range(40)]
  if which == "heads_run":
    assert targets == [encoded(rows, "targets")[i] for i in order]

  @jax.jit
  def forward(params, batch):
    mask = batch["encoder_segment_ids"] > 0
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
    return apply(apply(batch["encoder_input_tokens"], mask, method="encode"), mask,
                 batch["decoder_input_tokens"], method="decode")

  batch = assemble([[(np.int32(inputs[i]), np.int32(target))]
                    for i, target in zip(order, targets)], 8, 12)
  hidden = forward(params, batch)
  for i, target in enumerate(targets):
    np.testing.assert_allclose(states.states(i), hidden[i, : len(target)], atol=2e-4)
  assert np.abs(hidden).max() > 0.5


def test_distillation_trains_on_the_base_models_own_outputs(rows, base, distilled_run):
  out = generation.load(base).generate(
      encoded(rows, "inputs"), "greedy", max_length=12, batch_size=4
  )
  order = np.random.default_rng([0, 0]).permutation(40)
  cache = TokenCache(distilled_run / "outputs/0/part_00000")
  assert len(cache) == 40
  assert len({tuple(row.tolist()) for row in out.tokens}) >= 5
  for i, example in enumerate(order):
    inputs, targets = cache[i]
    assert inputs.tolist() == encoded(rows, "inputs")[example]
    assert targets.tolist() == out.tokens[example].tolist()
  states = HiddenStates(distilled_run / "states/0")
  assert [states[i][1].tolist() for i in range(40)] == [cache[i][1].tolist() for i in range(40)]


def test_distillation_goes_on_where_it_was_killed(
    rows, base, distilled_run, tmp_path, monkeypatch
):
  class Killed(BaseException):
    pass

  def killed(*args, **kwargs):
    raise Killed

  def counted(self, prompts, *args, **kwargs):
    calls.append(len(prompts))
    return killed() if len(calls) == kill_at else generate(self, prompts, *args, **kwargs)

  generate, calls, kill_at = generation.Generator.generate, [], 2
  go_on = lambda: run_heads(rows, base, tmp_path, TEXTS="outputs", NUM_DECODED=0)
  monkeypatch.setattr("bpd_jax.distillation.PART", 16)
  monkeypatch.setattr(generation.Generator, "generate", counted)
  # In the second of three parts; then when all are there, and states are read.
  with pytest.raises(Killed):
    go_on()
  assert calls == [16, 16]
  calls.clear()
  kill_at = None
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr("bpd_jax.training.states.place_batch", killed)
    go_on()
  assert calls == [16, 8]
  calls.clear()
  assert go_on() == 0
  assert calls == []
  assert_same(last_state(tmp_path)[1], last_state(distilled_run)[1])


def with_outputs(rows, base, workdir, **options):
  """Arguments of a joint run from the base model that learns from its outputs."""
  return arguments(rows, workdir, **{
      "VOCABULARY": str(rows / "tokenizer_config.json"), "train__config": None,
      "train__checkpoint": str(base), "train__max_states": 10, "RATES": [1.0],
      "train__output_rates": [0.5], "Loss__unlikelihood": 1.0, "STEPS": 2, "LOG_EVERY": 1,
      "NUM_DECODED": 0, **options,
  })


def test_own_outputs_are_decoded_once_and_mixed_in(rows, base, tmp_path, monkeypatch):
  assert run(with_outputs(rows, base, tmp_path)) == 0
  cache = TokenCache(tmp_path / "outputs/0/part_00000")
  drawn = np.random.default_rng([0, 0]).permutation(40)[:10]
  assert [cache[i][0].tolist() for i in range(len(cache))] == [
      encoded(rows, "inputs")[i] for i in drawn
  ]
  monkeypatch.setattr(generation.Generator, "generate", lambda *_, **__: pytest.fail("again"))
  assert run(with_outputs(rows, base, tmp_path, STEPS=3)) == 0
  assert last_state(tmp_path)[0] == 3


@pytest.mark.parametrize("options, message", [
    ({"Loss__unlikelihood": 0.0}, r"train\.objective = .*: allowed is one that unlearns loops"),
    ({"train__output_rates": [0.5, 0.5]}, r"train\.output_rates = \[0\.5, 0\.5\]: .* as many as"),
    ({"train__output_rates": [-0.5]}, r"train\.output_rates = \[-0\.5\]: .* from 0"),
    ({"Loss__trains_base": False},
     r"train\.output_rates = \[0\.5\]: allowed is None but where a base is trained in one process"),
])
def test_own_outputs_that_nothing_learns_from(rows, base, tmp_path, capsys, options, message):
  assert re.match(message, error_of(with_outputs(rows, base, tmp_path / "run", **options), capsys))


CHECKPOINTS = {
    "missing": (shutil.rmtree, "model folder = '.*': allowed is a folder that exists"),
    "of transformers": (
        lambda folder: (folder / "model.json").rename(folder / "config.json"),
        "model folder = '.*import_checkpoint makes one of transformers"),
    "of another width": (
        lambda folder: rewrite(folder, d_ff=24),
        r"decoder/.*wi_0 shape = \(1, 16, 16\): allowed is \(1, 16, 24\), from the config"),
    "that isn't JSON": (
        lambda folder: cut(folder / "model.json"), r".*model\.json = .*: allowed is JSON"),
    "cut": (lambda folder: cut(*folder.rglob("d/*")), "params = '.*/params': allowed is "),
    "cut in its manifest": (
        lambda folder: cut(folder / "params/manifest.ocdbt"), "params = '.*': allowed is a"),
    "without vocabulary": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        r"train\.vocabulary = None: allowed is a vocabulary file$"),
}


def rewrite(folder, **fields):
  path = folder / "model.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_is_not_whole(rows, base, tmp_path, capsys, name):
  damage, message = CHECKPOINTS[name]
  shutil.copytree(base, tmp_path / "model")
  damage(tmp_path / "model")
  argv = arguments(
      rows, tmp_path / "run", HEADS_FILES, CHECKPOINT=str(tmp_path / "model"), **OPTIONS
  )
  found = error_of(argv, capsys)
  assert re.match(message, found) and len(found) < 500
  assert not (tmp_path / "run").exists()


def test_behind_a_frozen_base_no_heads_are_nothing_to_train(rows, base, tmp_path, capsys):
  argv = arguments(rows, tmp_path / "run", HEADS_FILES, CHECKPOINT=str(base),
                   **(OPTIONS | {"BLOCK_SIZE": 1}))
  message = "Heads.block_size = 1: allowed is 2 or more behind a frozen base"
  assert error_of(argv, capsys) == message


def test_inputs_longer_than_the_longest_bucket(rows, base, tmp_path):
  """They are decoded for the heads to learn from, and at an evaluation."""
  for name in ("train", "validation"):
    write_jsonl(tmp_path / f"{name}.jsonl", [{"inputs": 2100 * "ab", "targets": "b"}] * 4)
  assert run_heads(
      tmp_path, base, tmp_path / "run", TEXTS="outputs", INPUT_LENGTH=4096, TARGET_LENGTH=4,
      STEPS=1, WARMUP_STEPS=0, NUM_DECODED=1, MAX_STATES=1, BATCH_SIZE=1,
  ) == 0
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert lines[-1]["rows.validation/block_efficiency"] >= 1


def test_a_checkpoint_is_the_one_with_the_same_contents(rows, base, tmp_path, capsys):
  """Wherever it lies: a run goes on with it, and with no other."""
  shutil.copytree(base, tmp_path / "one")
  options = OPTIONS | {
      "STEPS": 2, "Optimizer__decay_steps": 9, "NUM_DECODED": 0, "MAX_STATES": 4
  }
  command = lambda checkpoint: arguments(
      rows, tmp_path / "run", HEADS_FILES, CHECKPOINT=str(checkpoint), **options)
  assert run(command(tmp_path / "one")) == 0
  before = last_state(tmp_path / "run")[1]
  # Moved, named with a slash at its end, touched: the same.
  (tmp_path / "one").rename(tmp_path / "two")
  os.utime(tmp_path / "two/model.json", ns=(1, 1))
  options["STEPS"] = 3
  assert run(command(f"{tmp_path / 'two'}/")) == 0
  assert last_state(tmp_path / "run")[0] == 3
  # Another under the name that it had.
  config, params = load_model(base, single_device())
  params["encoder"]["norm"]["scale"] = params["encoder"]["norm"]["scale"] + 1
  save_model(tmp_path / "one", config, params, rows / "tokenizer_config.json")
  message = r"workdir .*/run checkpoint = '\w{16}': allowed is '\w{16}', of the run that the fold"
  assert re.match(message, error_of(command(tmp_path / "one"), capsys))
  assert last_state(tmp_path / "run")[0] == 3 and before


def test_heads_train_on_the_models_own_special_ids(rows, tmp_path):
  """Start and padding 3, EOS 2; the vocabulary's own EOS is another."""
  config = CONFIG.replace(pad_id=3, eos_id=2, start_id=3, vocab_size=261)
  params = init_params(config, single_device(), jax.random.key(7))
  save_model(tmp_path / "base", config, params, rows / "tokenizer_config.json")
  workdir = tmp_path / "run"
  assert run_heads(rows, tmp_path / "base", workdir) == 0
  states = HiddenStates(workdir / "states/0")
  inputs, targets = (encoded(rows, field) for field in ("inputs", "targets"))
  number = [len(row) for row in inputs].index(4)
  wanted = [*targets[number][:-1], 2][: 12]
  place = next(i for i in range(40) if states[i][1].tolist() == wanted)
  tokens = np.array([[*inputs[number][:-1], 2]])
  decoder_inputs = np.array([[3, *wanted[:-1]]])
  model = EncoderDecoder(config, single_device())
  apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
  mask = np.ones_like(tokens, bool)
  hidden = jax.jit(lambda tokens, mask, decoder_inputs: apply(
      apply(tokens, mask, method="encode"), mask, decoder_inputs, method="decode"
  ))(tokens, mask, decoder_inputs)
  np.testing.assert_allclose(states.states(place), hidden[0], atol=1e-5)
  assert addon_params(workdir, tmp_path / "base")["['own']['w2']"].any()
