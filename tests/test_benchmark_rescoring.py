"""The rescoring benchmark's engines do the same work; nothing here looks at how fast."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from bpd_jax.benchmark.rescoring import (
    draw_lattices,
    find_paths,
    load_openfst,
    measure_rescoring,
    print_rescoring_report,
    RescoringOptions,
    shipped_text,
    WEIGHT,
)
from bpd_jax.decoding.scorers.ngram import ngram_params
from bpd_jax.errors import InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.ngram_lm.backoff import join_sequences
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.smoothing import kneser_ney

OPTIONS = RescoringOptions(
    batch_sizes=(3,), depth=3, top_k=5, num_paths=6, nodes=9, input_length=7, repeats=2
)
CONFIG = ModelConfig(
    vocab_size=160, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1,
)


# The fixture compiles a model, two scorers and OpenFst's graphs.
RECORD = pytest.mark.slow


@pytest.fixture(scope="module")
def record():
  with Progress(disable=True) as progress:
    return measure_rescoring(CONFIG, OPTIONS, progress, lambda text: None)


@RECORD
def test_all_engines_are_timed(record):
  pytest.importorskip("pynini")
  assert [batch["batch_size"] for batch in record["batches"]] == [3]
  for batch in record["batches"]:
    assert set(batch["seconds"]) == {
        "openfst", "2-gram", "4-gram", "2-gram, tree", "4-gram, tree", "call"
    }
    assert all(len(x) == 2 and min(x) > 0 for x in batch["seconds"].values())
    assert batch["proved"][2] == 1
    # Backing off by epsilon may find a cheaper way to one path's score, never a dearer.
    assert batch["best"]["openfst"] >= batch["best"]["2-gram"] - 1e-3
  json.dumps(record)


@RECORD
def test_the_report_says_every_figure(record):
  console = Console(width=200, record=True, file=open("/dev/null", "w"))
  print_rescoring_report(console, record, OPTIONS)
  text = console.export_text()
  assert "batch 3" in text and "call of 9 nodes" in text and "100%" in text


def exact_openfst(lattice, addends, num_paths):
  """OpenFST's n shortest paths of one lattice whose arcs have exact scores on them.

  Args:
    lattice: [1, depth, k].
    addends: [depth][k or 1, k], what each candidate is worth after each before it.
    num_paths: n.
  """
  import pynini

  depth, k = lattice.tokens.shape[1:]
  fst = pynini.Fst()
  start, end = fst.add_state(), fst.add_state()
  fst.set_start(start)
  fst.set_final(end)
  states = [[fst.add_state() for _ in range(k)] for _ in range(depth)]
  for i in range(depth):
    for b in range(k if i else 1):
      for c in range(k):
        weight = pynini.Weight("tropical", -float(addends[i][b if i else 0, c]))
        label = int(lattice.tokens[0, i, c]) + 1
        fst.add_arc(
            states[i - 1][b] if i else start, pynini.Arc(label, label, weight, states[i][c])
        )
  for state in states[-1]:
    fst.add_arc(state, pynini.Arc(0, 0, pynini.Weight.one("tropical"), end))
  best = pynini.shortestpath(fst, nshortest=num_paths)
  return sorted((-float(str(weight)) for weight in best.paths().weights()), reverse=True)


def test_p_best_is_openfsts_on_large_lattices():
  pytest.importorskip("pynini")
  options = RescoringOptions()
  sequences, vocab_size = shipped_text()
  model = kneser_ney(count_grams(join_sequences(sequences, vocab_size), 2, vocab_size))
  rng = np.random.default_rng(0)
  counts = np.bincount(np.concatenate(sequences), minlength=vocab_size)
  rows = 12
  lattice = draw_lattices(rng, counts, rows, options.depth, options.top_k)
  roots = rng.choice(np.flatnonzero(counts), rows).astype(np.int32)
  found = jax.jit(find_paths, static_argnums=(0, 1))(
      2, options, ngram_params(model), jax.tree.map(jax.numpy.asarray, lattice), roots
  )
  orders = model.orders[1]
  for row in range(rows):
    addends = []
    for i in range(options.depth):
      before = lattice.tokens[row, i - 1] if i else roots[row : row + 1]
      pairs = np.array([[orders.find(np.array([b]), np.array([t]))[0]
                         for t in lattice.tokens[row, i]] for b in before])
      backed = model.back_offs[0][before][:, None] + model.log_probs[0][lattice.tokens[row, i]]
      logs = np.where(pairs < 0, backed, model.log_probs[1][np.maximum(pairs, 0)])
      addends.append(lattice.scores[row, i] + WEIGHT * logs)
    one = jax.tree.map(lambda x: np.asarray(x)[row : row + 1], lattice)
    expected = exact_openfst(one, addends, options.num_paths)
    np.testing.assert_allclose(found.scores[row], expected, atol=2e-4)
  # As the benchmark runs it: the best path is the same but for cheaper back-offs.
  best, _ = load_openfst(model, lattice, roots, options.num_paths)(None)
  assert (np.array(best) >= np.asarray(found.scores[:, 0]) - 1e-3).all()
  assert np.mean(np.abs(np.array(best) - np.asarray(found.scores[:, 0])) < 1e-3) > 0.5


def test_options_that_are_none():
  with pytest.raises(InputError, match="depth"):
    RescoringOptions(depth=0)
  with pytest.raises(InputError, match=r"num_paths = 9: allowed is at most 2\^3"):
    RescoringOptions(depth=3, top_k=2, num_paths=9)
