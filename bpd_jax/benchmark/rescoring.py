"""What re-scoring a lattice costs: beside OpenFST, and beside the call it is for.

Lattices are drawn from the unigrams of the shipped rows' text, the n-grams are counted
in it. OpenFST (pynini) composes a lattice with the n-grams as an automaton, backing off
by epsilon arcs, and takes the n shortest paths; building its lattices is left out, and
so is putting ours on the device. It runs in a process of its own.
"""

import dataclasses
import functools
import importlib.util
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bpd_jax.addons.addon import ADDON_VIEW
from bpd_jax.addons.heads import Heads, HeadsReader
from bpd_jax.benchmark.engines import check_counts, PAUSE_SECONDS, Spread, Worker
from bpd_jax.data.rows import load_rows, TASKS, VOCABULARY_FILE
from bpd_jax.decoding.lattice import top_k_lattice
from bpd_jax.decoding.rescoring import constant_weights, Rescorer, RescorerParams
from bpd_jax.decoding.scorers.ngram import ngram_params, NgramParams, NgramScorer
from bpd_jax.decoding.search import best_paths, merge_paths
from bpd_jax.decoding.types import Lattice, Params
from bpd_jax.errors import InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import decode_view, EncoderDecoder, init_params
from bpd_jax.ngram_lm.backoff import BackOff, join_sequences
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.smoothing import kneser_ney
from bpd_jax.partitioning import single_device
from bpd_jax.reader import make_cache, prefill
from bpd_jax.vocabulary import SentencePieceVocabulary

WEIGHT = 0.5
# A timing goes on for so long, as one search alone is too short for it.
SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class RescoringOptions:
  """What is timed.

  Attributes:
    batch_sizes: lattices together.
    depth: steps of a lattice.
    top_k: candidates of a step.
    num_paths: p, of the p best.
    beam_width: for orders above 2.
    nodes: of the decoder call beside which the cost is put.
    input_length: tokens of its inputs.
    repeats: timed runs of everything.
    threads: cores of every engine.
  """

  batch_sizes: tuple[int, ...] = (1, 8, 32)
  depth: int = 8
  top_k: int = 16
  num_paths: int = 16
  beam_width: int = 64
  nodes: int = 16
  input_length: int = 256
  repeats: int = 7
  threads: int = 2

  def __post_init__(self):
    check_counts(self)
    if self.num_paths > self.top_k**self.depth:
      raise InputError("num_paths", self.num_paths, f"at most {self.top_k}^{self.depth}")


def shipped_text() -> tuple[list[np.ndarray], int]:
  """Token ids of the references of all shipped rows, and the vocabulary's size."""
  vocabulary = SentencePieceVocabulary(VOCABULARY_FILE)
  texts = [
      row["targets"] for task in TASKS for split in ("validation", "test")
      for row in load_rows(task, split)
  ]
  return [np.asarray(vocabulary.encode(text), np.int32) for text in texts], vocabulary.size


def draw_lattices(
    rng: np.random.Generator, counts: np.ndarray, batch: int, depth: int, k: int
) -> Lattice:
  """Distinct candidates by their counts, log-probabilities falling."""
  noise = rng.gumbel(size=(batch, depth, len(counts))) + np.log(np.maximum(counts, 1e-9))
  tokens = np.argsort(-noise, axis=-1)[..., :k].astype(np.int32)
  scores = -np.sort(rng.exponential(2, (batch, depth, k)), axis=-1).astype(np.float32)
  return Lattice(tokens, scores, np.full([batch], depth, np.int32))


def load_openfst(model: BackOff, lattice: Lattice, roots: np.ndarray, num_paths: int):
  """OpenFST's composition and shortest paths; a call does all lattices and says the time.

  Args:
    model: of order 2.
    lattice: [batch, depth, k].
    roots: [batch], the token before each lattice.
    num_paths: how many paths.
  """
  import pynini

  grammar = pynini.Fst()
  vocab_size = model.vocab_size
  weight = lambda value: pynini.Weight("tropical", float(value))
  states = [grammar.add_state() for _ in range(vocab_size + 1)]
  backed_off = states[vocab_size]
  for state in states:
    grammar.set_final(state)
  # Label 0 is epsilon, so tokens are shifted by one.
  for token in range(vocab_size):
    cost = -WEIGHT * model.log_probs[0][token]
    grammar.add_arc(backed_off, pynini.Arc(token + 1, token + 1, weight(cost), states[token]))
    cost = -WEIGHT * model.back_offs[0][token]
    grammar.add_arc(states[token], pynini.Arc(0, 0, weight(cost), backed_off))
  pairs = model.orders[1]
  for before, token, log_prob in zip(
      pairs.context.tolist(), pairs.token.tolist(), model.log_probs[1].tolist()
  ):
    arc = pynini.Arc(token + 1, token + 1, weight(-WEIGHT * log_prob), states[token])
    grammar.add_arc(states[before], arc)
  grammar.arcsort("ilabel")
  started = []
  for root in roots:
    # The grammar's start is where the root leads.
    own = grammar.copy()
    own.set_start(states[int(root)])
    started.append(own)
  lattices = []
  for tokens, scores in zip(np.asarray(lattice.tokens), np.asarray(lattice.scores)):
    fst = pynini.Fst()
    nodes = [fst.add_state() for _ in range(len(tokens) + 1)]
    fst.set_start(nodes[0])
    fst.set_final(nodes[-1])
    for i, (step, values) in enumerate(zip(tokens.tolist(), scores.tolist())):
      for token, value in zip(step, values):
        fst.add_arc(nodes[i], pynini.Arc(token + 1, token + 1, weight(-value), nodes[i + 1]))
    lattices.append(fst.arcsort("olabel"))

  def run(inputs: Any = None) -> tuple[list[float], float]:
    began = time.perf_counter()
    found = [
        pynini.shortestpath(pynini.compose(fst, own), nshortest=num_paths)
        for fst, own in zip(lattices, started)
    ]
    seconds = time.perf_counter() - began
    best = [-float(pynini.shortestdistance(fst, reverse=True)[fst.start()]) for fst in found]
    return best, seconds

  return run


def find_paths(
    order: int, options: RescoringOptions, params: NgramParams, lattice: Lattice, roots: Any
):
  """The p best paths of lattices under n-grams."""
  rescorer = Rescorer((NgramScorer(order),))
  weights = constant_weights((WEIGHT,), options.depth)
  state = jnp.full([roots.shape[0], order - 1], -1, jnp.int32).at[:, -1].set(roots)
  score = rescorer.path_score(RescorerParams(weights, (params,)), (state,), lattice)
  return best_paths(lattice, score, options.num_paths, options.beam_width)


def _timed(function, *args) -> float:
  """Seconds of a call, the mean of as many as fit `SECONDS`."""
  began, calls = time.perf_counter(), 0
  while time.perf_counter() - began < SECONDS:
    # One at a time: calls that are under way together share the cores.
    jax.block_until_ready(function(*args))
    calls += 1
  return (time.perf_counter() - began) / calls


def measure_rescoring(
    config: ModelConfig, options: RescoringOptions, progress: Progress, say=print
) -> dict[str, Any]:
  """Runs everything, alternating; what compiles runs once before.

  Args:
    config: of the model whose decoder call is timed.
    options: what to run.
    progress: shows how many runs are done.
    say: gets a line where an engine is left out.

  Returns:
    batches: for each batch size `batch_size`, `seconds` by engine [repeats], of all
    lattices together, `proved` by order, and `best`, the mean score of the best path by
    engine.
  """
  sequences, vocab_size = shipped_text()
  rng = np.random.default_rng(0)
  counts = np.bincount(np.concatenate(sequences), minlength=vocab_size)
  counts[:3] = 0  # Padding, EOS and the unknown are no candidates.
  tokens = join_sequences(sequences, vocab_size)
  models = {
      order: kneser_ney(count_grams(tokens, order, vocab_size), (1, 1, 2, 4)[:order])
      for order in (2, 4)
  }
  params = {order: ngram_params(model) for order, model in models.items()}
  has_openfst = importlib.util.find_spec("pynini") is not None
  if not has_openfst:
    say("openfst is left out: pynini isn't installed")
  names = ["openfst", *(f"{n}-gram" for n in models), *(f"{n}-gram, tree" for n in models), "call"]
  bar = progress.add_task("", total=len(options.batch_sizes) * (options.repeats + 1) * len(names))
  batches = []
  for batch_size in options.batch_sizes:
    lattice = draw_lattices(rng, counts, batch_size, options.depth, options.top_k)
    roots = rng.choice(np.flatnonzero(counts), batch_size).astype(np.int32)
    lattice = jax.tree.map(jnp.asarray, lattice)
    runs, proved, best = {}, {}, {}
    for order, own in params.items():
      find = jax.jit(functools.partial(find_paths, order, options))
      paths = find(own, lattice, roots)
      proved[order] = float(np.mean(paths.is_exact))
      best[f"{order}-gram"] = float(np.mean(paths.scores[:, 0]))

      def make_tree(own, lattice, roots, order=order):
        paths = find_paths(order, options, own, lattice, roots)
        return merge_paths(lattice, roots, paths, options.nodes)

      runs[f"{order}-gram"] = functools.partial(_timed, find, own, lattice, roots)
      runs[f"{order}-gram, tree"] = functools.partial(
          _timed, jax.jit(make_tree), own, lattice, roots
      )
    runs["call"] = _decoder_call(config, options, batch_size)
    worker = None
    if has_openfst:
      worker = Worker(load_openfst, models[2], jax.device_get(lattice), roots, options.num_paths)
      found, _ = worker(None)
      best["openfst"] = float(np.mean(found))
      runs["openfst"] = lambda worker=worker: worker(None)[1]
    seconds = {name: [] for name in names if name in runs}
    for repeat in range(options.repeats + 1):
      for name in seconds:
        progress.update(bar, description=f"{name}, batch {batch_size}")
        time.sleep(PAUSE_SECONDS)
        value = runs[name]()
        progress.advance(bar)
        if repeat:
          seconds[name].append(value)
    if worker is not None:
      worker.close()
    batches.append({
        "batch_size": batch_size, "seconds": seconds, "proved": proved, "best": best,
    })
  sizes = {
      f"{order}-gram": {"ngrams": sum(model.num_grams), "bytes": params[order].arrays.num_bytes}
      for order, model in models.items()
  }
  return {"ngrams": sizes, "batches": batches}


def _decoder_call(config: ModelConfig, options: RescoringOptions, batch_size: int):
  """A decoder call over `nodes` with the heads' lattice before it, ready to be timed."""
  model = EncoderDecoder(config, single_device(), is_view=True)
  view = jax.jit(functools.partial(decode_view, config))(
      init_params(config, single_device(), jax.random.key(0))
  )
  heads, reader = Heads(options.depth + 1), HeadsReader(model)
  own = ADDON_VIEW(heads, heads.begin(config, single_device(), jax.random.key(1)))
  inputs = np.full([batch_size, options.input_length], 5, np.int32)
  context = jax.jit(functools.partial(prefill, model))(
      view, inputs, np.full([batch_size], options.input_length, np.int32)
  )
  cache = make_cache(model, batch_size, 128)
  nodes = options.nodes
  depth = np.arange(nodes, dtype=np.int32)[None]
  visible = np.tri(nodes, dtype=bool)[None]

  @jax.jit
  def call(view, own, context, cache, hidden):
    apply = functools.partial(model.apply, {"params": view})
    states = reader.head_states(Params(view, own), hidden, options.depth)
    logits = reader.logits(view, states)
    steps = jnp.full([batch_size], options.depth, jnp.int32)
    lattice = top_k_lattice(logits, options.top_k, steps)
    tokens = jnp.resize(lattice.tokens.reshape(batch_size, -1), (batch_size, nodes))
    states, *_ = apply(
        tokens, depth, visible, tuple(zip(cache.keys, cache.values)), cache.lengths,
        context.cross, context.mask, method="decode_block",
    )
    return apply(states, method="logits").max(-1), states[:, -1]

  hidden = jnp.ones([batch_size, config.d_model], config.dtype)
  return functools.partial(_timed, call, view, own, context, cache, hidden)


def print_rescoring_report(
    console: Console, record: dict[str, Any], options: RescoringOptions
) -> None:
  """The tables."""
  shape = f"{options.depth} × {options.top_k} lattices, {options.num_paths} best paths"
  spread = lambda values, scale: Spread.of([value * scale for value in values]).text(1)
  for batch in record["batches"]:
    seconds, size = batch["seconds"], batch["batch_size"]
    table = Table(
        title=f"{shape}, batch {size}; median (least–largest) of {options.repeats}"
    )
    for column in ("what", "µs a lattice", "× OpenFST's speed", "proved", "% of the call"):
      table.add_column(column, justify="left" if column == "what" else "right")
    for name, values in seconds.items():
      order = name.partition("-")[0]
      cells = ["", "", ""]
      if name in ("2-gram", "openfst") and "openfst" in seconds:
        cells[0] = Spread.ratio(seconds["openfst"], values).text(2)
      if name.endswith("-gram"):
        cells[1] = f"{batch['proved'][int(order)]:.0%}"
      if name.endswith("tree"):
        parts = [100 * a / b for a, b in zip(values, seconds["call"])]
        cells[2] = Spread.of(parts).text(1)
      shown = f"call of {options.nodes} nodes, with heads" if name == "call" else name
      table.add_row(shown, spread(values, 1e6 / size), *cells)
    console.print(table)
