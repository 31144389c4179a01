"""`python -m bpd_jax.train`: killed anywhere, what it trains, and bad input."""

import random
import re
import resource
import shutil
import signal
import subprocess
import time

from devices import device_flags
from jax import monitoring
import numpy as np
import pytest
from train_runs import (
  arguments,
  assert_same,
  error_of,
  last_state,
  model_params,
  ROOT,
  run,
  start,
)

from bpd_jax import train
from bpd_jax.data.batches import Batches
from bpd_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def rows(train_rows):
  return train_rows


# Dropout, so that steps draw; saves that overlap with steps; the best state kept.
WHOLE = {
    "SAVE_EVERY": 1, "LOG_EVERY": 1, "EVALUATE_EVERY": 5, "NUM_DECODED": 0, "DROPOUT_RATE": 0.1,
    "PACKED": True, "Optimizer__name": "adamw", "Optimizer__schedule": "constant",
    "train__average_decay": 0.9,
}
STEPS = 15


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
  """An undisturbed run."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  assert run(arguments(rows, workdir, STEPS=STEPS, **WHOLE)) == 0
  return workdir


def assert_ends_as(workdir, whole, num_steps=STEPS):
  """State, model and figures are those of the undisturbed run, each figure once."""
  assert last_state(workdir)[0] == last_state(whole)[0] == num_steps
  assert_same(last_state(workdir)[1], last_state(whole)[1])
  assert_same(model_params(workdir), model_params(whole))
  assert figures(workdir) == figures(whole)
  for name, values in figures(workdir).items():
    every = 1 if name.startswith("train/") else WHOLE["EVALUATE_EVERY"]
    assert [step for step, _ in values] == [*range(every, num_steps + 1, every)], name


def figures(workdir):
  """(step, value) of each figure that isn't a time, by name."""
  found = {}
  for line in read_metrics(workdir):
    for name in line.keys() - {"step"}:
      if "second" not in name:
        found.setdefault(name, []).append((line["step"], line[name]))
  return found


# --- killed and stopped ---


def kill_at(argv, workdir, moment):
  """Starts a run and kills it: (since, seconds), since its start, its first step or a save.

  Returns:
    Whether it was still running.
  """
  since, seconds = moment
  process = start(argv)
  if since == "step":
    assert any(line.startswith("step ") for line in process.stdout), process.stderr.read()
  if since == "save":
    assert any(line.startswith("step ") for line in process.stdout), process.stderr.read()
    while not in_save(workdir) and process.poll() is None:
      time.sleep(1e-3)
  time.sleep(seconds)
  was_running = process.poll() is None
  process.kill()
  process.communicate()
  return was_running


def in_save(workdir):
  """Whether a state is being written."""
  return bool(list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")))


def check_kills(argv, workdir, moments):
  """Kills a run at moments, see `kill_at`; how often it was saving."""
  num_saves = 0
  for moment in moments:
    before = progress(workdir)
    assert kill_at(argv, workdir, moment), "the run was over before"
    num_saves += in_save(workdir)
    assert progress(workdir) >= before, "a state was lost"
  print(f"{len(moments)} kills, {num_saves} of them while a state was written, "
        f"the last after step {progress(workdir)}")
  return num_saves


def progress(workdir):
  """The step of the last whole state."""
  folder = workdir / "checkpoints"
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def terminate(argv, workdir):
  """Sends SIGTERM to a run after a step; what it must say and leave then."""
  process, lines = start(argv), []
  for line in process.stdout:
    lines.append(line)
    if line.startswith("step "):
      process.send_signal(signal.SIGTERM)
      break
  rest, _ = process.communicate()
  assert process.returncode == 0
  done, lines = progress(workdir), [*lines, *rest.splitlines(keepends=True)]
  assert lines[-2:] == [
      f"stopped by SIGTERM at step {done}; the same command goes on from there\n",
      f"{workdir}/model holds step {done}\n",
  ]
  # A pipe gets lines and nothing else.
  assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", "".join(lines))
  assert_holds_average(workdir)
  return done


@pytest.mark.slow  # Five processes, each of which starts anew.
def test_a_run_that_is_stopped_and_killed_thrice_ends_like_an_undisturbed_one(
    rows, whole, tmp_path
):
  argv, workdir, rng = arguments(rows, tmp_path, STEPS=STEPS, **WHOLE), tmp_path, random.Random(0)
  assert kill_at(argv, workdir, ("start", rng.uniform(0, 4)))
  assert 0 < terminate(argv, workdir) < STEPS
  moments = [("step", rng.uniform(0, 0.4)), ("save", 0)]
  assert check_kills(argv, workdir, moments) >= 1
  assert run(argv) == 0
  assert_ends_as(workdir, whole)


@pytest.mark.slow  # 22 processes, each of which starts anew.
def test_a_run_that_is_killed_twenty_times_ends_like_an_undisturbed_one(rows, tmp_path):
  rng, options = random.Random(1), {"STEPS": 150, **WHOLE}
  moments = [("start", rng.uniform(0, 6)) for _ in range(5)]
  moments += [("step", rng.uniform(0, 1)) for _ in range(15)]
  argv = arguments(rows, tmp_path / "run", **options)
  assert check_kills(argv, tmp_path / "run", moments) >= 5
  for workdir in (tmp_path / "run", tmp_path / "whole"):
    assert run(arguments(rows, workdir, **options)) == 0
  assert_ends_as(tmp_path / "run", tmp_path / "whole", 150)


def assert_holds_average(workdir):
  state, model = last_state(workdir)[1], model_params(workdir)
  assert_same(model, {name.removeprefix("['average']"): leaf for name, leaf in state.items()
                      if name.startswith("['average']")})
  assert any(state["['params']" + name].tobytes() != leaf.tobytes()
             for name, leaf in model.items())


def test_the_model_is_the_average(whole):
  assert_holds_average(whole)


@pytest.mark.slow  # Compiles for two devices in a process of its own.
def test_a_run_goes_on_with_another_number_of_devices(rows, whole, tmp_path, monkeypatch):
  for name in ("one", "two"):
    shutil.copytree(whole, tmp_path / name)
  assert run(arguments(rows, tmp_path / "one", **WHOLE, STEPS=STEPS + 5)) == 0
  monkeypatch.setenv("XLA_FLAGS", device_flags(2))
  process = start(arguments(rows, tmp_path / "two", **WHOLE, STEPS=STEPS + 5, DATA_PARALLEL=2))
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert "2 × cpu" in out and "mesh 2 data × 1 fsdp × 1 model" in out
  one, two = (model_params(tmp_path / name) for name in ("one", "two"))
  before = model_params(whole)
  for name, leaf in one.items():
    np.testing.assert_allclose(two[name], leaf, atol=1e-4, rtol=1e-3)
  assert max(np.abs(leaf - before[name]).max() for name, leaf in one.items()) > 1e-2


def test_the_page_says_what_a_run_leaves(whole):
  page = (ROOT / "docs/training.md").read_text()
  for path in whole.iterdir():
    assert f"`{path.name}/`" in page or f"`{path.name}`" in page
  for name in figures(whole).keys() | {"train/seconds_per_step", "train/tokens_per_second"}:
    name = re.sub(r"_head_\d", "_head_1", name.replace("rows.validation/", "validation/"))
    assert f"`{name}`" in page, name


@pytest.mark.slow  # Compiles a run's programs anew.
def test_what_a_finished_run_needs_is_not_made_again(rows, whole, tmp_path, monkeypatch):
  shutil.copytree(whole, tmp_path / "run")
  times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/tasks").rglob("*")}
  forbidden = lambda *args, **kwargs: pytest.fail("not needed")
  for name in ("data.jsonl.JsonlTask.rows", "train.init_params", "train.begin_addon"):
    monkeypatch.setattr(f"bpd_jax.{name}", forbidden)
  argv = arguments(rows, tmp_path / "run", STEPS=STEPS + 1, **WHOLE)
  assert run(argv) == 0
  assert last_state(tmp_path / "run")[0] == STEPS + 1
  assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "run/tasks").rglob("*")}


def test_everything_is_compiled_before_the_second_evaluation(rows, tmp_path, monkeypatch):
  compiled, at_evaluation = [], []
  evaluate = train.Evaluation.__call__

  def counted(self, *args):
    found = evaluate(self, *args)
    at_evaluation.append(len(compiled))
    return found

  monkeypatch.setattr(train.Evaluation, "__call__", counted)
  listen = lambda name, *args, **kwargs: compiled.append(name) if "compile" in name else None
  monitoring.register_event_duration_secs_listener(listen)
  options = WHOLE | {"EVALUATE_EVERY": 2, "NUM_DECODED": 2, "SAVE_EVERY": 6}
  try:
    assert run(arguments(rows, tmp_path / "run", STEPS=6, **options)) == 0
  finally:
    monitoring.clear_event_listeners()
  assert len(at_evaluation) == 3 and at_evaluation[0] > 0
  assert at_evaluation[0] == at_evaluation[2]


# --- a full disk ---


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("leftovers")
def test_a_disk_that_is_full_leaves_the_last_state(rows, whole, tmp_path, capsys):
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  argv = arguments(rows, workdir, STEPS=STEPS + 3, **WHOLE)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
  try:
    message = error_of(argv, capsys)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  start = f"workdir = '{workdir}/checkpoints': allowed is a path that can be written ("
  assert message.startswith(start)
  assert_is_untouched(workdir, whole)
  assert run(argv) == 0 and last_state(workdir)[0] == STEPS + 3


def assert_is_untouched(workdir, whole):
  assert last_state(workdir)[0] == STEPS
  assert_same(last_state(workdir)[1], last_state(whole)[1])
  assert_same(model_params(workdir), model_params(whole))


@pytest.fixture
def small_disk(tmp_path):
  """A folder, and a function that makes it a file system of so many bytes."""
  folder = tmp_path / "disk"
  folder.mkdir()

  def mount(size):
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
      pytest.skip("file systems can't be mounted here")
    return folder

  yield mount
  subprocess.run(["umount", "-q", "-l", folder], check=False)


@pytest.mark.slow  # Needs to mount a file system; the test before has another way to fill it.
@pytest.mark.parametrize("free", [0, 20_000, 100_000, 200_000])
def test_a_small_file_system_that_is_full_leaves_the_last_state(
    rows, whole, small_disk, capsys, free
):
  size = sum(-(-path.stat().st_size // 4096) * 4096 for path in whole.rglob("*"))
  workdir = small_disk(size + free) / "run"
  shutil.copytree(whole, workdir)
  message = error_of(arguments(rows, workdir, STEPS=STEPS + 3, **WHOLE), capsys)
  assert re.match(r"(workdir|folder) = .*: allowed is a path that can be written \(", message)
  assert_is_untouched(workdir, whole)


def test_a_loss_of_nan_ends_with_status_1(rows, whole, tmp_path, capsys, monkeypatch):
  read = Batches.batch

  def doctored(self, step):
    batch = read(self, step)
    if step == STEPS + 2:
      batch["decoder_target_tokens"][:] = 1000  # There is no such token.
    return batch

  monkeypatch.setattr(Batches, "batch", doctored)
  shutil.copytree(whole, tmp_path / "run")
  assert run(arguments(rows, tmp_path / "run", **(WHOLE | {"STEPS": 2 * STEPS}))) == 1
  assert re.fullmatch(
      r"error: loss nan, gradient norm \S+ at step 18; the last good checkpoint is that of "
      r"step 17\n", capsys.readouterr().err,
  )
  step, state = last_state(tmp_path / "run")
  assert step == 17 and all(np.isfinite(leaf).all() for leaf in state.values())


# --- the folder of another run ---


@pytest.mark.parametrize("options, field", [
    ({"DROPOUT_RATE": 0.2}, r"model\.dropout_rate = 0\.2: allowed is 0\.1"),
    ({"BATCH_SIZE": 8}, "batch_size = 8: allowed is 4"),
    ({"Optimizer__b1": 0.5}, r"optimizer\.b1 = 0\.5: allowed is 0\.9"),
    ({"Loss__head_weights": (1, 1, 0)},
     r"objective\.config\.head_weights = \[1, 1, 0\]: allowed is None"),
    ({"BLOCK_SIZE": 2}, r"addon\.config\.block_size = 2: allowed is 3"),
    ({"SEED": 1}, "seed = 1: allowed is 0"),
    ({"INPUTS": "targets"}, r"tasks = \['\w{16}'\]: allowed is \['\w{16}'\]"),
])
def test_a_folder_of_another_run_stays_as_it_is(rows, whole, capsys, options, field):
  before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
  found = error_of(arguments(rows, whole, STEPS=STEPS, **(WHOLE | options)), capsys)
  assert re.match(rf"workdir {whole} {field}, of the run that the folder holds$", found)
  assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_a_run_gets_no_shorter_and_no_other_files(rows, whole, tmp_path, capsys):
  found = error_of(arguments(rows, whole, STEPS=STEPS - 1, **WHOLE), capsys)
  assert re.match(r"Schedule\.num_steps = 14: allowed is at least 15, the steps that", found)
  (tmp_path / "notes.txt").write_text("mine")
  found = error_of(arguments(rows, tmp_path, STEPS=3), capsys)
  assert found == f"workdir = '{tmp_path}': allowed is a new folder, or one with a run.json"
  assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
