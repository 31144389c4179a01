"""Rows of two kinds that nobody trained on: a licence's prose, and random words.

  python experiments/blocks/unseen.py

Writes `runs/blocks/prose.jsonl` and `runs/blocks/words.jsonl`.
"""

import json
from pathlib import Path
import re

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "runs/blocks"
ROWS, WORDS = 40, 24
# Tasks whose targets are as long as inputs, so that a model has something to write.
INSTRUCTIONS = ("format:", "continue:")


def main() -> None:
  """Writes both files."""
  text = (ROOT / "LICENSE").read_text(encoding="utf-8")
  paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
  prose = [part for part in paragraphs if len(part.split()) >= WORDS][:ROWS]
  vocabulary = sorted(set(re.findall(r"[a-z]{3,}", text.lower())))
  rng = np.random.default_rng(0)
  words = [" ".join(rng.choice(vocabulary, WORDS)) for _ in range(ROWS)]
  FOLDER.mkdir(parents=True, exist_ok=True)
  for name, rows in (("prose", prose), ("words", words)):
    lines = [
        json.dumps({"inputs": f"{INSTRUCTIONS[i % 2]} {' '.join(row.split()[: 2 * WORDS])}"})
        for i, row in enumerate(rows)
    ]
    (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} rows written to {FOLDER / name}.jsonl")


if __name__ == "__main__":
  main()
