"""A drafter whose probes enter below the last layer: decoded, searched, replayed and trained."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_runs import write_jsonl

from bpd_jax.addons.addon import Addon, Made, make_addon
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.rows import RowsTask
from bpd_jax.decoding.cache import empty_cache
from bpd_jax.decoding.lattice import top_k_lattice
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Drafter, Drafting, Params
from bpd_jax.errors import InputError
from bpd_jax.evaluation.analysis import lattice_statistics
from bpd_jax.evaluation.drafting import Draft
from bpd_jax.evaluation.replay import record, replay
from bpd_jax.evaluation.watch import watch
from bpd_jax.generation import Generator, load
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import decode_view, EncoderDecoder, init_params
from bpd_jax.model.probes import ProbeSpec
from bpd_jax.partitioning import single_device
from bpd_jax.reader import ModelReader
from bpd_jax.train import train
from bpd_jax.training.loop import Schedule
from bpd_jax.training.objective import Objective
from bpd_jax.training.optimizer import Optimizer

CONFIG = ModelConfig(
    vocab_size=24, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=3,
).with_dtype("float64")
MAX_LENGTH, K = 14, 3
SHIPPED = Path(__file__).resolve().parent.parent / "experiments/docstrings/model"
OPTIONS = {"max_length": MAX_LENGTH, "batch_size": 4, "buckets": (16,)}


@dataclasses.dataclass(frozen=True)
class ProbeDrafter(Drafter):
  """Each node carries `depth` probes, what they are is learned; the base reads them."""

  reader: ModelReader
  depth: int = K
  num_candidates: int = 1
  enter_layer: int = 1

  @property
  def num_probes(self):
    return self.depth

  def probes(self, params):
    make = lambda x: x[:, :, None] + params.own.astype(x.dtype)
    return ProbeSpec(self.enter_layer, self.depth, make)

  def init(self, params, prompt, context):
    batch = prompt.lengths.shape[0]
    hidden = self.reader.empty_hidden(batch)
    return jnp.repeat(hidden[:, None], self.depth, axis=1), jnp.zeros([batch], bool)

  def start(self, params, state, step, proposed):
    return step.probes, step.num_tokens > 0

  def propose(self, params, state, noise, past):
    probes, is_there = state
    num_steps = jnp.where(is_there, self.depth, 0)
    return top_k_lattice(self.reader.logits(params.base, probes), self.num_candidates, num_steps)


@pytest.fixture(scope="module")
def model():
  with jax.enable_x64(True):
    params = jax.device_get(init_params(CONFIG, single_device(), jax.random.key(4)))
    params["logits_kernel"] = 3 * params["logits_kernel"]
    yield Generator(CONFIG, params)


@pytest.fixture(scope="module")
def learned():
  return np.random.default_rng(0).standard_normal([K, CONFIG.d_model]) / 3


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(1)
  return [rng.integers(2, 24, n).tolist() for n in rng.integers(1, 16, 10)]


@pytest.mark.parametrize("enter_layer", [0, 2])
def test_tokens_are_greedys_and_replay_is_live(model, learned, prompts, enter_layer):
  with jax.enable_x64(True):
    greedy = model.generate(prompts, "greedy", **OPTIONS)
    recording = record(model, prompts, greedy, MAX_LENGTH)
    for top_k, search in ((1, SearchSettings()), (4, SearchSettings("p_best", num_paths=3))):
      drafter = ProbeDrafter(ModelReader(model.model), num_candidates=top_k,
                             enter_layer=enter_layer)
      drafting = Drafting(drafter, learned)
      live = model.generate(prompts, drafting, search=search, **OPTIONS)
      found = replay(model, recording, drafting, search=search, batch_size=5)
      assert [row.tolist() for row in live.tokens] == [row.tolist() for row in greedy.tokens]
      assert found.traces == live.traces
      # Random probes are right now and then, and after the first call every row has them.
      assert sum(live.calls) < sum(greedy.calls)
      assert all(call.draft for trace in live.traces for call in trace[1:])
    assert any(len(call.accepted) > 1 for trace in live.traces for call in trace)


def test_what_is_learned_decides_and_analyses_read_it(model, learned, prompts):
  with jax.enable_x64(True):
    greedy = model.generate(prompts, "greedy", **OPTIONS)
    recording = record(model, prompts, greedy, MAX_LENGTH)
    drafter = ProbeDrafter(ModelReader(model.model))
    one, other = (
        model.generate(prompts, Drafting(drafter, own), **OPTIONS) for own in (learned, -learned)
    )
    assert one.traces != other.traces
    # One loop for both, as what is learned is traced.
    before = model.num_compilations
    model.generate(prompts, Drafting(drafter, 2 * learned), **OPTIONS)
    assert model.num_compilations == before
    statistics = lattice_statistics(model, recording, Drafting(drafter, learned))
    watched = watch(model, recording, 2, Drafting(drafter, learned))
  assert [step.call for step in watched] == one.traces[2]
  assert all(len(call.steps) == K for call in watched[1:])
  assert len(statistics["recall"]) == K and 0 < statistics["recall"][0][-1] <= 1


@dataclasses.dataclass(frozen=True)
class Probes(Addon):
  """What the probes of a node are."""

  depth: int = K
  enter_layer: int = 1

  def init(self, config, key):
    return {"probes": jax.random.normal(key, [self.depth, config.d_model], config.param_dtype)}

  def view(self, own):
    return own["probes"]

  def make(self, reader, own, *, block_size=None, top_k=1):
    depth = self.depth if block_size is None else block_size - 1
    return Made(Drafting(ProbeDrafter(reader, depth, top_k, self.enter_layer), own[:depth]))


@dataclasses.dataclass(frozen=True)
class Foresight(Objective):
  """Probe i of a position says the token i after the next: through decoding's own block call."""

  texts: str = "references"
  reads_states: bool = False

  def shared(self, addon, batch, key):
    return (batch["decoder_segment_ids"] > 0).sum()

  def loss(self, addon, model, base, own, batch, shared, key):
    config = model.config
    view, apply = decode_view(config, base), EncoderDecoder(
        config, model.partitioning, is_view=True
    ).apply
    mask = batch["encoder_segment_ids"] > 0
    encoded = apply({"params": view}, batch["encoder_input_tokens"], mask, method="encode")
    cross = apply({"params": view}, encoded, method="cross_keys_values")
    rows, length = batch["decoder_input_tokens"].shape
    cache = empty_cache(
        config.num_decoder_layers, rows, config.num_heads, 1, config.d_kv, config.dtype
    )
    reader = ModelReader(EncoderDecoder(config, model.partitioning, is_view=True))
    drafter = addon.make(reader, addon.view(own)).drafting.drafter
    *_, states = apply(
        {"params": view}, batch["decoder_input_tokens"], jnp.arange(length)[None],
        jnp.tri(length, dtype=bool)[None], tuple(zip(cache.keys, cache.values)), cache.lengths,
        cross, mask, drafter.probes(Params(view, addon.view(own))), method="decode_block",
    )
    logs = jax.nn.log_softmax(apply({"params": view}, states, method="logits"))
    nll, correct, count = [], [], []
    for i in range(1, addon.depth + 1):
      pad = ((0, 0), (0, i))
      right = jnp.pad(batch["decoder_target_tokens"][:, i:], pad)
      there = jnp.pad(batch["decoder_segment_ids"][:, i:], pad) > 0
      own_logs = logs[:, :, i - 1]
      value = -jnp.take_along_axis(own_logs, right[..., None], axis=-1)[..., 0]
      nll.append(jnp.where(there, value, 0).sum())
      correct.append((there & (own_logs.argmax(-1) == right)).sum().astype(value.dtype))
      count.append(there.sum().astype(value.dtype))
    sums = {"nll": jnp.stack(nll), "correct": jnp.stack(correct), "count": jnp.stack(count)}
    return sums["nll"].sum() / shared, sums


def test_a_drafter_that_says_another_number_of_probes_is_named(model, learned, prompts):

  @dataclasses.dataclass(frozen=True)
  class Forgetful(ProbeDrafter):
    num_probes = 0

  with pytest.raises(InputError, match="drafter.num_probes = 0: allowed is 3, as its probes have"):
    model.generate(prompts, Drafting(Forgetful(ModelReader(model.model)), learned), **OPTIONS)


@pytest.mark.slow  # Compiles the block call over whole targets, for a minute.
def test_probes_learn_behind_the_shipped_base(tmp_path):
  """An add-on, its drafter and its objective, all of them in this file."""
  rows = RowsTask("grammar", "validation", 24).rows()
  write_jsonl(tmp_path / "rows.jsonl", rows)
  task = JsonlTask("rows", str(tmp_path / "rows.jsonl"), targets="targets")
  train(
      str(tmp_path / "run"), [task], Schedule(60, log_every=20, save_every=60),
      checkpoint=str(SHIPPED), addon=Probes(), objective=Foresight(), batch_size=8,
      input_length=64,
      # Residual streams are as large as they are, and what is added to them has to be.
      target_length=32, num_microbatches=2, optimizer=Optimizer("adamw", 10.0, "constant", 5),
  )
  figures = [
      json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  ]
  assert figures[-1]["train/loss"] < 0.7 * figures[0]["train/loss"]
  base = load(SHIPPED)
  prompts = base.encode_prompts([row["inputs"] for row in rows])
  options = {"max_length": 32, "batch_size": 8, "buckets": (64,)}
  greedy = base.generate(prompts, "greedy", **options)
  method = Draft(addon=str(tmp_path / "run/addon")).make(base)
  live = base.generate(prompts, method, **options)
  assert [row.tolist() for row in live.tokens] == [row.tolist() for row in greedy.tokens]
  own = Probes().begin(base.config, base.partitioning, jax.random.key(0))
  fresh = make_addon(Probes(), own, base).drafting
  before = base.generate(prompts, fresh, **options)
  assert sum(live.calls) < 0.95 * sum(before.calls)
  again = replay(base, record(base, prompts, greedy, 32), method, batch_size=8)
  assert [[call.emitted for call in trace] for trace in again.traces] == [
      [call.emitted for call in trace] for trace in live.traces
  ]
