"""Paths as users give them, and what a resumed command compares."""

import os
from pathlib import Path
import re
import shutil

from flax import traverse_util
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bpd_jax import decode, folders, ngram, prepare
from bpd_jax.checkpoints import leaf_shapes_of, load_config, read_back, save_model
from bpd_jax.data.datasets import CachedTask
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.token_cache import TokenCache, write_cache
from bpd_jax.errors import InputError
from bpd_jax.evaluation.tuning import Tuned
from bpd_jax.folders import contents_fingerprint, local_path
from bpd_jax.generation import load
from bpd_jax.interchange.huggingface import import_model
from bpd_jax.model.config import ModelConfig
from bpd_jax.ngram_lm.arpa import info_path, read_arpa
from bpd_jax.training.checkpointing import Checkpoints
from bpd_jax.vocabulary import ByteVocabulary, open_vocabulary, vocabulary_path

BUCKETS = ["gs://bucket/x", "s3://bucket/x", Path("gs://bucket/x"), "hdfs://host:90/x"]


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home, while the current folder is another one."""
  (tmp_path / "home").mkdir()
  (tmp_path / "here").mkdir()
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path / "home"


@pytest.mark.parametrize("path, expected", [
    ("~", "{home}"), ("~/a/b", "{home}/a/b"), ("a/~/b", "a/~/b"), ("c:/x", "c:/x"),
    (Path("~/a"), "{home}/a"), ("a:b/c", "a:b/c"), ("/x//y/", "/x/y"),
])
def test_a_path_is_a_users(home, path, expected):
  assert local_path(path) == Path(expected.format(home=home))


@pytest.mark.parametrize("path", BUCKETS)
def test_a_path_elsewhere_is_refused(path):
  with pytest.raises(InputError, match=f"^output = {re.escape(repr(str(path)))}: allowed is a pa"):
    local_path(path, "output")


def test_a_home_that_there_is_not():
  with pytest.raises(InputError, match="^path = '~nobody-here/x': allowed is a path of a user"):
    local_path("~nobody-here/x")


def resume(path):
  with folders.resumable_folder(path, {}):
    pass


def write_to(path):
  with folders.new_file(path) as partial:
    partial.write_text("x")


# All that takes a path from a user, reading or writing.
TAKERS = {
    "a model folder": load,
    "a model's config": load_config,
    "a model to write": lambda path: save_model(path, ModelConfig(), {}),
    "a folder to make": folders.check_new,
    "an evaluation": resume,
    "a file to make": write_to,
    "contents": contents_fingerprint,
    "a run's states": lambda path: Checkpoints(path).close(),
    "rows": lambda path: JsonlTask("rows", str(path)).rows(),
    "caches": lambda path: TokenCache(CachedTask(str(path), "x").path),
    "a cache": TokenCache,
    "a cache to write": lambda path: write_cache(
        path, [([1], [1])], task="x", split="train", vocabulary=ByteVocabulary()),
    "n-grams": read_arpa,
    "n-grams' JSON": lambda path: info_path(path).read_text(),
    "n-grams to write": lambda path: ngram.check_new(str(path)),
    "a source of n-grams": lambda path: ngram.read_source(str(path), "targets"),
    "a vocabulary": lambda path: open_vocabulary(path, 300),
    "a folder's vocabulary": lambda path: vocabulary_path(path).read_text(),
    "a vocabulary to prepare with": lambda path: prepare.find_vocabulary(str(path)),
    "rows to write": lambda path: prepare.write_rows("x", "train", str(path)),
    "prompts": lambda path: decode.read_prompts([], str(path), None),
    "a picture": lambda path: decode.save_picture(str(path), [], None, ByteVocabulary()),
    "weights": lambda path: Tuned(str(path)).task("x"),
    "transformers' folder": import_model,
}


@pytest.mark.parametrize("taker", TAKERS)
def test_whatever_takes_a_path_refuses_one_elsewhere(home, taker):
  for path in BUCKETS[::2]:
    with pytest.raises(InputError, match="a path on a local disk"):
      TAKERS[taker](path)
  assert os.listdir(".") == [] and os.listdir(home) == []


def test_what_is_written_to_a_home_is_read_from_it(home):
  vocabulary = ByteVocabulary()
  write_cache("~/caches/toy", [([5, 1], [6, 1])], task="toy", split="train", vocabulary=vocabulary)
  assert len(TokenCache(CachedTask("~/caches", "toy").path)) == 1
  assert ngram.read_source("~/caches/toy", "targets").vocab_size == vocabulary.size
  (home / "rows.jsonl").write_text('{"inputs": "a"}\n')
  assert JsonlTask("rows", "~/rows.jsonl").rows() == [{"inputs": "a"}]
  assert [*decode.read_prompts([], "~/rows.jsonl", "inputs").values()] == ["a"]
  write_to("~/x")
  assert sorted(os.listdir(home)) == ["caches", "rows.jsonl", "x"]
  assert os.listdir(".") == []


@pytest.mark.parametrize("name", ["run[1]", "a*", "what?", "]"])
def test_characters_that_orbax_takes_for_a_pattern(tmp_path, name):
  message = r"= '.*': allowed is a path without \* \? \[ \], which Orbax can't read back"
  for folder in (tmp_path / name, tmp_path / name / "inside"):
    with pytest.raises(InputError, match=f"^folder {message}"):
      save_model(folder, ModelConfig(), {})
    with pytest.raises(InputError, match=f"^workdir {message}"):
      Checkpoints(folder)
  assert os.listdir(tmp_path) == []


def test_what_orbax_cannot_read_back_is_not_called_written(tmp_path):
  """Orbax itself, on a path with brackets: it says that all is well, and isn't believed."""
  part = {"a": jnp.arange(3.0)}
  for folder, is_read in ((tmp_path / "m1", True), (tmp_path / "m[1]", False)):
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / "params", part | {"b": np.ones(4)})
    assert (folder / "params/_METADATA").is_file()
    if is_read:
      read_back(folder / "params", part)
      with pytest.raises(InputError, match="a path that keeps what is written there"):
        read_back(folder / "params", {"a": jnp.arange(3.0) + 1})
    else:
      with pytest.raises(InputError, match="a path that can be read back"):
        read_back(folder / "params", part)


def test_a_models_contents_are_read_back(tmp_path, monkeypatch):
  """A disk that loses what it was given: nothing is left that looks like a model."""
  save = ocp.StandardCheckpointer.save

  def lose(self, path, *args, **kwargs):
    save(self, path, *args, **kwargs)
    self.wait_until_finished()
    for file in Path(path).rglob("d/*"):
      file.unlink()

  monkeypatch.setattr(ocp.StandardCheckpointer, "save", lose)
  config = ModelConfig(
      vocab_size=32, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_encoder_layers=1,
      num_decoder_layers=1,
  )
  params = traverse_util.unflatten_dict(
      {name: np.ones(shape, np.float32) for name, shape in leaf_shapes_of(config).items()}, sep="/"
  )
  with pytest.raises(InputError, match="a path that can be read back"):
    save_model(tmp_path / "model", config, params)
  assert os.listdir(tmp_path) == []


def test_a_states_path_is_proved_at_the_first_save(tmp_path, monkeypatch):
  read = []
  monkeypatch.setattr(
      "bpd_jax.training.checkpointing.read_back", lambda folder, part: read.append((folder, part))
  )
  state = {"large": np.ones(100), "small": np.ones(2), "none": None}
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state)
  assert [(folder, [*part]) for folder, part in read] == [
      (tmp_path / "checkpoints/1/default", ["small"])
  ]


def test_contents_are_compared_and_nothing_else(tmp_path):
  first = tmp_path / "first"
  (first / "d").mkdir(parents=True)
  (first / "a").write_text("one")
  (first / "d/b").write_text("two")
  before = contents_fingerprint(first)
  times = (first / "a").stat()
  # Copied, moved, touched, named with a slash at its end: the same.
  shutil.copytree(first, tmp_path / "copy")
  os.utime(tmp_path / "copy/a", ns=(1, 1))
  assert contents_fingerprint(tmp_path / "copy") == before
  assert contents_fingerprint(f"{first}/") == before
  assert contents_fingerprint(first / "a") == contents_fingerprint(tmp_path / "copy/a")
  # Of the same size and time, but other bytes; another name; a file more: another.
  (first / "a").write_text("six")
  os.utime(first / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
  seen = {before, contents_fingerprint(first)}
  (tmp_path / "copy/d/b").rename(tmp_path / "copy/d/c")
  seen.add(contents_fingerprint(tmp_path / "copy"))
  (tmp_path / "copy/d/e").write_text("")
  seen.add(contents_fingerprint(tmp_path / "copy"))
  assert len(seen) == 4
  with pytest.raises(InputError, match=r"^path = '.*absent': allowed is one that can be read \(No"):
    contents_fingerprint(tmp_path / "absent")
