"""Writes a random T5 in transformers' form, and rows of real text for it.

  python experiments/random_t5/make_t5.py runs/random_t5

The model reads and writes bytes, as ByT5 does, so any text will do. Its norms,
relative biases and parallel heads are random too: nothing about it is easy. The
texts are docstrings of Python's own library.
"""

import inspect
import json
from pathlib import Path
import sys

import gin
import jax
import numpy as np

from bpd_jax.interchange.huggingface import export_model
from bpd_jax.launch import read_gin_files
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import abstract_params
from bpd_jax.partitioning import single_device
from bpd_jax.vocabulary import BYTES_CLASS, BYTES_FILE

NUM_ROWS = 64
MODULES = ("argparse", "collections", "csv", "datetime", "difflib", "functools", "heapq", "inspect",
           "itertools", "json", "os", "random", "re", "shutil", "statistics", "subprocess",
           "tempfile", "textwrap", "threading", "zipfile")


def random_params(config: ModelConfig, seed: int):
  """Parameters of unit-variance outputs, none of them at a special value."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    noise = rng.standard_normal(leaf.shape, np.float32)
    if name == "scale":
      return (0.5 + rng.random(leaf.shape, np.float32)).astype(np.float32)
    if name == "embedding":
      return noise
    if name == "rel_embedding":
      return 2 * noise
    return noise * np.float32(leaf.shape[-2] ** -0.5)

  return jax.tree_util.tree_map_with_path(draw, abstract_params(config, single_device()))


def real_texts() -> list[str]:
  """Docstrings of 100 to 480 bytes, without repeats."""
  texts = []
  for name in MODULES:
    for _, member in sorted(vars(__import__(name)).items()):
      text = inspect.getdoc(member) if callable(member) else None
      if text and 100 <= len(text.encode()) <= 480 and text not in texts:
        texts.append(text)
  return texts[:: max(1, len(texts) // NUM_ROWS)][:NUM_ROWS]


def main(folder: Path) -> None:
  """Writes `transformers/` and `rows.jsonl` into a folder."""
  read_gin_files([str(Path(__file__).with_name("model.gin"))])
  config = gin.get_configurable("ModelConfig")()
  folder.mkdir(parents=True)
  tokenizer = folder / BYTES_FILE
  tokenizer.write_text(json.dumps({"tokenizer_class": BYTES_CLASS}) + "\n")
  export_model(folder / "transformers", config, random_params(config, seed=0), tokenizer)
  rows = "".join(json.dumps({"inputs": text}) + "\n" for text in real_texts())
  (folder / "rows.jsonl").write_text(rows)


if __name__ == "__main__":
  main(Path(sys.argv[1]))
