"""Makes a small copy of a trained model: parameters in bfloat16, read back as float32.

  python experiments/docstrings/ship.py runs/docstrings/distill/model experiments/docstrings/model
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from bpd_jax.checkpoints import describe, load_model, save_model
from bpd_jax.launch import run
from bpd_jax.partitioning import single_device
from bpd_jax.vocabulary import vocabulary_path


def main(argv: Sequence[str]) -> None:
  """Copies the model folder argv[0] to argv[1]."""
  source, target = argv
  config, params = load_model(source, single_device())
  small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  # The config stays as it is, so whoever loads the folder computes in float32.
  save_model(target, config, small, vocabulary_path(source), may_replace=True)
  # Orbax notes where it wrote, for file systems without renaming; nothing reads it here.
  for note in Path(target).rglob("commit_success.txt"):
    note.unlink()
  print(describe(config, small))
  print(f"written to  {target}")


if __name__ == "__main__":
  run(main)
