"""Gin files and the command line that reads them."""

import importlib
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import zipfile

import gin
import jax
import pytest

from bpd_jax import launch
from bpd_jax.errors import InputError
from bpd_jax.launch import read_gin, read_gin_files
from bpd_jax.model.model import abstract_params
from bpd_jax.partitioning import single_device

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "gin/models/tiny.gin")
# T5 1.1's published totals, in millions; the paper's with its heads.
SIZES = {
    "tiny": 0.3287, "small": 77.0, "base": 247.6, "large": 783.2, "xl": 2849.8, "xxl": 11135.3,
    "paper_1_5b": 1499.3,
}


def test_every_model_file_is_known():
  assert {path.stem for path in (ROOT / "gin/models").glob("*.gin")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_model_file_has_its_size(name):
  read_gin_files([str(ROOT / f"gin/models/{name}.gin")])
  config, heads = (gin.get_configurable(kind)() for kind in ("ModelConfig", "Heads"))
  params = [abstract_params(config, single_device()), heads.abstract(config, single_device())]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count / 1e6 == pytest.approx(SIZES[name], rel=2e-3)


@pytest.mark.parametrize(
    "path", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "gin").rglob("*.gin"))
)
def test_every_gin_file_parses_and_says_only_what_its_folder_is_for(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  folder, command = Path(path).parent.name, Path(path).stem
  if folder == "runs":
    # A run file begins with the name of its command, which registers what it configures.
    if importlib.util.find_spec(f"bpd_jax.{command}") is None:
      command = command.partition("_")[0]
    importlib.import_module(f"bpd_jax.{command}")
  read_gin_files([path], needs_all=False)
  bound = {
      line.split(" = ")[0].rpartition("/")[2].partition(".")[0]
      for line in gin.config_str().splitlines() if re.match(r"[\w/]+\.\w+ = ", line)
  }
  assert bound
  if folder == "models":
    assert bound == {"Heads", "ModelConfig"}
  if folder == "tasks":
    assert all(name.endswith("Task") for name in bound)
  if folder == "runs":
    # Whoever runs it says where, and is told so.
    with pytest.raises(InputError, match="= 'required': allowed is a value: --gin"):
      read_gin_files([path])


FROM_ELSEWHERE = """
import sys
from bpd_jax import launch, train
import gin
for file in sys.argv[1:]:
  launch.read_gin_files([file], ["WORKDIR = 'nowhere'", "STEPS = 10"])
  config = gin.get_configurable("ModelConfig")()
  words, path = train.run_vocabulary(
      gin.query_parameter("VOCABULARY/gin.macro.value"), None, config.vocab_size)
  print(launch.PACKAGE, words.size, path)
"""


def check_from(folder, package_root, files):
  """From a folder, each gin file is found, and the vocabulary that it names, in a package."""
  done = subprocess.run(
      [sys.executable, "-c", FROM_ELSEWHERE, *files], cwd=folder, check=False, text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(package_root)},
      capture_output=True,
  )
  package = f"{package_root}/bpd_jax"
  found = [package, "4096", f"{package}/data/files/docstrings.model"]
  assert not done.stderr, done.stderr
  assert [line.split() for line in done.stdout.splitlines()] == [found] * len(files)


def test_a_gin_file_in_a_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.gin").write_text("STEPS = 3\n")
  assert launch.find_gin_file("~/mine.gin") == tmp_path / "mine.gin"


def test_gin_files_of_the_package_are_found_from_another_folder(tmp_path):
  file = "gin/runs/train_tiny.gin"
  check_from(tmp_path, ROOT, [file, str(ROOT / file)])


def test_gin_files_are_in_a_wheel_and_found_there(tmp_path):
  for name in ("bpd_jax", "gin"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
  for name in ("setup.py", "README.md"):
    shutil.copy(ROOT / name, tmp_path / "source")
  subprocess.run(
      [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)],
      cwd=tmp_path / "source", check=True, capture_output=True,
  )
  [wheel] = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / "site")
  mine, shipped = ROOT / "gin", tmp_path / "site/bpd_jax/gin_files/gin"
  names = {path.relative_to(mine): path.read_bytes() for path in mine.rglob("*.gin")}
  assert names == {
      path.relative_to(shipped): path.read_bytes() for path in shipped.rglob("*.*")
  }
  # Another `gin` beside the package would hide gin-config.
  assert not (tmp_path / "site/gin").exists()
  shutil.rmtree(tmp_path / "source")
  (tmp_path / "away").mkdir()
  (tmp_path / "away/mine.gin").write_text("include 'gin/runs/train_tiny.gin'\n")
  check_from(tmp_path / "away", tmp_path / "site", ["gin/runs/train_tiny.gin", "mine.gin"])


def test_an_include_is_looked_for_from_here_then_above_its_file_then_with_the_package(
    tmp_path, monkeypatch
):
  def write(path, text):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)

  def block_size(file):
    read_gin_files([file])
    return gin.query_parameter("BLOCK_SIZE/gin.macro.value")

  write("project/runs/deep/run.gin", "include 'gin/models/tiny.gin'\ninclude 'more.gin'\n")
  write("project/runs/more.gin", "include 'sizes/last.gin'\n")
  write("project/runs/sizes/last.gin", "VOCAB_SIZE = 640\n")
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  run_file = str(tmp_path / "project/runs/deep/run.gin")
  own = int(macros_of("gin/models/tiny.gin")["BLOCK_SIZE"])
  assert block_size(run_file) == own
  assert gin.query_parameter("VOCAB_SIZE/gin.macro.value") == 640
  # The file of a project comes before the package's, and the nearer before the farther.
  for folder, size in (("project", 5), ("project/runs", 6), ("here", 7)):
    write(f"{folder}/gin/models/tiny.gin", f"BLOCK_SIZE = {size}\n")
    assert block_size(run_file) == size != own
  assert block_size("gin/models/tiny.gin") == 7
  assert block_size(TINY) == own
  write("project/bad.gin", "include 'absent.gin'\n")
  with pytest.raises(InputError, match=r"there is no file 'absent.gin' In file .*bad\.gin"):
    read_gin_files([str(tmp_path / "project/bad.gin")])
  # What another reads with gin isn't changed for good.
  with pytest.raises(OSError, match="Unable to open file"):
    gin.config.parse_config_file(str(tmp_path / "absent.gin"))


def macros_of(path):
  """Macros that a gin file sets itself, with their values as it writes them."""
  text = re.sub(r"#.*", "", (ROOT / path).read_text())
  return dict(re.findall(r"^([A-Z_]+) = ([^\[\n]*?) *$", text, re.MULTILINE))


RUNS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "gin/runs").glob("*.gin"))


@pytest.mark.parametrize("path", RUNS)
def test_help_of_a_run_lists_its_macros_with_values(path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  command = Path(path).stem.partition("_")[0]
  main = importlib.import_module(f"bpd_jax.{command}").main
  with pytest.raises(SystemExit) as ended:
    main([f"--gin_file={path}", "--help"])
  assert ended.value.code == 0
  lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
  found = {line[0]: line[1] for line in lines if len(line) == 2}
  macros = macros_of(path)
  assert macros or "include" in (ROOT / path).read_text()
  for name, value in macros.items():
    assert found[name] == ("(required)" if value == "%gin.REQUIRED" else value)


@pytest.mark.parametrize("model", SIZES)
def test_every_model_can_be_trained(model, monkeypatch):
  monkeypatch.chdir(ROOT)
  train = importlib.import_module("bpd_jax.train")
  read_gin_files(
      [f"gin/models/{model}.gin", "gin/tasks/grammar.gin", "gin/runs/train.gin"],
      ["WORKDIR = 'nowhere'", "STEPS = 10", "BLOCK_SIZE = 8", "DROPOUT_RATE = 0.1"],
  )
  made = {name: gin.query_parameter(f"train.{name}") for name in (
      "config", "addon", "optimizer", "objective", "schedule", "validation", "partitioning")}
  made = {name: reference.scoped_configurable_fn() for name, reference in made.items()}
  config, addon, objective = made["config"], made["addon"], made["objective"]
  assert (addon.block_size, config.vocab_size, config.dropout_rate) == (8, 4096, 0.1)
  assert addon.d_ff == config.d_ff and objective.trains_base
  train.check_schedule(made["schedule"], made["validation"], 8)
  step = train.Step(config, made["partitioning"], made["optimizer"], objective, addon)
  tokens = jax.ShapeDtypeStruct((8, 16), jax.numpy.int32)
  sides = ("encoder_input_tokens", "encoder_segment_ids", "decoder_input_tokens",
           "decoder_target_tokens", "decoder_segment_ids")
  state, metrics = jax.eval_shape(
      step._run, step.abstract_state, dict.fromkeys(sides, tokens),
      jax.eval_shape(jax.random.key, 0), None,
  )
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert shapes(state) == shapes(step.abstract_state)
  assert metrics["loss"].shape == () and metrics["count"].shape == (8,)


def test_every_macro_of_training_is_explained():
  explained = set(re.findall(r"`([A-Z_]+)`", (ROOT / "docs/training.md").read_text()))
  paths = [path for path in RUNS if "train" in path]
  paths += ["gin/tasks/jsonl_train.gin", "gin/tasks/docstrings_train.gin", "gin/tasks/grammar.gin"]
  text = "".join((ROOT / path).read_text() for path in paths)
  macros = set(re.findall(r"^([A-Z_]+) = ", text, re.MULTILINE))
  assert len(macros) > 25 and macros - explained == set()


def test_bindings_come_after_files():
  read_gin(
      [f"--gin_file={TINY}", "--gin.BLOCK_SIZE=5", "--gin.ModelConfig.d_ff=32"], "program", "does"
  )
  config, heads = (gin.get_configurable(kind)() for kind in ("ModelConfig", "Heads"))
  assert (heads.block_size, config.d_ff, config.d_model) == (5, 32, 64)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gin.BLOCKS=3"], "gin macro BLOCKS = '3': allowed is one of ['BLOCK_SIZE', 'VOCAB"),
        (["--gin.ModelConfig.width=3"], "doesn't have a parameter named 'width'"),
        (["--gin.Model.d_ff=3"], "No configurable matching 'Model'"),
        (["--gin.BLOCK_SIZE=three words"], "gin = 'BLOCK_SIZE = three words': allowed is what gin"),
        (["--gin.BLOCK_SIZE=%gin.REQUIRED"], "gin macro BLOCK_SIZE = 'required': allowed is a"),
        (["--gin_file=absent.gin"], "gin_file = 'absent.gin': allowed is a file that exists"),
        (["--block_size=3"], "option = '--block_size=3': allowed is [--gin_file=FILE …]"),
        (["--gin.=3"], "option = '--gin.=3'"),
    ],
)
def test_bad_command_line_is_one_line_and_status_2(options, message, capsys):
  main = lambda argv: read_gin(argv, "program", "does")
  with pytest.raises(SystemExit) as ended:
    launch.run(main, [f"--gin_file={TINY}", *options])
  assert ended.value.code == 2
  out, err = capsys.readouterr()
  assert out == "" and len(err.splitlines()) == 1
  assert err.startswith("error: ") and message in err


def test_bad_value_of_a_config_names_the_field(capsys):
  def main(argv):
    read_gin(argv, "program", "does")
    gin.get_configurable("Heads")()

  with pytest.raises(SystemExit) as ended:
    launch.run(main, [f"--gin_file={TINY}", "--gin.BLOCK_SIZE=0"])
  assert ended.value.code == 2
  assert "Heads.block_size = 0: allowed is a positive integer" in capsys.readouterr().err


def test_a_configurable_without_a_value_is_named_with_its_scope(capsys):
  importlib.import_module("bpd_jax.evaluate")

  def main(argv):
    read_gin(argv, "program", "does")
    gin.query_parameter("evaluate.tasks")[0].scoped_configurable_fn()

  # A scope that nothing is bound for, as where it is misspelt.
  options = ["--gin_file=gin/runs/evaluate.gin", "--gin.CHECKPOINT='m'", "--gin.OUTPUT='o'",
             "--gin.evaluate.tasks=[@sumary/RowsTask()]"]
  with pytest.raises(SystemExit) as ended:
    launch.run(main, options)
  assert ended.value.code == 2
  assert capsys.readouterr().err == (
      "error: gin sumary/RowsTask = 'absent': allowed is one with values for ['name']\n"
  )
  # Another TypeError is a bug and says so.
  with pytest.raises(TypeError):
    launch.run(lambda argv: int(argv), [])


def test_help_lists_macros_with_values(capsys):
  with pytest.raises(SystemExit) as ended:
    read_gin([f"--gin_file={TINY}", "--gin.BLOCK_SIZE=%gin.REQUIRED", "--help"], "program", "does")
  assert ended.value.code == 0
  lines = capsys.readouterr().out.splitlines()
  assert "  BLOCK_SIZE  (required)" in lines and "  VOCAB_SIZE  1024" in lines


def test_file_that_is_not_gin(tmp_path):
  (tmp_path / "bad.gin").write_text("ModelConfig.d_ff = = 3\n")
  with pytest.raises(InputError, match=r"gin = '.*bad\.gin': allowed is what gin understands"):
    read_gin_files([str(tmp_path / "bad.gin")])


def test_arguments_that_are_not_utf8_are_refused(capsys):
  main = lambda argv: pytest.fail("not reached")
  with pytest.raises(SystemExit) as ended:
    launch.run(main, ["--file", os.fsdecode(b"caf\xe9.txt")])
  assert ended.value.code == 2
  assert capsys.readouterr().err == (
      "error: argument 2 = 'caf\\udce9.txt': allowed is text in UTF-8, where '\\udce9' is no "
      "character\n"
  )


def test_a_command_says_one_line_where_libtpu_is_installed_without_a_tpu(tmp_path):
  pytest.importorskip("libtpu")
  arguments = ["-m", "bpd_jax.export", "--from", os.fsencode("caf\xe9"), "--to", "nowhere"]
  # A device is asked for before the folder is looked at.
  environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  done = subprocess.run(
      [sys.executable, *arguments], cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)},
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 2 and not done.stdout
  assert done.stderr == "error: model folder = 'café': allowed is a folder that exists\n"


def test_status_of_main_is_the_exit_status():
  for status in (None, 0, 3):
    with pytest.raises(SystemExit) as ended:
      launch.run(lambda argv, status=status: status, [])
    assert (ended.value.code or 0) == (status or 0)
