"""Scorers of a model that lies on a mesh, and rows scored again on the host."""

import json
import os
from pathlib import Path
import subprocess
import sys

from devices import device_flags
import pytest

ROOT = Path(__file__).resolve().parent.parent

ON_A_MESH = """
import json, sys
import jax
jax.config.update("jax_enable_x64", True)
import numpy as np
from bpd_jax.addons.folder import save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import save_model
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.scorers.ngram import ngram_params, NgramScorer
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.evaluation.exactness import find_differences, host_device, on_host
from bpd_jax.evaluation.replay import record, replay
from bpd_jax.evaluation.scoring import load_scoring, NeuralSource
from bpd_jax.generation import Generator, load
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.ngram_lm.backoff import join_sequences
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.smoothing import kneser_ney
from bpd_jax.partitioning import make_partitioning, single_device

folder = sys.argv[1]
config = ModelConfig(
    vocab_size=48, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1).with_dtype("float64")
heads = Heads(4, 16)
# Of sizes that don't divide over the mesh.
small = config.replace(d_model=9, d_ff=7, num_heads=3)
make = lambda config, seed: init_params(config, single_device(), jax.random.key(seed))
params = make(config, 0)
own = heads.begin(config, single_device(), jax.random.key(2))
own["w2"] = jax.random.normal(jax.random.key(1), own["w2"].shape) / 8
save_model_with(folder + "/base", config, params, None, heads, own)
save_model(folder + "/small", small, make(small, 7))
mesh = make_partitioning(data=2, fsdp=2, model=2)
one, many = load(folder + "/base"), load(folder + "/base", partitioning=mesh)
rng = np.random.default_rng(0)
prompts = [rng.integers(2, 48, n).tolist() for n in (3, 9, 12, 5, 8, 1, 7)]
options = {"max_length": 12, "batch_size": 4, "buckets": (16,)}
greedy = one.generate(prompts, "greedy", **options)
grams = ngram_params(kneser_ney(count_grams(
    join_sequences([np.where(row == 0, 2, row) for row in greedy.tokens], 48), 2, 48), (1,) * 2))
elsewhere = load(folder + "/small", partitioning=single_device(jax.devices()[5]))
scorings = {
    "source": lambda model: load_scoring((NeuralSource(folder + "/small", weight=0.7),), model),
    "own": lambda model: [elsewhere.scoring(0.7)],
    "n-gram": lambda model: [Scoring(NgramScorer(2), grams, 0.5)],
}
out = {}
recording = record(many, prompts, many.generate(prompts, "greedy", **options), 12)
for name, scoring in scorings.items():
  more = lambda model: {
      "method": model.heads(top_k=3), "search": SearchSettings("p_best", num_paths=3),
      "scoring": scoring(model)}
  alone, found = (
      model.generate(prompts, **more(model), **options) for model in (one, many))
  again = replay(many, recording, batch_size=4, **more(many))
  out[name] = {
      "greedy": all(map(np.array_equal, found.tokens, greedy.tokens)),
      "calls": found.calls == alone.calls == again.calls, "drafted": found.block_efficiency > 1}
(source,) = scorings["source"](many)
out["source lies on"] = sorted({
    (len(leaf.sharding.device_set), leaf.sharding.is_fully_replicated)
    for leaf in jax.tree.leaves(source.params)})

# The default device stands for an accelerator; the first CPU is the host.
jax.config.update("jax_enable_x64", False)
jax.config.update("jax_default_device", jax.devices()[3])
wrong = [row.copy() for row in greedy.tokens]
wrong[2][1] = (wrong[2][1] + 5) % 48
(difference,) = find_differences(config, many.params, prompts, greedy.tokens, wrong)
(same,) = find_differences(config, one.params, prompts, greedy.tokens, wrong)
out["margins"] = [difference.row, difference.position, difference.margin, same.margin]
with jax.enable_x64(True):
  leaves = jax.tree.leaves(on_host(many.params))
out["host"] = [host_device().id, sorted({d.id for leaf in leaves for d in leaf.devices()}),
               sorted({str(leaf.dtype) for leaf in leaves})]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_mesh(tmp_path_factory):
  """What a process with 8 devices, 2 data × 2 fsdp × 2 model, finds."""
  environment = os.environ | {
      "XLA_FLAGS": device_flags(8), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
  }
  done = subprocess.run(
      [sys.executable, "-c", ON_A_MESH, str(tmp_path_factory.mktemp("models"))], cwd=ROOT,
      env=environment, capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["source", "own", "n-gram"])
def test_a_scorer_judges_drafts_of_a_model_on_a_mesh(on_mesh, name):
  assert on_mesh[name] == {"greedy": True, "calls": True, "drafted": True}


def test_a_source_lies_whole_on_every_device_of_the_mesh(on_mesh):
  assert on_mesh["source lies on"] == [[8, True]]


def test_rows_are_scored_again_on_the_host(on_mesh):
  row, position, margin, same = on_mesh["margins"]
  assert (row, position) == (2, 1) and margin == pytest.approx(same, rel=1e-9) and margin > 1e-3
  assert on_mesh["host"] == [0, [0], ["float64"]]
