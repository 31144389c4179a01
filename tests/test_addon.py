"""An add-on of one's own: drafter, parameters and objective stand here, and nothing else knows.

It is trained behind the shipped base, stored, read again, decoded, replayed and reported, on
one device and on eight.
"""

import dataclasses
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

from devices import device_flags
from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_runs import cut, write_jsonl

from bpd_jax.addons.addon import Addon, Made, make_addon
from bpd_jax.addons.folder import load_addon, save_addon
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.rows import RowsTask
from bpd_jax.decoding.lattice import top_k_lattice
from bpd_jax.decoding.types import Drafter, Drafting
from bpd_jax.errors import InputError
from bpd_jax.evaluate import evaluate
from bpd_jax.evaluation.drafting import Draft
from bpd_jax.evaluation.replay import record, replay
from bpd_jax.evaluation.run import Method
from bpd_jax.evaluation.validation import Validation
from bpd_jax.generation import load
from bpd_jax.reader import ModelReader
from bpd_jax.train import begin_addon, train
from bpd_jax.training.loop import Schedule
from bpd_jax.training.loss import Loss
from bpd_jax.training.objective import decoder_states, Objective
from bpd_jax.training.optimizer import Optimizer

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "experiments/docstrings/model"
ROWS = 24


@struct.dataclass
class TurnState:
  hidden: jax.Array
  is_there: jax.Array


@dataclasses.dataclass(frozen=True)
class TurnDrafter(Drafter):
  """Step i reads the last state, turned by matrix i, as the base reads it."""

  reader: ModelReader
  depth: int
  num_candidates: int = 1

  def init(self, params, prompt, context):
    batch = prompt.lengths.shape[0]
    return TurnState(self.reader.empty_hidden(batch), jnp.zeros([batch], bool))

  def start(self, params, state, step, proposed):
    return TurnState(step.hidden, step.num_tokens > 0)

  def propose(self, params, state, noise, past):
    states = state.hidden[:, None] + jnp.einsum(
        "bd,ide->bie", state.hidden, params.own["turn"][: self.depth]
    )
    num_steps = jnp.where(state.is_there, self.depth, 0)
    lattice = top_k_lattice(
        self.reader.logits(params.base, states), self.num_candidates, num_steps
    )
    return lattice.replace(states=states)


@dataclasses.dataclass(frozen=True)
class Turn(Addon):
  """A matrix a step."""

  block_size: int = 4

  def init(self, config, key):
    shape = (self.block_size - 1, config.d_model, config.d_model)
    return {"turn": nn.Partitioned(jnp.zeros(shape, config.param_dtype), ("block", "embed", None))}

  def make(self, reader, own, *, block_size=None, top_k=1):
    block_size = self.block_size if block_size is None else block_size
    if not 2 <= block_size <= self.block_size:
      raise InputError("block_size", block_size, f"2 … {self.block_size}, the add-on's")
    return Made(Drafting(TurnDrafter(reader, block_size - 1, top_k), own))


@dataclasses.dataclass(frozen=True)
class Ahead(Objective):
  """Cross-entropy of each step over the tokens ahead, of the base's own outputs."""

  texts: str = "outputs"
  reads_states: bool = True

  def targets(self, addon, batch):
    """Targets and where there are any, [steps, batch, length]."""
    tokens, segments = batch["decoder_target_tokens"], batch["decoder_segment_ids"]
    shift = lambda x, i: jnp.pad(x[:, i:], ((0, 0), (0, i)))
    steps = range(1, addon.block_size)
    there = [(shift(segments, i) == segments) & (segments > 0) for i in steps]
    return jnp.stack([shift(tokens, i) for i in steps]), jnp.stack(there)

  def shared(self, addon, batch, key):
    return (batch["decoder_segment_ids"] > 0).sum()

  def loss(self, addon, model, base, own, batch, shared, key):
    hidden = decoder_states(model, base, batch)
    states = hidden + jnp.einsum("bld,ide->ible", hidden, own["turn"])
    logits = model.apply({"params": base}, states, method="logits")
    targets, there = self.targets(addon, batch)
    logs = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    add = lambda x: jnp.where(there, x, 0).sum((1, 2))
    sums = {
        "nll": add(nll), "correct": add((logits.argmax(-1) == targets).astype(nll.dtype)),
        "count": add(jnp.ones_like(nll)),
    }
    return sums["nll"].sum() / shared, sums


def work(folder, partitioning=None):
  """Trains, and decodes the shipped rows with what came of it; returns what was measured."""
  rows = RowsTask("grammar", "validation", ROWS).rows()
  folder.mkdir(parents=True, exist_ok=True)
  write_jsonl(folder / "rows.jsonl", rows)
  task = JsonlTask("rows", str(folder / "rows.jsonl"), targets="targets")
  train(
      str(folder / "run"), [task], Schedule(30, log_every=10, save_every=30),
      checkpoint=str(SHIPPED), addon=Turn(), objective=Ahead(), batch_size=8, input_length=64,
      target_length=32, optimizer=Optimizer("adamw", 3e-3, "constant", 2),
      validation=Validation([task], 8, 8), partitioning=partitioning,
  )
  base = load(SHIPPED, partitioning=partitioning)
  prompts = base.encode_prompts([row["inputs"] for row in rows])
  options = {"max_length": 32, "batch_size": 8, "buckets": (64,)}
  greedy = base.generate(prompts, "greedy", **options)
  method = Draft(addon=str(folder / "run/addon")).make(base)
  live = base.generate(prompts, method, **options)
  again = replay(base, record(base, prompts, greedy, 32), method, batch_size=8)
  found = {
      "greedy": [row.tolist() for row in greedy.tokens],
      "tokens": [row.tolist() for row in live.tokens], "calls": live.calls,
      "is_replayed": [[call.emitted for call in trace] for trace in again.traces]
                     == [[call.emitted for call in trace] for trace in live.traces],
      "figures": [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()],
  }
  (folder / "found.json").write_text(json.dumps(found))
  return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("addons")


@pytest.fixture(scope="module")
def one(folder):
  return work(folder / "one")


def test_it_learns_and_drafts_greedys_tokens_in_fewer_calls(one):
  assert one["tokens"] == one["greedy"] and one["is_replayed"]
  first, *_, last = [line for line in one["figures"] if "train/loss" in line]
  assert last["train/loss"] < 0.8 * first["train/loss"]
  (measured,) = [line for line in one["figures"] if "validation/block_efficiency" in line]
  efficiency = sum(map(len, one["tokens"])) / sum(one["calls"])
  assert efficiency > 1.2 and measured["validation/block_efficiency"] > 1.2
  assert measured["validation/accuracy_head_1"] > 0.2


def test_it_is_stored_with_what_it_needs(one, folder):
  found = json.loads((folder / "one/run/addon/addon.json").read_text())
  assert found["kind"] == "test_addon:Turn" and found["config"] == {"block_size": 4}
  base = load(SHIPPED)
  assert found["needs"] == {"base": base.fingerprint}
  assert found["recipe"]["objective"]["kind"] == "test_addon:Ahead"
  addon, own = load_addon(folder / "one/run/addon", base)
  assert addon == Turn() and float(jnp.abs(own["turn"]).max()) > 0
  assert make_addon(addon, own, base).drafting.drafter == TurnDrafter(ModelReader(base.model), 3)


def test_it_is_reported_as_any_method(one, folder):
  task = JsonlTask("rows", str(folder / "one/rows.jsonl"), targets="targets", max_examples=4)
  mine = Draft(addon=str(folder / "one/run/addon"))
  results = evaluate(
      str(SHIPPED), [task],
      [Method("heads", Draft(4)), Method("mine", mine)],
      str(folder / "results"), max_decode_length=32, batch_size=4, repeats=1, has_report=True,
  )
  methods = results["tasks"]["rows"]["methods"]
  assert methods["mine"]["draft"]["addon"] == mine.addon
  assert all(entry["identical_to_greedy"] == 1 for entry in methods.values())
  assert methods["mine"]["decoder_calls"] == sum(one["calls"][:4])
  analysis = json.loads((folder / "results/analysis.json").read_text())["rows"]
  assert [lattice["methods"] for lattice in analysis["lattices"]] == [["heads"], ["mine"]]
  assert analysis["methods"]["mine"]["replay_equals_live"] == 1
  assert {decode["method"] for decode in analysis["decodes"]} == {"heads", "mine"}
  page = (folder / "results/report.html").read_text()
  assert "<td>mine</td>" in page and "decoded with mine: " in page


@pytest.mark.slow  # Eight devices compile everything anew, for half a minute.
def test_on_eight_devices_it_is_the_same(one, folder):
  environment = os.environ | {
      "XLA_FLAGS": device_flags(8), "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
  }
  code = (
      "import sys; from pathlib import Path; from test_addon import work; "
      "from bpd_jax.partitioning import make_partitioning; "
      "work(Path(sys.argv[1]), make_partitioning(2, 2, 2))"
  )
  done = subprocess.run(
      [sys.executable, "-c", code, str(folder / "eight")], cwd=ROOT, env=environment,
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  many = json.loads((folder / "eight/found.json").read_text())
  assert many["tokens"] == many["greedy"] == one["greedy"] and many["is_replayed"]
  for line, again in zip(one["figures"], many["figures"], strict=True):
    loss = [key for key in line if key.endswith("/loss")]
    assert loss and {key: again[key] for key in loss} == pytest.approx(
        {key: line[key] for key in loss}, rel=1e-3
    )
  assert many["calls"] == pytest.approx(one["calls"], abs=2)
  # What one mesh stored another reads.
  addon, own = load_addon(folder / "eight/run/addon", load(SHIPPED))
  np.testing.assert_allclose(
      own["turn"], load_addon(folder / "one/run/addon", load(SHIPPED))[1]["turn"], atol=1e-3
  )
  assert addon == Turn()


@pytest.mark.parametrize("change, message", [
    ({"kind": "nowhere:Turn"}, r"kind = 'nowhere:Turn': allowed is module:Class of an add-on"),
    ({"kind": "json:dumps"}, r"kind = 'json:dumps': allowed is module:Class of an add-on"),
    ({"kind": 3}, "kind = 3: allowed is module:Class"),
    ({"kind": "bpd_jax.addons.addon:Addon"}, "addon:Addon': allowed is module:Class of an add-on"),
    ({"needs": None}, "base = None: allowed is"),
    ({"kind": "test_addon:Wanting", "config": {}}, r"config = {}: allowed is all of the .*'size'"),
    ({"config": {"block": 4}}, r"config.block = 4: allowed is one of the fields \['block_size'\]"),
    ({"needs": {"base": "0123"}}, r"base = '0123': allowed is \w{16}, the model's fingerprint"),
    ({"vocabulary": "x"}, "vocabulary = 'x': allowed is .*, the model's"),
    ({"d_model": 8}, "d_model = 8: allowed is 256, the model's"),
    ({"config": {"block_size": 5}}, r"turn shape = \(3, 256, 256\): allowed is \(4, 256, 256\)"),
])
def test_folders_that_are_none_of_this_model(one, folder, tmp_path, change, message):
  shutil.copytree(folder / "one/run/addon", tmp_path / "addon")
  path = tmp_path / "addon/addon.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(InputError, match=message):
    load_addon(tmp_path / "addon", load(SHIPPED))


def test_a_folder_that_was_cut_short(one, folder, tmp_path):
  shutil.copytree(folder / "one/run/addon", tmp_path / "addon")
  cut(*(path for path in (tmp_path / "addon/params").rglob("*") if path.stat().st_size > 10_000))
  with pytest.raises(InputError, match="params = .*: allowed is a whole Orbax folder"):
    load_addon(tmp_path / "addon", load(SHIPPED))
  (tmp_path / "addon/addon.json").unlink()
  with pytest.raises(InputError, match="addon.json"):
    load_addon(tmp_path / "addon", load(SHIPPED))
  with pytest.raises(InputError, match="addon = .*absent': allowed is a folder that exists"):
    load_addon(tmp_path / "absent", load(SHIPPED))


def test_what_it_cant_draft_is_named_before_anything_compiles(one, folder):
  base = load(SHIPPED)
  with pytest.raises(InputError, match="block_size = 5: allowed is 2 … 4, the add-on's"):
    Draft(5, addon=str(folder / "one/run/addon")).make(base)
  for name, value in (("addon", "heads"), ("objective", None)):
    parts = {"addon": Turn(), "objective": Ahead()} | {name: value}
    with pytest.raises(InputError, match=f"train.{name} = .*: allowed is of a class derived"):
      train(str(folder / "never"), [], Schedule(1), checkpoint=str(SHIPPED), **parts)
  with pytest.raises(InputError, match="objective = 'Loss': allowed is one that trains Turn"):
    train(
        str(folder / "never"), [], Schedule(1), checkpoint=str(SHIPPED), addon=Turn(),
        objective=Loss(),
    )
  both = dataclasses.replace(Ahead("references"))
  object.__setattr__(both, "trains_base", True)
  with pytest.raises(InputError, match="reads_states = True: allowed is False where the base is"):
    train(
        str(folder / "never"), [], Schedule(1), checkpoint=str(SHIPPED), addon=Turn(),
        objective=both,
    )
  with pytest.raises(InputError, match="train.checkpoint = None: allowed is a model folder, where"):
    train(
        str(folder / "never"), [], Schedule(1), config=base.config, addon=Turn(),
        objective=Ahead(),
    )


def test_a_run_goes_on_with_the_checkpoints_own(one, folder, tmp_path):
  shutil.copytree(SHIPPED, tmp_path / "base")
  shutil.copytree(folder / "one/run/addon", tmp_path / "base/addons/turn")
  base = load(tmp_path / "base")
  own, said = begin_addon(Turn(), base, str(tmp_path / "base"), False, 0)
  assert float(jnp.abs(own["turn"]).max()) > 0 and said == f"turn: from {tmp_path / 'base'}"
  own, said = begin_addon(Turn(), base, str(tmp_path / "base"), True, 0)
  assert float(jnp.abs(own["turn"]).max()) == 0 and said == "turn: new"
  with pytest.raises(InputError, match=r"addon = Turn\(.*=3\): allowed is Turn\(.*=4\), as"):
    begin_addon(Turn(3), base, str(tmp_path / "base"), False, 0)


def test_an_add_on_that_no_other_process_can_import_isnt_stored(tmp_path):

  @dataclasses.dataclass(frozen=True)
  class Local(Turn):
    pass

  with pytest.raises(InputError, match="addon = 'test_addon:.*<locals>.Local': allowed is of a"):
    save_addon(tmp_path / "addon", Local(), {}, load(SHIPPED))
  assert not list(tmp_path.iterdir())


def test_an_add_on_under_a_folders_name_is_the_one_that_lies_there(one, folder, tmp_path):
  base = load(SHIPPED)
  addon, own = load_addon(folder / "one/run/addon", base)
  turns = []
  for scale in (1, 2):
    other = jax.tree.map(lambda leaf, scale=scale: scale * leaf, own)
    save_addon(tmp_path / "addon", addon, other, base, may_replace=True)
    turns.append(Draft(addon=str(tmp_path / "addon")).make(base).params["turn"])
  np.testing.assert_array_equal(2 * turns[0], turns[1])


@dataclasses.dataclass(frozen=True)
class Wanting(Turn):
  size: int = dataclasses.field(kw_only=True)
