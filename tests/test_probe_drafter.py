"""A drafter whose probes enter below the last layer: decoded, searched and replayed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpd_jax.decoding.lattice import top_k_lattice
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Drafter, Drafting
from bpd_jax.evaluation.analysis import lattice_statistics
from bpd_jax.evaluation.replay import record, replay
from bpd_jax.evaluation.watch import watch
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.model.probes import ProbeSpec
from bpd_jax.partitioning import single_device
from bpd_jax.reader import ModelReader

CONFIG = ModelConfig(
    vocab_size=24, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=3,
).with_dtype("float64")
MAX_LENGTH, K = 14, 3
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
