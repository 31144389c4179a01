"""Tests run on the CPU, where a TPU's compiler may be installed without a TPU."""

import gc
from importlib import metadata
import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")


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


@pytest.fixture(autouse=True)
def forgotten_gin():
  """What a test bound in gin isn't bound in the next, whichever that is."""
  yield
  gin = sys.modules.get("gin")
  if gin is not None:
    with gin.unlock_config():
      gin.clear_config()


@pytest.fixture(scope="session")
def program_folder(tmp_path_factory):
  folder = tmp_path_factory.getbasetemp()
  # Workers of pytest-xdist have folders side by side.
  return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "programs"


@pytest.fixture(scope="module")
def compiled_once(program_folder):
  """What a module compiles isn't compiled again, by it, its processes, or another module."""
  from train_runs import compilation_cache_in

  with compilation_cache_in(program_folder):
    yield


@pytest.fixture(scope="session")
def train_rows(tmp_path_factory):
  """A folder from `train_runs.write_rows`."""
  from train_runs import write_rows

  folder = tmp_path_factory.mktemp("rows")
  write_rows(folder)
  return folder


@pytest.fixture
def leftovers():
  """Collects, before the next test, what Orbax leaves of an array that it can't read."""
  yield
  gc.collect()
