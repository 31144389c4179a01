"""Known ways to be wrong still stand in the code, and the tests that should notice still run."""

import contextlib
import io
from pathlib import Path

import mutate
import pytest

ROOT = Path(__file__).resolve().parent.parent
# What else a session sets up concerns the process that tests already run in.
COLLECT = ["--collect-only", "-q", "--capture=no", *(
    f"-pno:{plugin}" for plugin in (
        "cacheprovider", "faulthandler", "threadexception", "unraisableexception", "xdist",
    )
)]


class Counter:
  """A plugin that counts what a session selects."""

  count = 0

  def pytest_collection_finish(self, session):
    self.count = len(session.items)


def test_every_mutation_applies_once_and_changes_something():
  found = {
      mutation.name: (ROOT / "bpd_jax" / mutation.file).read_text().count(mutation.old)
      for mutation in mutate.MUTATIONS
  }
  assert {name: count for name, count in found.items() if count != 1} == {}
  assert len(found) == len(mutate.MUTATIONS) > 100
  assert not [mutation.name for mutation in mutate.MUTATIONS if mutation.old == mutation.new]


def test_every_mutation_leaves_python():
  for mutation in mutate.MUTATIONS:
    text = (ROOT / "bpd_jax" / mutation.file).read_text()
    compile(text.replace(mutation.old, mutation.new), mutation.name, "exec")


def test_tests_of_every_mutation_are_among_those_that_run_by_default():
  # In this process, whose modules needn't be imported again.
  empty = []
  for tests in sorted({mutation.tests for mutation in mutate.MUTATIONS}):
    counter = Counter()
    with contextlib.redirect_stdout(io.StringIO()) as output:
      status = pytest.main([*COLLECT, f"--rootdir={ROOT}", *absolute(tests)], plugins=[counter])
    assert status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), output.getvalue()
    empty += [] if counter.count else [tests]
  assert not empty


def absolute(tests):
  """The same selection from wherever the tests run."""
  return [str(ROOT / word) if word.startswith("tests/") else word for word in tests]
