"""Known ways to be wrong still stand in the code, and the tests that should notice still run."""

import json
from pathlib import Path
import subprocess
import sys

import mutate

ROOT = Path(__file__).resolve().parent.parent
# Modules are imported once for all selections.
COLLECT = """
import contextlib, io, json, sys
import pytest
class Counter:
  def pytest_collection_finish(self, session):
    self.count = len(session.items)
counts = []
for tests in json.loads(sys.argv[1]):
  counter = Counter()
  with contextlib.redirect_stdout(io.StringIO()):
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *tests], plugins=[counter])
  counts.append(getattr(counter, "count", 0))
print(json.dumps(counts))
"""


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
  selections = sorted({mutation.tests for mutation in mutate.MUTATIONS})
  done = subprocess.run(
      [sys.executable, "-c", COLLECT, json.dumps(selections)], cwd=ROOT, capture_output=True,
      text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  counts = json.loads(done.stdout.splitlines()[-1])
  empty = [tests for tests, count in zip(selections, counts, strict=True) if not count]
  assert not empty
