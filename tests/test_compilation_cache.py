"""What commands compile is kept, where the user says, for processors of its kind."""

import importlib
import json
import os
from pathlib import Path
import subprocess
import sys
import time

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache
import pytest

from bpd_jax import compilation_cache, launch
from bpd_jax.compilation_cache import (
  keep_programs,
  make_room,
  open_folder,
  processor_fingerprint,
)

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("benchmark.__main__", "decode", "evaluate", "export", "import_checkpoint", "ngram",
            "prepare", "train", "data.docstrings")
# A command that compiles, in which JAX says what it found.
COMMAND = """
import json, sys
import jax, jax.numpy as jnp
from bpd_jax import launch
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
def main(argv):
  print(float(jax.jit(lambda x: (x @ x).sum())(jnp.arange(9.0).reshape(3, 3))), file=sys.stderr)
  print(json.dumps([events.count("cache_misses"), events.count("cache_hits")]))
launch.run(main, [], has_cache=json.loads(sys.argv[1]))
"""
# Everything that commands import, which in a user's process sets nothing.
LIBRARY = """
import sys
import jax
import bpd_jax, bpd_jax.configurables, bpd_jax.evaluate, bpd_jax.train
jax.jit(lambda x: x + 1)(1.0)
print(jax.config.jax_compilation_cache_dir, "tensorboardX" in sys.modules)
"""
CPUINFO = """processor\t: {number}
vendor_id\t: GenuineIntel
model name\t: A processor
cpu MHz\t\t: {mhz}
flags\t\t: fpu sse2 {flags}

processor\t: 9
flags\t\t: others
"""


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
  """A folder for caches, and an environment in which the user has said nothing else."""
  for name in os.environ:
    if "COMPILATION_CACHE" in name or "PERSISTENT_CACHE" in name:
      monkeypatch.delenv(name)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  return tmp_path


@pytest.fixture
def unset(cache_home):
  """JAX as a command finds it, and afterwards as the other tests do."""
  names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache",
           *compilation_cache._OPTIONS)
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_enable_compilation_cache", True)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  jax_cache.reset_cache()
  yield cache_home
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


def python(script, *words):
  done = subprocess.run(
      [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def kept(home):
  return sorted(home.glob("bpd_jax/programs/*/*-cache"))


def test_a_command_compiles_nothing_that_one_before_it_did(cache_home):
  misses, hits = json.loads(python(COMMAND, "true"))
  assert misses == len(kept(cache_home)) > 0 == hits
  assert {path.parent.name for path in kept(cache_home)} == {processor_fingerprint()}
  assert json.loads(python(COMMAND, "true")) == [0, misses]


def test_a_command_without_a_cache_and_a_library_keep_nothing(cache_home):
  assert json.loads(python(COMMAND, "false")) == [0, 0]
  # Nor does whoever writes no figures wait for what writes them.
  assert python(LIBRARY) == "None False"
  assert not list(cache_home.iterdir())


def test_a_command_keeps_programs_at_home_where_no_folder_of_caches_is_named(unset, monkeypatch):
  # A name that isn't absolute isn't one, as XDG has it.
  for value in ("", "caches"):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(unset / f"home{value}"))
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    expected = unset / f"home{value}" / ".cache/bpd_jax/programs" / processor_fingerprint()
    assert jax.config.jax_compilation_cache_dir == str(expected)
    assert expected.stat().st_mode & 0o777 == 0o700
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


@pytest.mark.parametrize("value", ["/somewhere", ""])
def test_a_users_own_folder_stays(unset, monkeypatch, value):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
  keep_programs()
  assert jax.config.jax_compilation_cache_dir is None and not list(unset.iterdir())
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 1
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  jax.config.update("jax_compilation_cache_dir", value)
  keep_programs()
  assert jax.config.jax_compilation_cache_dir == value and not list(unset.iterdir())


def test_a_users_own_threshold_stays(unset, monkeypatch):
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
  keep_programs()
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 1
  assert Path(jax.config.jax_compilation_cache_dir).is_dir()


def test_switched_off_nothing_is_kept(unset):
  jax.config.update("jax_enable_compilation_cache", False)
  keep_programs()
  assert jax.config.jax_compilation_cache_dir is None and not list(unset.iterdir())


def test_a_folder_that_cannot_be_made_is_no_reason_to_fail(unset):
  (unset / "bpd_jax").write_text("a file")
  keep_programs()
  assert jax.config.jax_compilation_cache_dir is None


def test_programs_that_nobody_reads_are_deleted(tmp_path):
  # Of another processor too, which may be of a machine that is gone.
  old, other, new = (
      tmp_path / name for name in ("a/jit_f-0-cache", "b/jit_f-0-cache", "b/jit_g-0-cache")
  )
  mine = tmp_path / "b/notes"
  day = 24 * 60 * 60
  for path, days in ((old, 31), (other, 31), (new, 29), (mine, 99)):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"program")
    os.utime(path, (time.time() - days * day, time.time() - 99 * day))
  own = open_folder(tmp_path)
  assert own.is_dir() and own.parent == tmp_path
  assert {path for path in tmp_path.glob("*/*")} == {new, mine}


def test_processors_of_other_features_have_other_folders(tmp_path, monkeypatch):
  account = tmp_path / "cpuinfo"

  def fingerprint(**values):
    account.write_text(CPUINFO.format(**{"number": 0, "mhz": 2400.1, "flags": "avx2", **values}))
    return processor_fingerprint(account)

  assert fingerprint() == fingerprint(number=7, mhz=3000)
  assert fingerprint() != fingerprint(flags="avx2 avx512f")
  # A machine that says nothing of its processor shares no folder with others.
  unknown = []
  for name in ("one", "other"):
    monkeypatch.setattr("platform.node", lambda name=name: name)
    unknown.append(processor_fingerprint(tmp_path / "absent"))
  assert len({*unknown, fingerprint(), processor_fingerprint()}) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_folder(command, capsys):
  main = importlib.import_module(f"bpd_jax.{command}").main
  with pytest.raises(SystemExit) as ended:
    main(["--help"])
  assert ended.value.code == 0
  out = " ".join(capsys.readouterr().out.split())
  assert compilation_cache.describe_cache() in out


def test_help_of_a_command_that_keeps_nothing_names_none(capsys):
  with pytest.raises(SystemExit):
    launch.read_gin(["--help"], "program", "does", has_cache=False)
  assert "kept" not in capsys.readouterr().out


@pytest.mark.parametrize("num_maps, stays", [(4, True), (5, False), (None, False)])
def test_programs_are_dropped_where_there_is_little_room_for_more(tmp_path, num_maps, stays):
  double = jax.jit(lambda x: 2 * x)
  double(1)
  (tmp_path / "limit").write_text("9\n")
  if num_maps is not None:
    (tmp_path / "maps").write_text("7f00-7f01 r-xp\n" * num_maps)
  make_room(tmp_path / "maps", tmp_path / "limit")
  assert double._cache_size() == stays
