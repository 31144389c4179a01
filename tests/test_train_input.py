"""Bad input of `python -m bpd_jax.train`: one line, before anything is compiled or written."""

import os
import re
import shutil

from devices import device_flags
from jax import monitoring
from pieces import train_pieces
import pytest
from train_runs import (
  arguments,
  cut,
  error_of,
  run,
  start,
)

from bpd_jax import launch, train
from bpd_jax.data.token_cache import write_cache
from bpd_jax.errors import InputError
from bpd_jax.train import run_vocabulary
from bpd_jax.vocabulary import ByteVocabulary, open_vocabulary


@pytest.fixture(scope="module")
def rows(train_rows):
  return train_rows


def text(line):
  return lambda path: path.write_text('{"inputs": "a", "targets": "b"}\n' + line)


def joint(rows, workdir, **options):
  return arguments(rows, workdir, **{"STEPS": 3, **options})


VALUES = {
    "a macro that there isn't": (
        ["--gin.STEP=3"], r"gin macro STEP = '3': allowed is one of \['BATCH_SIZE', 'BEST"),
    "a parameter that there isn't": (
        ["--gin.train.width=3"], r"gin = 'train\.width = 3': allowed is what gin understands"),
    "a task that there isn't": (
        ["--gin.TRAIN_TASKS=[@NoTask()]"], "gin = 'TRAIN_TASKS = .*No configurable matching"),
    "a required macro": (
        ["--gin.STEPS=%gin.REQUIRED"], "gin macro STEPS = 'required': allowed is a value: --g"),
    "other texts": (
        ["--gin.Loss.texts='both'"], r"Loss\.texts = 'both': allowed is one of \('references', '"),
    "outputs of a base that changes": (
        ["--gin.Loss.texts='outputs'"], r"Loss\.texts = 'outputs': allowed is references where"),
    "a frozen base from scratch": (
        ["--gin.Loss.trains_base=False"],
        r"train\.checkpoint = None: allowed is a model folder, where the base isn't trained or"),
    "no add-on": (
        ["--gin.train.addon=None"], r"train\.addon = None: allowed is of a class derived from Ad"),
    "nothing to minimise": (
        ["--gin.train.objective=None"], r"train\.objective = None: allowed is of a class derived"),
    "no head at all": (
        ["--gin.BLOCK_SIZE=0"], r"Heads\.block_size = 0: allowed is a positive integer"),
    "heads of no width": (
        ["--gin.Heads.d_ff=0"], r"Heads\.d_ff = 0: allowed is a positive integer"),
    "both ways to start": (
        ["--gin.train.checkpoint='x'"], r"train\.config = 'both': allowed is a config, or else"),
    "no rows in a batch": (["--gin.BATCH_SIZE=0"], r"train\.batch_size = 0: allowed is a positive"),
    "a text for a number": (["--gin.BATCH_SIZE='4'"], r"train\.batch_size = '4': allowed is a pos"),
    "a batch in five parts": (["--gin.MICROBATCHES=5"], "batch_size = 4: allowed is a multiple of"),
    "no parts": (["--gin.MICROBATCHES=0"], r"train\.num_microbatches = 0: allowed is a positive"),
    "no room": (["--gin.TARGET_LENGTH=0"], r"train\.target_length = 0: allowed is a positive int"),
    "no steps": (["--gin.STEPS=0"], r"Schedule\.num_steps = 0: allowed is a positive integer"),
    "a learning rate in words": (
        ["--gin.LEARNING_RATE='high'"], r"Optimizer\.learning_rate = 'high': allowed is a posit"),
    "all dropped": (["--gin.DROPOUT_RATE=1"], r"ModelConfig\.dropout_rate = 1: allowed is from 0"),
    "two rates": (["--gin.RATES=[1, 2]"], r"rates = \[1, 2\]: allowed is 1 positive numbers"),
    "no tasks": (["--gin.TRAIN_TASKS=[]"], r"train\.tasks = \[\]: allowed is at least one task"),
    "a task twice": (
        ["--gin.VALIDATION_TASKS=[@validation/JsonlTask(), @validation/JsonlTask()]"],
        r"Validation\.tasks = \['rows.validation', .*names that differ"),
    "no field for targets": (["--gin.TARGETS=None"], "JsonlTask rows targets = None: allowed is"),
    "a metric that there isn't": (
        ["--gin.BEST_METRIC='loss'"],
        r"Schedule\.best_metric = 'loss': allowed is one of \['validation/loss', '"),
    "evaluations of nothing": (
        ["--gin.train.validation=None"], r"Schedule\.evaluate_every = 2000: allowed is none"),
    "no such vocabulary": (
        ["--gin.VOCABULARY='x'"], "vocabulary = 'x': allowed is a SentencePiece model file"),
    "a larger vocabulary": (
        ["--gin.VOCABULARY='bpd_jax/data/files/docstrings.model'"],
        r".*docstrings\.model size = 4096: allowed is at most 260, the model's vocab_size"),
    "a number for a path": (["--gin.WORKDIR=3"], "workdir = 3: allowed is a path"),
    "more devices": (["--gin.DATA_PARALLEL=64"], r"mesh = \(64, 1, 1\): allowed is sizes whose"),
}


@pytest.mark.parametrize("name", VALUES)
def test_bad_values_are_named_before_anything_is_written(rows, tmp_path, capsys, name):
  options, message = VALUES[name]
  assert re.match(message, error_of(joint(rows, tmp_path / "a/run") + options, capsys))
  assert not (tmp_path / "a/run").exists()


def test_a_file_of_tasks_that_was_left_out(rows, tmp_path, capsys):
  is_task = re.compile(r"--gin_file=gin/tasks|--gin\.(ROWS|VALIDATION_ROWS|VOCABULARY)=").match
  argv = [option for option in joint(rows, tmp_path / "run") if not is_task(option)]
  message = "gin macro RATES = 'absent': allowed is a value, from a file that sets it"
  assert error_of(argv, capsys) == message
  message = "gin train.workdir = 'absent': allowed is a value, from a --gin_file of gin/runs"
  assert error_of([], capsys) == message


@pytest.mark.parametrize("which", ["train", "validation"])
@pytest.mark.parametrize("write, message", [
    (text("{\n"), r"{path}:2 = '\{': allowed is JSON \("),
    (text('{"inputs": "a"}\n'), "{path}:2 targets = None: allowed is a text"),
    (text('{"inputs": 1, "targets": "b"}\n'), "{path}:2 inputs = 1: allowed is a text"),
    (lambda path: path.write_text("\n"), "file = '{path}': allowed is at least one row"),
    (text(r'{"inputs": "caf\ud83d bar", "targets": "x"}'),
     r"{path}:2 inputs = 'caf\\ud83d bar': allowed is text in UTF-8, where '\\ud83d' is no"),
    (text(r'{"inputs": "a", "targets": "\udc00"}'), "{path}:2 targets = .* text in UTF-8"),
    (lambda path: path.write_bytes(b"{}\n\xff"), r"{path}:2 = b'\\xff': allowed is text in UTF-8"),
    (lambda path: path.unlink(), "JsonlTask rows path = '{path}': allowed is a file that can be"),
])
def test_bad_rows_are_named_by_file_and_line(rows, tmp_path, capsys, which, write, message):
  shutil.copytree(rows, tmp_path / "rows")
  path = tmp_path / f"rows/{which}.jsonl"
  write(path)
  argv = joint(tmp_path / "rows", tmp_path / "run")
  assert re.match(message.replace("{path}", re.escape(str(path))), error_of(argv, capsys))
  # So that the corrected file can be trained on in the same folder.
  assert not (tmp_path / "run").exists()


def test_a_runs_folder_is_printed_as_it_is(rows, tmp_path, capsys):
  shutil.copytree(rows, tmp_path / "rows")
  (tmp_path / "rows/train.jsonl").write_text("{}")
  workdir = tmp_path / ":smile:"
  with pytest.raises(SystemExit):
    launch.run(train.main, joint(tmp_path / "rows", workdir))
  assert capsys.readouterr().out.startswith(f"new run in {workdir}; ")


@pytest.mark.parametrize("which", ["train", "validation"])
def test_a_row_that_has_no_ids_leaves_the_folder_unclaimed(rows, tmp_path, capsys, which):
  """A lone surrogate is JSON, and in no vocabulary."""
  shutil.copytree(rows, tmp_path / "rows")
  path = tmp_path / f"rows/{which}.jsonl"
  with path.open("a") as file:
    file.write('{"inputs": "a", "targets": "b\\ud83d"}\n')
  argv = joint(tmp_path / "rows", tmp_path / "run")
  message = rf"{re.escape(str(path))}:\d+ targets = 'b\\ud83d': allowed is text in UTF-8, where"
  assert re.match(message, error_of(argv, capsys))
  assert not (tmp_path / "run").exists()


def test_shapes_that_a_mesh_cannot_split_leave_the_folder_unclaimed(rows, tmp_path):
  """601 pieces or 3 heads over two devices, found before anything is compiled."""
  cases = {
      ("VOCAB_SIZE", 261): "base/embedding shape = (261, 16): allowed is multiples of 2 on the m",
      ("ModelConfig.num_heads", 3): "base/decoder/relpos_bias/rel_embedding shape = (3, 32): allo",
      ("Heads.d_ff", 15): "own/w1 shape = (2, 16, 15): allowed is multiples of 2 on the mesh",
  }
  for (name, value), message in cases.items():
    argv = joint(rows, tmp_path / "run", MODEL_PARALLEL=2, **{name: value})
    process = start(argv, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": device_flags(2)})
    _, errors = process.communicate()
    assert process.returncode == 2 and errors.startswith(f"error: {message}"), errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workdir, message", [
    ("gs://bucket/run", "workdir = 'gs://bucket/run': allowed is a path on a local disk"),
    ("{}/run[1]", r"workdir = '{}/run\[1\]': allowed is a path without \* \? \[ \], which Orbax"),
])
def test_a_workdir_that_cannot_be_one(rows, tmp_path, capsys, workdir, message):
  argv = joint(rows, workdir.format(tmp_path))
  assert re.match(message.format(tmp_path), error_of(argv, capsys))
  assert os.listdir(tmp_path) == []


def test_a_workdir_in_a_home(rows, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert run(joint(rows, "~/run", STEPS=1, NUM_DECODED=0)) == 0
  assert (tmp_path / "run/model/model.json").is_file() and not os.path.lexists("~")


def test_nothing_is_compiled_for_bad_input(rows, tmp_path, capsys):
  compiled = []
  listen = lambda name, *args, **kwargs: (
      compiled.append(name) if "backend_compile" in name else None
  )
  monitoring.register_event_duration_secs_listener(listen)
  try:
    error_of(joint(rows, tmp_path / "run", ROWS=str(tmp_path / "absent.jsonl")), capsys)
    error_of(joint(rows, tmp_path / "run", BEST_METRIC="x"), capsys)
  finally:
    monitoring.clear_event_listeners()
  assert compiled == []


def test_other_vocabularies_are_refused(rows, tmp_path, capsys):
  shipped = "bpd_jax/data/files/docstrings.model"
  # The folder of rows has a vocabulary where a model folder has it.
  with pytest.raises(InputError, match=r"vocabulary = '.*model, \w{16}': allowed is None, or byte"):
    run_vocabulary(shipped, str(rows), 4096)
  assert run_vocabulary(None, str(rows), 260)[0].fingerprint == "bytes"
  write_cache(
      tmp_path / "caches/toy", [([5, 1], [6, 1])], task="toy", split="train",
      vocabulary=open_vocabulary(shipped, 4096),
  )
  argv = joint(rows, tmp_path / "run", CachedTask__folder=str(tmp_path / "caches"),
               CachedTask__name="toy") + ["--gin.TRAIN_TASKS=[@CachedTask()]"]
  message = r"token cache .*/toy vocabulary = '\w{16} of 4096 ids': allowed is bytes of 259 ids"
  assert re.match(message, error_of(argv, capsys))
  cut(tmp_path / "caches/toy/tokens.bin")
  assert re.match("token cache = '.*/toy': allowed is 1 examples", error_of(argv, capsys))
  assert not (tmp_path / "run").exists()


def test_ids_beyond_the_embedding_table_are_refused(rows, tmp_path, capsys):
  """They would be clipped to its last row; of pieces, of their sentinels, or of a cache."""
  path = tmp_path / "spiece.model"
  path.write_bytes(train_pieces(240))
  argv = joint(rows, tmp_path / "run", VOCABULARY=str(path))
  message = "vocab_size = 260: allowed is at least 340, 240 pieces of .*/spiece.model and 100 sent"
  assert re.match(message, error_of(argv, capsys))
  caches = {"large": {"vocab_size": 300}, "ended": {"eos_id": 2}}
  for name, options in caches.items():
    write_cache(
        tmp_path / "caches" / name, [([5, 1], [6, 1])], task="toy", split=name,
        vocabulary=ByteVocabulary(), **options,
    )
  argv = joint(rows, tmp_path / "run", CachedTask__folder=str(tmp_path / "caches"),
               CachedTask__name="large") + ["--gin.TRAIN_TASKS=[@CachedTask()]"]
  message = "token cache .*/large vocab_size = 300: allowed is at most 260, the model's"
  assert re.match(message, error_of(argv, capsys))
  argv = [option.replace("'large'", "'ended'") for option in argv]
  message = "token cache .*/ended eos_id = 2: allowed is 1, the model's; prepare's --vocabulary"
  assert re.match(message, error_of(argv, capsys))
  assert not (tmp_path / "run").exists()
