"""The TPU's own compiler takes the loops and a forward-backward pass, without a TPU."""

import os
from pathlib import Path
import re
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent


# A minute: the compiler for TPUs is loaded and compiles three programs.
@pytest.mark.slow
def test_base_compiles_for_a_v5e_slice():
  done = subprocess.run(
      [sys.executable, "-m", "bpd_jax.plan", "--gin_file=gin/models/base.gin",
       "--gin.BLOCK_SIZE=8"],
      cwd=ROOT, env=os.environ | {"COLUMNS": "200", "JAX_PLATFORMS": "cpu"},
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "v5e:4x4, mesh data 4, fsdp 2, model 2" in done.stdout
  rows = {}
  for name in ("greedy", "blockwise", "forward-backward"):
    line = re.search(rf"│ {name} +│ +([\d.,]+) │.*│ +([\d.,]+) │ +\d+ s │", done.stdout)
    assert line, done.stdout
    rows[name] = [float(x.replace(",", "")) for x in line.groups()]
  # 270 M parameters in float32 over the 4 devices of fsdp × model.
  assert 265 < rows["forward-backward"][0] < 290
  assert all(arguments < total < 16_000 for arguments, total in rows.values())


@pytest.mark.parametrize(
    "binding, message",
    [("plan.topology='v9:4x4'", "topology = 'v9:4x4'"), ("BLOCK_SIZE=0", "block_size = 0")],
)
def test_bad_input_is_one_line(binding, message):
  done = subprocess.run(
      [sys.executable, "-m", "bpd_jax.plan", "--gin_file=gin/models/base.gin",
       f"--gin.{binding}"],
      cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
      check=False,
  )
  assert done.returncode == 2 and done.stdout == ""
  assert message in done.stderr.splitlines()[-1] and done.stderr.startswith("error: ")
