"""The loop of a run: stopped anywhere, it ends where an undisturbed one ends."""

import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from train_runs import assert_same, cut, last_state, leaves

from bpd_jax.addons.heads import Heads
from bpd_jax.data.batches import assemble
from bpd_jax.errors import InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device
from bpd_jax.training import loop, metrics
from bpd_jax.training.checkpointing import Checkpoints
from bpd_jax.training.loop import claim_run, open_run, Schedule, train_steps, TrainingError
from bpd_jax.training.loss import Loss
from bpd_jax.training.metrics import Display, MetricWriter, read_metrics, shown
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.step import place_batch, Step

# Of reading a damaged state, Orbax leaves coroutines behind.
UNREAD = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning",
                                    "ignore:coroutine.*was never awaited:RuntimeWarning")
# What tests/test_train.py trains, so that the step is compiled once.
CONFIG = ModelConfig(
    vocab_size=260, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1, dropout_rate=0.1,
)
HEADS = Heads(3, 16)
STEPS = 12
# Of the undisturbed run's evaluations, by step.
FIGURES = {4: 3.0, 8: 1.0, 12: 2.0}


@pytest.fixture(scope="module")
def step():
  return make_step(CONFIG)


def make_step(config):
  optimizer = Optimizer("adamw", 1e-2, "constant", 4)
  return Step(
      config, single_device(), optimizer, Loss(trains_base=True), HEADS, average_decay=0.9
  )


class Source:
  """Random rows, and something that happens when the batch of a step is read."""

  def __init__(self, **happens):
    self._happens = {int(name.removeprefix("at_")): what for name, what in happens.items()}

  def batch(self, step):
    self._happens.get(step, lambda: None)()
    rng = np.random.default_rng(step)
    row = lambda: np.append(rng.integers(2, 259, rng.integers(2, 8)), 1).astype(np.int32)
    return assemble([[(row(), row())] for _ in range(4)], 8, 12)


class Scripted:
  """An evaluation whose figures are given, and that keeps the parameters it gets."""

  def __init__(self, figures=FIGURES, **happens):
    self.figures, self.seen = figures, {}
    self._happens = {int(name.removeprefix("at_")): what for name, what in happens.items()}

  def __call__(self, params, step):
    self._happens.pop(step, lambda: None)()
    self.seen[step] = leaves(jax.device_get(params))
    return {"validation/loss": self.figures.get(step, 9.0)}


@functools.cache
def initial_params():
  where = single_device(), jax.random.key(0)
  parts = (init_params(CONFIG, *where), HEADS.begin(CONFIG, *where))
  return dict(zip(("base", "own"), jax.device_get(parts)))


def train(workdir, step, source=None, evaluate=None, num_steps=STEPS, params=None, **schedule):
  schedule = {
      "log_every": 3, "save_every": 3, "evaluate_every": 4, "best_metric": "validation/loss",
      **schedule,
  }
  return train_steps(
      workdir, step, source or Source(), Schedule(num_steps, **schedule),
      lambda: jax.tree.map(jnp.array, params or initial_params()), seed=5,
      evaluate=evaluate or Scripted(), display=Display(num_steps, Console(file=io.StringIO())),
  )


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


def steps_kept(workdir):
  return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def steps_by_name(workdir):
  """The steps of each figure in `metrics.jsonl`, in order."""
  found = {}
  for line in read_metrics(workdir):
    for name in line.keys() - {"step"}:
      found.setdefault(name, []).append(line["step"])
  return found


@pytest.fixture(scope="module")
def undisturbed(step, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
  evaluate = Scripted()
  outcome = train(workdir, step, evaluate=evaluate)
  assert (outcome.step, outcome.is_complete, outcome.best_step) == (STEPS, True, 8)
  return workdir, outcome, evaluate.seen


def assert_ends_as(workdir, undisturbed):
  """A run's state, figures and kept states are those of the undisturbed one."""
  assert last_state(workdir)[0] == STEPS
  assert_same(last_state(workdir)[1], last_state(undisturbed)[1])
  assert steps_by_name(workdir) == steps_by_name(undisturbed)
  assert steps_kept(workdir) == steps_kept(undisturbed)
  evaluations = lambda folder: [
      line for line in read_metrics(folder) if "validation/loss" in line
  ]
  assert evaluations(workdir) == evaluations(undisturbed)


def test_what_a_step_draws_depends_on_its_number(step):
  batch = place_batch(single_device(), Source().batch(0))

  def loss(number):
    state = step.init(jax.tree.map(jnp.array, initial_params()))
    state = state.replace(step=jnp.full([], number, jnp.int32))
    return float(step(state, batch, jax.random.key(5))[1]["loss"])

  # The same parameters and rows, but for dropout.
  assert loss(0) == loss(0) != loss(1) != loss(2)


def test_best_and_last_states_stay_and_others_go(undisturbed, step):
  workdir, outcome, seen = undisturbed
  assert steps_kept(workdir) == ["12", "8"]
  assert steps_by_name(workdir)["validation/loss"] == [4, 8, 12]
  assert steps_by_name(workdir)["train/loss"] == [3, 6, 9, 12]
  # The best parameters are the averaged ones of that step, which were evaluated.
  assert_same(leaves(jax.device_get(outcome.best_params)), seen[8])
  assert_same(leaves(jax.device_get(step.averaged(outcome.state))), seen[12])
  trained, averaged = (
      leaves(jax.device_get(tree)) for tree in (outcome.state.params, outcome.state.average)
  )
  assert any((trained[name] != averaged[name]).any() for name in trained)


def test_sigterm_between_steps_saves_and_the_same_command_goes_on(step, tmp_path, undisturbed):
  handler = signal.getsignal(signal.SIGTERM)
  outcome = train(tmp_path, step, Source(at_6=terminate))
  assert (outcome.step, outcome.is_complete, outcome.best_step) == (7, False, 4)
  assert last_state(tmp_path)[0] == 7 and steps_kept(tmp_path) == ["4", "7"]
  assert signal.getsignal(signal.SIGTERM) is handler
  assert train(tmp_path, step).is_complete
  assert_ends_as(tmp_path, undisturbed[0])


def test_sigterm_during_evaluation_lets_it_end(step, tmp_path, undisturbed):
  outcome = train(tmp_path, step, evaluate=Scripted(at_8=terminate))
  assert (outcome.step, outcome.is_complete, outcome.best_step) == (8, False, 8)
  assert steps_by_name(tmp_path)["validation/loss"] == [4, 8]
  train(tmp_path, step)
  assert_ends_as(tmp_path, undisturbed[0])


class Killed(BaseException):
  pass


def kill():
  raise Killed


@pytest.mark.parametrize("at", [8, STEPS])
def test_an_evaluation_that_was_cut_short_is_done_again(step, tmp_path, undisturbed, at):
  with pytest.raises(Killed):
    train(tmp_path, step, evaluate=Scripted(**{f"at_{at}": kill}))
  assert last_state(tmp_path)[0] == at
  assert at not in steps_by_name(tmp_path)["validation/loss"]
  evaluate = Scripted()
  train(tmp_path, step, evaluate=evaluate)
  assert min(evaluate.seen) == at
  assert_same(evaluate.seen[at], undisturbed[2][at])
  assert_ends_as(tmp_path, undisturbed[0])
  # And then never again.
  evaluate = Scripted()
  train(tmp_path, step, evaluate=evaluate)
  assert evaluate.seen == {}


def test_a_longer_run_goes_on_from_a_finished_one(step, tmp_path, undisturbed):
  assert train(tmp_path, step, num_steps=8).is_complete
  seen = []
  source = Source(**{f"at_{i}": (lambda i=i: seen.append(i)) for i in range(STEPS)})
  train(tmp_path, step, source)
  assert seen == [8, 9, 10, 11]
  assert_same(last_state(tmp_path)[1], last_state(undisturbed[0])[1])
  with pytest.raises(InputError, match=r"num_steps = 11: allowed is at least 12, the steps that"):
    train(tmp_path, step, num_steps=11)
  assert steps_kept(tmp_path) == ["12", "8"]


@pytest.mark.parametrize("figures, is_higher_better, best", [
    ({4: 1.0, 8: 3.0, 12: 2.0}, False, 4),
    ({4: 1.0, 8: 3.0, 12: 2.0}, True, 8),
    ({4: 1.0, 8: 1.0, 12: 2.0}, False, 8),
    ({4: 2.0, 8: float("nan"), 12: 3.0}, False, 4),
    ({4: float("nan"), 8: float("nan"), 12: float("inf")}, False, None),
])
def test_which_state_is_best(tmp_path, figures, is_higher_better, best):
  state = {"x": np.arange(3.0)}
  with Checkpoints(tmp_path, is_higher_better=is_higher_better) as checkpoints:
    for step, figure in figures.items():
      checkpoints.save(step, state)
      # The figure comes when the state may be written already.
      checkpoints.figures[step] = figure
      assert checkpoints.last_step() == step
    checkpoints.tidy()
    assert checkpoints.best_step() == best
  assert {int(name) for name in steps_kept(tmp_path)} == {12, best} - {None}


def test_what_a_killed_save_or_deletion_left_is_cleared(step, tmp_path, undisturbed):
  train(tmp_path, step, Source(at_6=terminate))
  folder = tmp_path / "checkpoints"
  # A state that was half written, and an old one that was half deleted.
  shutil.copytree(folder / "7", folder / "11.orbax-checkpoint-tmp")
  (folder / "11.orbax-checkpoint-tmp/commit_success.txt").unlink()
  shutil.copytree(folder / "4", folder / "3")
  for path in ("_CHECKPOINT_METADATA", "default/manifest.ocdbt"):
    (folder / "3" / path).unlink()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 9, "train/loss": 1}\n{"step": 10, "tra')
  train(tmp_path, step)
  assert_ends_as(tmp_path, undisturbed[0])


def test_loss_that_is_not_finite_names_step_and_checkpoint(step, tmp_path):
  class Doctored(Source):

    def batch(self, number):
      batch = super().batch(number)
      if number == 7:
        batch["decoder_target_tokens"][0, 0] = 1000  # There is no such token.
      return batch

  message = "loss nan, gradient norm .* at step 8; the last good checkpoint is that of step 6"
  evaluate = Scripted()
  with pytest.raises(TrainingError, match=message):
    train(tmp_path, step, Doctored(), evaluate, save_every=6, evaluate_every=6)
  assert steps_kept(tmp_path) == ["6"]
  with Checkpoints(tmp_path) as checkpoints:
    state = checkpoints.restore(6, step.abstract_state)
  assert loop.all_finite(state)
  assert_same(leaves(jax.device_get(step.averaged(state))), evaluate.seen[6])


def test_parameters_that_are_not_finite_are_not_saved(step, tmp_path):
  # Of a token that doesn't occur, so that the loss is fine.
  embedding = initial_params()["base"]["embedding"].copy()
  embedding[259] = np.inf
  params = initial_params() | {"base": initial_params()["base"] | {"embedding": embedding}}
  message = "parameters that aren't finite at step 1; there is no checkpoint before it"
  with pytest.raises(TrainingError, match=message):
    train(tmp_path, step, params=params, save_every=1)
  assert steps_kept(tmp_path) == []


@UNREAD
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("damage", [
    lambda folder: cut(*folder.rglob("d/*")),
    lambda folder: cut(folder / "default/manifest.ocdbt"),
    lambda folder: cut(folder / "default/_METADATA"),
    lambda folder: shutil.rmtree(folder / "default"),
])
def test_a_damaged_state_is_named_and_left_alone(step, tmp_path, undisturbed, damage):
  shutil.copytree(undisturbed[0], tmp_path / "run")
  damage(tmp_path / "run/checkpoints/12")
  with pytest.raises(InputError) as error:
    train(tmp_path / "run", step, num_steps=STEPS + 1)
  assert re.match(
      r"checkpoint = '.*/checkpoints/12': allowed is a whole state of this run's shapes; "
      r"without that folder the run goes on from step 8 \(", str(error.value)
  )
  assert "\n" not in str(error.value) and len(str(error.value)) < 500
  assert steps_kept(tmp_path / "run") == ["12", "8"]
  # As the message says.
  shutil.rmtree(tmp_path / "run/checkpoints/12")
  assert train(tmp_path / "run", step).is_complete
  assert_same(last_state(tmp_path / "run")[1], last_state(undisturbed[0])[1])


@UNREAD
@pytest.mark.usefixtures("leftovers")
def test_an_array_that_was_cut_is_named(tmp_path):
  # Small arrays lie elsewhere, and other errors come of them.
  state = {"x": jnp.arange(3000.0)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
  cut(*tmp_path.rglob("ocdbt.process_0/d/*"))
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(InputError, match="without that folder the run starts anew") as error:
      checkpoints.restore(1, state)
  assert "\n" not in str(error.value) and len(str(error.value)) < 500


@UNREAD
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("num_saves", [1, 2])
def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path, num_saves):
  # The disk refuses in the background; it is noticed at the next save, or at the end.
  state = {"x": jax.random.normal(jax.random.key(0), [3000])}
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.wait()
    try:
      resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
      with pytest.raises(InputError, match="workdir = .*: allowed is a path that can be written"):
        for step in range(2, 2 + num_saves):
          checkpoints.save(step, state)
        if num_saves == 1:
          checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.last_step() == 1
    assert_same(leaves(checkpoints.restore(1, state)), leaves(state))


def test_a_state_of_another_shape_is_refused(undisturbed):
  other = make_step(CONFIG.replace(d_ff=24))
  with Checkpoints(undisturbed[0]) as checkpoints:
    with pytest.raises(InputError, match="allowed is a whole state of this run's shapes"):
      checkpoints.restore(12, other.abstract_state)


# --- figures and their display ---


def events(workdir):
  """(step, name, value) of all TensorBoard events, and the steps from which they start."""
  found, starts = [], []
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      starts += [event.step] if event.HasField("session_log") else []
  return found, starts


def test_a_resumed_run_takes_back_figures_of_later_steps(tmp_path):
  with MetricWriter(tmp_path, 0) as writer:
    writer.write(1, {"train/loss": 0.5})
    writer.write(2, {"train/loss": 0.25})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 1')
  with MetricWriter(tmp_path, 1) as writer:
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 0.5}]
    writer.write(2, {"train/loss": 0.125})
  assert read_metrics(tmp_path) == [
      {"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.125}
  ]
  found, starts = events(tmp_path)
  assert sorted(found) == [(1, "train/loss", 0.5), (2, "train/loss", 0.125),
                           (2, "train/loss", 0.25)]
  # TensorBoard hides what was there from these steps on.
  assert starts == [1, 2]


def test_figures_survive_a_disk_that_fills_up_while_they_are_taken_back(tmp_path, monkeypatch):
  with MetricWriter(tmp_path, 0) as writer:
    writer.write(1, {"train/loss": 0.5})
  before = (tmp_path / "metrics.jsonl").read_text()

  def full(self, text, **kwargs):
    with open(self, "w") as file:
      file.write(text[:9])
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(metrics.Path, "write_text", full)
  with pytest.raises(InputError, match="a path that can be written .No space left"):
    MetricWriter(tmp_path, 1)
  assert (tmp_path / "metrics.jsonl").read_text() == before


def displayed(**options):
  console = Console(file=io.StringIO(), width=100, **options)
  with Display(20, console) as display:
    display.advance(10)
    display.report(10, {"loss": 1.5, "tokens_per_second": 12345.0}, 6000)
    display.evaluation(10, {"validation/loss": 1.25})
    display.say("a line")
  list(shown(range(3), "things", console))
  return console.file.getvalue()


def test_a_pipe_gets_lines_without_control_characters():
  assert displayed() == (
      "step 10 of 20  loss 1.5  tokens_per_second 1.234e+04  1.7 h left\n"
      "step 10  validation/loss 1.25\n"
      "a line\n"
      "things  3 of 3  0 s left\n"
  )


def test_a_terminal_gets_a_live_line():
  text = displayed(force_terminal=True)
  assert "\x1b[" in text
  plain = re.sub(r"\x1b\[[\d;?]*\w", "", text)
  assert "10/20" in plain and "a line" in plain and "things" in plain
  # A figure stands in the live line, not in one of its own.
  assert "of 20" not in plain and "loss 1.5" in plain


# --- the run's folder ---


def contents(folder):
  return {path.relative_to(folder): path.read_bytes()
          for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


IDENTITY = {"model": {"d_model": 16}, "rates": (1.0, 2.0), "seed": 0}


def test_a_folder_is_one_runs(tmp_path):
  folder = tmp_path / "a/run"
  with open_run(folder, IDENTITY) as has_begun:
    assert not has_begun
    claim_run(folder, IDENTITY)
  with open_run(folder, IDENTITY) as has_begun:
    assert has_begun
  before = contents(folder)
  assert json.loads(before[(folder / "run.json").relative_to(folder)])["seed"] == 0
  for change, message in (
      ({"seed": 1}, r"workdir .*/a/run seed = 1: allowed is 0, of the run that the folder holds"),
      ({"model": {"d_model": 32}}, "run model.d_model = 32: allowed is 16"),
      ({"rates": None}, r"run rates = None: allowed is \[1.0, 2.0\]"),
  ):
    with pytest.raises(InputError, match=message), open_run(folder, IDENTITY | change):
      pass
  assert contents(folder) == before


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
  (tmp_path / "thesis.txt").write_text("all of it")
  with pytest.raises(InputError, match="allowed is a new folder, or one with a run.json"):
    with open_run(tmp_path, IDENTITY):
      pass
  with pytest.raises(InputError, match="allowed is a new folder, or one with a run.json"):
    with open_run(tmp_path / "thesis.txt", IDENTITY):
      pass
  with pytest.raises(InputError, match=r"a path that can be written \(Not a directory\)"):
    with open_run(tmp_path / "thesis.txt/run", IDENTITY):
      pass
  assert contents(tmp_path) == {(tmp_path / "thesis.txt").relative_to(tmp_path): b"all of it"}


def test_nothing_is_left_of_a_run_that_did_not_begin(tmp_path):
  with pytest.raises(InputError), open_run(tmp_path / "run", IDENTITY):
    raise InputError("rows", "bad", "good ones")
  (tmp_path / "there").mkdir()
  with pytest.raises(InputError), open_run(tmp_path / "there", IDENTITY):
    raise InputError("rows", "bad", "good ones")
  assert os.listdir(tmp_path) == ["there"] and not os.listdir(tmp_path / "there")
  # One that was killed there leaves files that don't matter.
  for name in (".lock", ".run.json.partial"):
    (tmp_path / "there" / name).write_text("{")
  with open_run(tmp_path / "there", IDENTITY) as has_begun:
    assert not has_begun
    claim_run(tmp_path / "there", IDENTITY)
  assert json.loads((tmp_path / "there/run.json").read_text())["seed"] == 0


def test_two_processes_do_not_train_in_one_folder(tmp_path):
  with open_run(tmp_path / "run", IDENTITY):
    claim_run(tmp_path / "run", IDENTITY)
    with pytest.raises(InputError, match="allowed is one that no other process works in"):
      with open_run(tmp_path / "run", IDENTITY):
        pass
  with open_run(tmp_path / "run", IDENTITY) as has_begun:
    assert has_begun


@pytest.mark.parametrize("fields, message", [
    ({"num_steps": 0}, "Schedule.num_steps = 0: allowed is a positive integer"),
    ({"num_steps": 1.5}, r"Schedule.num_steps = 1\.5"),
    ({"num_steps": 1, "log_every": 0}, "Schedule.log_every = 0"),
    ({"num_steps": 1, "evaluate_every": -1}, "evaluate_every = -1: allowed is an integer from 0"),
])
def test_bad_schedules_are_named(fields, message):
  with pytest.raises(InputError, match=message):
    Schedule(**fields)


def test_a_best_metric_that_no_evaluation_has(step, tmp_path):
  with pytest.raises(InputError, match=r"best_metric = 'x': allowed is one of \['validation/loss"):
    train(tmp_path, step, best_metric="x")
