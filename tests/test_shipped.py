"""The shipped model: small, loadable from a clone, and what the README's commands make of it."""

import importlib.util
import io
from pathlib import Path

import gin
import jax
import numpy as np
import pytest

import bpd_jax
from bpd_jax import evaluate, train
from bpd_jax.data.rows import load_rows
from bpd_jax.launch import read_gin, read_gin_files
from bpd_jax.terminal import plain_console

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "experiments/docstrings"
PROMPT = "format:\ndef f(a,b=None):{if b is None:{return a};return a+b}"


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def quickstart():
  spec = importlib.util.spec_from_file_location("quickstart", FOLDER / "quickstart.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def model():
  return bpd_jax.load(FOLDER / "model")


def test_it_is_small_and_reads_as_float32(model):
  size = sum(path.stat().st_size for path in (FOLDER / "model").rglob("*") if path.is_file())
  assert size < 20e6
  assert model.block_size == 9
  leaves = jax.tree.leaves((model.params, model.own_heads[1]))
  assert {str(leaf.dtype) for leaf in leaves} == {"float32"}
  # Rounded to bfloat16: the lower half of every number is 0.
  for kernel in (model.params["decoder"]["layers"]["mlp"]["wo"], model.own_heads[1]["w2"]):
    kernel = np.asarray(kernel)
    assert kernel.any() and not (kernel.view(np.uint32) & 0xFFFF).any()


def test_a_folder_below_home_keeps_its_heads(model, monkeypatch):
  monkeypatch.setenv("HOME", str(FOLDER))
  assert bpd_jax.load("~/model").own_heads[0] == model.own_heads[0]


def test_it_copies_code_in_blocks_and_says_what_greedy_says(model):
  prompts = [PROMPT, *(row["inputs"] for row in load_rows("code_format", "test")[:3])]
  greedy = model.generate(prompts, "greedy", batch_size=4)
  out = model.generate(prompts, model.heads(8), batch_size=4)
  assert out.texts == greedy.texts
  assert out.texts[0].startswith("def f(a, b=None):\n    if b is None:")
  assert out.block_efficiency > 2.5


def test_the_quickstart_puts_three_models_into_one_table(quickstart, tmp_path):
  demo = f"{FOLDER}/demo.gin"
  read_gin_files([demo], [
      f"OUTPUT = '{tmp_path / 'out'}'", "MAX_EXAMPLES = 2", "MAX_DECODE_LENGTH = 16",
      "TASKS = [@code_format/RowsTask(), @grammar/RowsTask()]",
  ])
  results = evaluate.evaluate()
  summary = quickstart.summarise({"new": results, "shipped": results}, {"all": 1.5})
  assert list(summary["tasks"]) == ["code_format", "grammar"]
  models = summary["tasks"]["grammar"]["models"]
  assert models["base"]["block_efficiency"] == 1
  methods = results["tasks"]["grammar"]["methods"]
  assert models["new"] == models["shipped"] == {
      name: methods[name] for name in ("blockwise", "auto")
  }
  assert methods["auto"]["costs"]["widths"] == [1, 2, 4, 8]
  console = plain_console(file=io.StringIO(), width=160)
  quickstart.print_summary(summary, console)
  text = console.file.getvalue()
  assert "code_format" in text and "shipped heads" in text
  learned = [task["learned"] for task in results["tasks"].values()]
  assert text.count(": not learned ") == learned.count(False)


def test_the_quickstarts_commands_can_be_read(quickstart):
  entries = {"train": train.train, "evaluate": evaluate.evaluate}
  for module, *options in quickstart.commands().values():
    gin.clear_config()
    read_gin(options, module, "", entries[module])


@pytest.mark.parametrize("file, macros", [
    ("demo", ["TASKS"]), ("quickstart", ["TRAIN_TASKS"]),
    *((name, ["TRAIN_TASKS", "VALIDATION_TASKS"]) for name in ("base", "heads")),
])
def test_experiments_stay_with_the_tasks_that_the_model_was_trained_on(file, macros):
  read_gin_files([f"{FOLDER}/{file}.gin"], [])
  trained_on = [
      "docstring_summary", "docstring_qa", "docstring_lm", "code_format", "code_body", "grammar"
  ]
  for macro in macros:
    found = gin.query_parameter(f"%{macro}")
    while isinstance(found, gin.config.ConfigurableReference):
      found = gin.query_parameter(f"%{found.scoped_selector.removesuffix('/gin.macro')}")
    assert [task.scoped_selector.partition("/")[0] for task in found] == trained_on
  rates = gin.query_parameter("%RATES") if file not in ("demo", "quickstart") else None
  assert rates is None or len(rates) == len(trained_on)
