"""What a result says it was made with, and what libtpu is told where there is no TPU."""

import subprocess

import pytest

from bpd_jax import environment


def test_a_revision_is_that_of_the_source_and_none_without_git(tmp_path, monkeypatch):
  wanted = subprocess.run(
      ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
  ).stdout.strip()
  assert environment.git_revision() == (wanted or None)
  monkeypatch.setenv("PATH", str(tmp_path))
  assert environment.git_revision() is None


@pytest.mark.parametrize("node", [None, "accel0", "vfio/0", "accel/accel0"])
@pytest.mark.parametrize("platforms", [None, "", "tpu", "cpu"])
def test_libtpu_is_told_that_there_is_no_tpu_only_where_there_is_none(tmp_path, node, platforms):
  # Every machine with VFIO has a node of its own for it.
  (tmp_path / "vfio").mkdir()
  (tmp_path / "vfio/vfio").touch()
  if node is not None:
    (tmp_path / node).parent.mkdir(exist_ok=True)
    (tmp_path / node).touch()
  before = {"TPU_WORKER_ID": "3"}
  if platforms is not None:
    before["JAX_PLATFORMS"] = platforms
  environ = dict(before)
  environment.quiet_libtpu(environ, tmp_path)
  if node is None and not platforms:
    assert environ == {**environment.LIBTPU_WITHOUT_TPU, **before}
  else:
    assert environ == before
