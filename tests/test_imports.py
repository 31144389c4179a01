"""What may import what: the floors of the house, and nothing heavy where it decodes."""

import ast
import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bpd_jax"

# Every module has a floor; an import goes to the same floor or below. The most
# specific name counts.
FLOORS = {
    "bpd_jax": 3,
    "bpd_jax.errors": 0,
    "bpd_jax.folders": 0.5,
    "bpd_jax.environment": 0.5,
    "bpd_jax.terminal": 0.5,
    "bpd_jax.compilation_cache": 0.5,
    "bpd_jax.partitioning": 1,
    "bpd_jax.vocabulary": 1,
    "bpd_jax.model": 1,
    "bpd_jax.data": 1,
    "bpd_jax.ngram_lm": 1,
    "bpd_jax.checkpoints": 1.5,
    "bpd_jax.training": 2,
    "bpd_jax.decoding": 2,
    "bpd_jax.interchange": 2,
    "bpd_jax.programs": 2.5,
    "bpd_jax.addons": 2.5,
    "bpd_jax.generation": 2.5,
    "bpd_jax.call_costs": 2.5,
    "bpd_jax.reader": 2.5,
    "bpd_jax.distillation": 3,
    "bpd_jax.evaluation": 3,
    "bpd_jax.launch": 4,
    "bpd_jax.configurables": 4,
    "bpd_jax.decode": 4,
    "bpd_jax.evaluate": 4,
    "bpd_jax.plan": 4,
    "bpd_jax.benchmark": 4,
    "bpd_jax.export": 4,
    "bpd_jax.import_checkpoint": 4,
    "bpd_jax.ngram": 4,
    "bpd_jax.prepare": 4,
    "bpd_jax.train": 4,
}
# Commands of a package further down start like every other.
COMMANDS = {
    ("bpd_jax.data.docstrings", "bpd_jax.launch"),
    ("bpd_jax.evaluation.controls", "bpd_jax.launch"),
}
NEVER = {
    "bpd_jax.decoding": ("bpd_jax.model", "bpd_jax.partitioning", "gin", "tensorflow", "seqio"),
    "bpd_jax.model": ("bpd_jax.decoding", "gin", "tensorflow", "seqio"),
    "bpd_jax.ngram_lm": (
        "bpd_jax.model", "bpd_jax.decoding", "bpd_jax.data", "gin", "tensorflow", "seqio"),
    "bpd_jax.addons": ("gin", "tensorflow", "seqio"),
    "bpd_jax.generation": ("gin", "tensorflow", "seqio"),
    "bpd_jax.programs": ("gin", "tensorflow", "seqio"),
    "bpd_jax.training": ("gin", "tensorflow", "seqio"),
    "bpd_jax.ngram": ("tensorflow", "seqio"),
    "bpd_jax.train": ("tensorflow", "seqio"),
    "bpd_jax.evaluation": ("gin",),
    "bpd_jax.interchange": ("torch", "transformers", "gin"),
}


def modules():
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(path):
  """Full names that a file imports, inside functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(name):
  parts = name.split(".")
  for end in range(len(parts), 1, -1):
    if ".".join(parts[:end]) in FLOORS:
      return FLOORS[".".join(parts[:end])]
  return FLOORS["bpd_jax"] if parts == ["bpd_jax"] else None


def is_below(name, package):
  return name == package or name.startswith(package + ".")


def test_every_module_has_a_floor():
  homeless = [name for name, _ in modules() if floor(name) is None]
  assert not homeless, f"give {homeless} a floor in FLOORS"


def test_every_import_points_down():
  upward = []
  for name, path in modules():
    if floor(name) is None:
      continue  # Named by the test before.
    for target in imports_of(path):
      if not is_below(target, "bpd_jax"):
        continue
      above = floor(target) if floor(target) is not None else FLOORS["bpd_jax"]
      is_command = any(name == a and is_below(target, b) for a, b in COMMANDS)
      if above > floor(name) and not is_command:
        upward.append(f"{name} imports {target}")
  assert not upward


def test_no_module_imports_what_it_must_not_know():
  wrong = [
      f"{name} imports {target}"
      for name, path in modules() for target in imports_of(path)
      for package, banned in NEVER.items() if is_below(name, package)
      if any(is_below(target, x) for x in banned)
  ]
  assert not wrong


LIGHT = """
import importlib, pkgutil, sys
class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in {
        "tensorflow", "seqio", "gin", "torch", "transformers", "libtpu", "tensorflow_datasets"}:
      raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import jax
import bpd_jax, bpd_jax.addons, bpd_jax.decoding, bpd_jax.evaluation, bpd_jax.interchange
import bpd_jax.model, bpd_jax.ngram_lm
for package in (bpd_jax.addons, bpd_jax.decoding, bpd_jax.evaluation, bpd_jax.interchange,
                bpd_jax.model, bpd_jax.ngram_lm):
  for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
from bpd_jax.addons.heads import Heads
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device
config = ModelConfig(vocab_size=32, d_model=8, d_ff=8, d_kv=4, num_heads=2,
                     num_encoder_layers=1, num_decoder_layers=1)
heads, key = Heads(3, 8), jax.random.key(0)
model = bpd_jax.Generator(config, init_params(config, single_device(), key),
                          own_heads=(heads, heads.begin(config, single_device(), key)))
outs = [model.generate([[5, 6, 1]], method, max_length=6, batch_size=1)
        for method in ("greedy", "blockwise")]
assert outs[0].tokens[0].tolist() == outs[1].tokens[0].tolist()
print(outs[0].block_efficiency, len(outs[0].tokens[0]))
"""


def test_decoding_needs_neither_gin_nor_tensorflow_nor_seqio():
  done = subprocess.run(
      [sys.executable, "-c", LIGHT], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split()[0] == "1.0"


def test_config_folder_does_not_hide_gin():
  assert not list((ROOT / "gin").rglob("*.py"))
  pytest.importorskip("gin").clear_config()
