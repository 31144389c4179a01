"""Tests run on the CPU, where a TPU's compiler may be installed without a TPU."""

import gc
from importlib import metadata
import os
from pathlib import Path
import sys

# Files of tests that take longest. They begin first, so that processes that share the tests
# end together.
LONGEST = (
    "exactness", "addon", "mesh", "step", "huggingface", "evaluate", "scoring", "tuning", "finite",
    "rescored_model", "loop_training", "train", "train_modes", "train_input", "journey",
    "benchmark", "prepare", "plan",
)
RUNS = Path(__file__).resolve().parent.parent / "runs"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Importing is most of a short process, and twice that without bytecode. Who wants none beside
# the sources gets it elsewhere, this process and those that it starts.
if sys.dont_write_bytecode and sys.pycache_prefix is None:
  os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
  os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(RUNS / "test_bytecode")
  sys.dont_write_bytecode = False

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache
import pytest

from bpd_jax.compilation_cache import (
  environment_of,
  FOLDER_VARIABLE,
  make_room,
  open_folder,
  set_folder,
)

# Most of the tests' time is compiling, so what one compiled isn't compiled again: by it, by
# processes that it starts, by other tests, or by the next run.
if FOLDER_VARIABLE not in os.environ:
  folder = open_folder(RUNS / "test_programs")
  set_folder(folder)
  os.environ.update(environment_of(folder))


def pytest_configure(config):
  """Programs compile fast, those of processes that a test starts too, but for slow tests.

  Most of the tests' time is compiling programs that run once, so LLVM optimises nothing, and
  fusions are emitted the old way, which takes a third of the time. A flag that is given
  already stays as it is.
  """
  if config.getoption("markexpr") == "slow":
    return
  flags = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": "true"}
  # An unknown flag ends every process, and newer compilers know one way alone.
  if tuple(map(int, metadata.version("jaxlib").split(".")[:3])) <= (0, 11, 0):
    flags["xla_cpu_use_fusion_emitters"] = "false"
  given = os.environ.get("XLA_FLAGS", "")
  more = [f"--{name}={value}" for name, value in flags.items() if f"--{name}=" not in given]
  os.environ["XLA_FLAGS"] = " ".join([*given.split(), *more])


def pytest_collection_modifyitems(items):
  place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish():
  """Rarely looks for garbage, of which tracing makes little, and never among what imports made."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure():
  """What is left goes with the process; pytest would look through it five times."""
  gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def room():
  """Files of tests leave their programs to the next, while there is room for more."""
  yield
  make_room()


@pytest.fixture(autouse=True)
def forgotten_gin():
  """What a test bound in gin isn't bound in the next, whichever that is."""
  yield
  gin = sys.modules.get("gin")
  if gin is not None:
    with gin.unlock_config():
      gin.clear_config()


@pytest.fixture
def compiled_anew():
  """For tests that read what the compiler made, or its memory: nothing comes from disk."""
  jax.config.update("jax_enable_compilation_cache", False)
  jax_cache.reset_cache()
  yield
  jax.config.update("jax_enable_compilation_cache", True)
  jax_cache.reset_cache()


@pytest.fixture(scope="session")
def train_rows(tmp_path_factory):
  """A folder from `train_runs.write_rows`."""
  from train_runs import write_rows

  folder = tmp_path_factory.mktemp("rows")
  write_rows(folder)
  return folder


@pytest.fixture
def leftovers():
  """Collects, before the next test, what Orbax leaves of an array that it can't read.

  What was there before the test isn't looked through.
  """
  gc.freeze()
  yield
  gc.collect()
