"""What calls cost: measured, kept, given by file; and `auto`, which decides by it."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bpd_jax import call_costs
from bpd_jax.addons.heads import Heads
from bpd_jax.call_costs import busy_share, CallCosts, costs_key, find_costs, load_costs
from bpd_jax.compilation_cache import SWITCH_VARIABLE
from bpd_jax.decoding.accept import ApproximateTopK
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.decoding.policies.goodput import Goodput
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.scorers.no_repeat import NoRepeatScorer
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Drafting
from bpd_jax.errors import InputError
from bpd_jax.evaluation.policing import GoodputSource
from bpd_jax.evaluation.replay import record, replay
from bpd_jax.evaluation.run import measure_methods, Method
from bpd_jax.evaluation.scoring import NoRepeatSource
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=2,
).with_dtype("float64")
HEADS = Heads(6, 24)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(2, 32, n).tolist() for n in RNG.integers(1, 16, 21)]
OPTIONS = {"max_length": 24, "batch_size": 4, "buckets": (16,)}
# Of calls of 1, 2, 3 and 6 nodes.
CHEAP, DEAR = (1.0, 1.05, 1.1, 1.2), (1.0, 8.0, 9.0, 10.0)


KEPT_FILE = call_costs.kept_file


@pytest.fixture(autouse=True)
def wide(monkeypatch):
  """In float64, and with no table that another test or run has kept."""
  monkeypatch.setattr(call_costs, "kept_file", lambda key: None)
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def params():
  with jax.enable_x64(True):
    return (
        jax.device_get(init_params(CONFIG, single_device(), jax.random.key(2))),
        jax.device_get(HEADS.begin(CONFIG, single_device(), jax.random.key(3))),
    )


@pytest.fixture
def model(params):
  """Heads that repeat the base: some of what they draft passes."""
  base, own = params
  return Generator(CONFIG, base, own_heads=(HEADS, own))


def policing_width(policing):
  """The one width that a policy may take."""
  return policing.policy.widths[np.flatnonzero(np.isfinite(policing.params.seconds))[0]]


def made_up(model, seconds, batch_size=4):
  key = costs_key(CONFIG, model.partitioning, model.heads(), batch_size)
  return CallCosts(key, (1, 2, 3, 6), seconds, tuple((x, x) for x in seconds))


@pytest.mark.parametrize("seconds", [CHEAP, DEAR, (1.0, 1.3, 1.6, 2.5)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_auto_writes_what_greedy_writes(model, seconds, batch_size):
  options = OPTIONS | {"batch_size": batch_size}
  greedy = model.generate(PROMPTS, "greedy", **options)
  found = model.generate(
      PROMPTS, costs=made_up(model, seconds, batch_size), **options
  )
  for mine, theirs in zip(found.tokens, greedy.tokens, strict=True):
    assert mine.tolist() == theirs.tolist()
  drafted = sum(len(call.draft) for trace in found.traces for call in trace)
  assert drafted > 0 and (seconds is DEAR) == (drafted < sum(map(len, found.tokens)) / 3)
  if seconds is CHEAP:
    assert found.block_efficiency > 1.1


@pytest.mark.parametrize("seconds", [CHEAP, (1.0, 1.3, 1.6, 2.5)])
def test_replay_under_a_policy_is_live_decoding(model, seconds):
  policing = made_up(model, seconds).policing()
  greedy = model.generate(PROMPTS, "greedy", **OPTIONS)
  live = model.generate(PROMPTS, model.heads(), policing=policing, **OPTIONS)
  recording = record(model, PROMPTS, greedy, OPTIONS["max_length"])
  again = replay(
      model, recording, model.heads(), policing=policing, batch_size=OPTIONS["batch_size"]
  )
  assert again.traces == live.traces
  widths = {len(call.draft) for trace in live.traces for call in trace}
  assert len(widths) > 2, "one width alone shows nothing"


def test_auto_remembers_and_given_costs_do_not(model):
  costs = made_up(model, DEAR)
  calls = [model.generate(PROMPTS, costs=costs, **OPTIONS).traces for _ in range(2)]
  assert calls[0] == calls[1]
  model._costs[repr(costs.of)] = costs
  first, second = (model.generate(PROMPTS, **OPTIONS) for _ in range(2))
  assert first.costs is second.costs is costs
  assert first.traces == calls[0] != second.traces
  assert second.policing.params.pauses > first.policing.params.pauses > 0
  # Another batch size is another table.
  assert model.generate(PROMPTS[:2], **OPTIONS | {"batch_size": 2}).costs is not costs


def test_costs_are_measured_on_this_machine(model, tmp_path):
  began = time.perf_counter()
  costs = model.call_costs(model.heads(), PROMPTS, 4, 24, (16,))
  elapsed = time.perf_counter() - began
  assert costs.widths == (1, 2, 3, 6) and costs.of["batch_size"] == 4
  for seconds, (low, high) in zip(costs.seconds, costs.ranges, strict=True):
    assert 0 < low <= seconds <= high < elapsed
  assert model.call_costs(model.heads(), PROMPTS, 4, 24, (16,), is_fresh=True) is not costs
  costs.save(tmp_path / "costs.json")
  assert load_costs(tmp_path / "costs.json") == costs


def test_what_ends_at_once_is_no_table(model):
  """Rows of one call have none to time: nothing is drafted, and nothing is kept."""
  costs = model.call_costs(model.heads(), PROMPTS, 4, 1, (16,))
  assert costs.seconds[1:] == (np.inf,) * 3 and not costs.may_be_kept
  assert costs.describe()["seconds"][1:] == [None] * 3
  json.dumps(costs.describe(), allow_nan=False)
  found = model.generate(PROMPTS, **OPTIONS | {"max_length": 1})
  assert found.block_efficiency == 1
  assert min(model.generate(PROMPTS, **OPTIONS).costs.seconds) < np.inf
  longer = model.call_costs(model.heads(), PROMPTS, 4, 24, (16,))
  assert max(longer.seconds) < np.inf


def test_every_width_is_what_is_timed():
  """Of a clock that says w for a call over w nodes, 100 for a batch: w, whatever else was run."""
  taken = []

  def run(policing, limit):
    wide = np.flatnonzero(np.isfinite(policing.params.seconds))
    assert len(wide) == 1
    taken.append(int(wide[0]))
    width = policing.policy.widths[wide[0]]
    # The first call is over the root; this drafter has nothing in every third, two in others.
    calls = [1] + [(1, min(3, width), width)[i % 3] for i in range(limit - 1)]
    return 100.0 + sum(calls), calls

  costs = call_costs.measure_costs(run, (1, 3, 5), {}, 24)
  np.testing.assert_allclose(costs.seconds, (1, 3, 5))
  assert set(taken) == {0, 1, 2}
  # Where the widest was made but twice, nobody knows.
  times = call_costs.solve_times(np.array([[8.0], [26.0], [11.0]]), np.array(
      [[8, 0, 0], [2, 8, 0], [4, 1, 2]]
  ))
  assert times[:2, 0].tolist() == [1, 3] and np.isinf(times[2, 0])


def test_a_table_is_kept_with_the_compiled_programs(monkeypatch, tmp_path):
  runs = []

  def run(policing, limit):
    runs.append(limit)
    return float(limit), [1] + [policing_width(policing)] * (limit - 1)

  monkeypatch.setattr(call_costs, "kept_file", KEPT_FILE)
  monkeypatch.setattr(call_costs, "busy_share", lambda: 0.0)
  key = {"model": "m", "batch_size": 2}
  names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
  before = {name: getattr(jax.config, name) for name in names}
  try:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", True)
    first = find_costs(run, (1, 2), key, 8)
    assert runs and first.may_be_kept
    runs.clear()
    assert find_costs(run, (1, 2), key, 8) == first and not runs
    # Other widths, a request, another key, a file that was cut.
    find_costs(run, (1, 3), key, 8)
    assert runs
    for again in ({"is_fresh": True}, {}):
      runs.clear()
      [file] = tmp_path.glob("call_costs_*.json")
      if not again:
        file.write_text(file.read_text()[:40])
      find_costs(run, (1, 3), key, 8, **again)
      assert runs
    runs.clear()
    monkeypatch.setattr(call_costs, "busy_share", lambda: 0.9)
    busy = find_costs(run, (1, 2), {**key, "batch_size": 3}, 8)
    assert runs and not busy.may_be_kept and len([*tmp_path.glob("call_costs_*")]) == 1
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"of": {"batch_size": 5}}, "costs batch_size = 5: allowed is 4, as it is here"),
        ({"of": {"model": "other"}}, "costs model = 'other': allowed is '"),
        ({"of": {"device": "1 × TPU v5e"}}, "costs device = '1 × TPU v5e'"),
        ({"widths": [1, 2, 3, 9]}, "costs widths = [1, 2, 3, 9]: allowed is 1 … 6"),
        ({"widths": [2, 3, 4, 6]}, "costs widths = [2, 3, 4, 6]: allowed is whole numbers, rising"),
        ({"widths": [1, 3, 2, 6]}, "costs widths = [1, 3, 2, 6]: allowed is whole"),
        ({"widths": [1, 2.5, 3, 6]}, "costs widths = [1, 2.5, 3, 6]: allowed is whole"),
        ({"seconds": [1, 2, 3]}, "costs seconds = [1.0, 2.0, 3.0]: allowed is 4 numbers"),
        ({"seconds": [1, 2, 3, -1]}, "costs seconds = [1.0, 2.0, 3.0, -1.0]: allowed is positive"),
        ({"seconds": [1, 2, 3, "x"]}, "allowed is a file of CallCosts.save"),
        ({"seconds": [1, 2, 3, None]}, "(not all of its seconds are finite numbers)"),
        ({"ranges": [[1, 1]] * 3 + [[1, float("nan")]]}, "(not all of its seconds are finite"),
        ({"busy": float("inf")}, "(not all of its seconds are finite numbers)"),
        ({"else": 1}, "allowed is a file of CallCosts.save (its fields aren't"),
    ],
)
def test_another_table_is_one_line(model, tmp_path, change, message):
  costs = made_up(model, CHEAP)
  file = tmp_path / "costs.json"
  costs.save(file)
  source = GoodputSource(str(file))
  ask = lambda: source.make(model, model.heads(), PROMPTS, 4, 24)
  assert ask().costs == costs
  fields = json.loads(file.read_text())
  fields["of"] |= change.pop("of", {})
  file.write_text(json.dumps(fields | change))
  with pytest.raises(InputError) as caught:
    ask()
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none(model, tmp_path):
  with pytest.raises(InputError, match="allowed is a file of CallCosts.save"):
    load_costs(tmp_path / "none.json")
  with pytest.raises(InputError, match="GoodputSource.is_fresh"):
    GoodputSource("a.json", is_fresh=True)


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda x: x.call_costs(x.heads(), []), "prompts = []: allowed is a non-empty list"),
        (lambda x: x.call_costs(x.heads(), [[1] * 3000]), "prompts[0] length = 3000"),
        (lambda x: x.call_costs(x.heads(), PROMPTS, 0), "batch_size = 0"),
        (lambda x: x.call_costs(Drafting(ReferenceDrafter(3)), PROMPTS), "reads no references"),
        (lambda x: x.generate(PROMPTS, references=PROMPTS), "references = [["),
        (lambda x: x.generate(PROMPTS, rule=ApproximateTopK(2)), "rule = ApproximateTopK("),
        (lambda x: x.generate(PROMPTS, search=SearchSettings("p_best")), "search = Search"),
        (lambda x: x.generate(PROMPTS, scoring=[Scoring(NoRepeatScorer())]), "scoring = [Scoring("),
        (lambda x: x.generate(PROMPTS, policing=made_up(x, CHEAP).policing()), "policing = "),
        (lambda x: x.generate(PROMPTS, costs=made_up(x, CHEAP)), "costs batch_size = 4: all"),
        (lambda x: Method("x", scorers=[NoRepeatSource()], policy=GoodputSource()), "x policy ="),
        (lambda x: Method("x", search="p_best", policy=GoodputSource()), "x policy = 'Goodput"),
        (lambda x: dataclasses.replace(made_up(x, CHEAP), seconds=(1, 2, 3, np.inf)).save("a"),
         "costs seconds = [1, 2, 3, None]: allowed is one of every size"),
        (lambda x: Goodput((2, 4)), "Goodput.widths = (2, 4): allowed is rising from 1"),
        (lambda x: Goodput((1, 4)).params((1.0,)), "seconds = [1.0]: allowed is 2 positive"),
    ],
)
def test_what_costs_cant_be_of_is_named_before_anything_compiles(model, ask, message):
  with pytest.raises(InputError) as caught:
    ask(model)
  assert message in str(caught.value)
  assert model.num_compilations == 0


def test_an_evaluation_says_which_costs_decided(model, tmp_path):
  file = tmp_path / "costs.json"
  costs = made_up(model, (1.0, 1.3, 1.6, 2.5))
  costs.save(file)
  methods = [Method("blockwise"), Method("auto", policy=GoodputSource(str(file)))]
  measured = measure_methods(
      model, PROMPTS, methods, max_decode_length=24, batch_size=4, repeats=1
  )
  auto, fixed = measured["auto"].results, measured["blockwise"].results
  assert auto["policy"] == "goodput" and auto["costs"] == costs.describe()
  assert "policy" not in fixed and auto["identical_to_greedy"] == 1
  assert 1 < auto["nodes_per_call"] < fixed["nodes_per_call"] <= 6
  assert auto["wasted_tokens"] < fixed["wasted_tokens"]
  # By hand, of the traces.
  calls = [call for trace in measured["auto"].generation.traces for call in trace]
  assert auto["wasted_tokens"] == sum(len(call.draft) - call.num_accepted for call in calls)
  assert auto["nodes_per_call"] == pytest.approx(1 + np.mean([len(x.draft) for x in calls]))


def test_the_share_that_others_use(tmp_path, monkeypatch):
  account = tmp_path / "stat"
  lines = iter(["cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 …", "cpu  160 0 60 820 60 0 0 0 0 0\n…"])
  account.write_text(next(lines))
  monkeypatch.setattr(time, "sleep", lambda _: account.write_text(next(lines)))
  # 100 passed, 20 of them idle and 10 waiting for a disk.
  assert busy_share(account) == 0.7
  assert busy_share(tmp_path / "none") is None
  table = CallCosts({}, (1,), (1.0,), ((1, 1),))
  assert table.may_be_kept and not dataclasses.replace(table, busy=0.7).may_be_kept


ON_TWO = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=20)
from bpd_jax import call_costs
call_costs.busy_share = lambda: 0.0
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
me = jax.process_index()
runs = []
def run(policing, limit):
  runs.append(limit)
  widths = policing.policy.widths
  wide = [w for w, s in zip(widths, policing.params.seconds) if s < float("inf")]
  return (1.0 + me) * limit, [1] + wide * (limit - 1)
found = []
for name, keeper in (("nobody", None), ("first", 0), ("second", 1)):
  key = {"of": name}
  if me == keeper:
    seconds = (7.0, 8.0)
    call_costs.CallCosts(key, (1, 2), seconds, tuple((x, x) for x in seconds)).save(
        call_costs.kept_file(key))
  before = len(runs)
  costs = call_costs.find_costs(run, (1, 2), key, 8)
  found.append((name, list(costs.seconds), len(runs) > before))
print(json.dumps(found))
"""


# Two processes that wait for each other, each with a start of its own.
@pytest.mark.slow
def test_two_processes_decide_by_the_first_ones_table(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", SWITCH_VARIABLE: "true"}
  processes = [
      subprocess.Popen(
          [sys.executable, "-c", ON_TWO, address, str(number), str(tmp_path / str(number))],
          env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      )
      for number in range(2)
  ]
  outs = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outs
  first, second = (json.loads(out.splitlines()[-1]) for out, _ in outs)
  # What one has kept and the other hasn't is read where the first has it, and else measured.
  assert first == second == [
      ["nobody", [1.0, 1.0], True], ["first", [7.0, 8.0], False], ["second", [1.0, 1.0], True]
  ]
