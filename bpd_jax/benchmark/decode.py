"""Times decoding on this machine's CPU, beside other engines with the same weights.

  python -m bpd_jax.benchmark decode

The model is a random T5 1.1 small with 8 heads in float32. The column of its
output projection that belongs to EOS is zero: some other logit of the 32,127 is
positive, so no engine ever ends a row and all of them make the same number of
tokens. Every engine gets the same weights, inputs, cores and number of threads.
The others run in processes of their own: beside XLA's libraries PyTorch takes
twice as long. Repeats alternate between the engines, and a ratio is the
median of the ratios of neighbours, so that a machine that is slower for a while
is slower for both. Compilation and warm-up are left out, waiting for the last
result isn't.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bpd_jax.addons.addon import ADDON_VIEW
from bpd_jax.addons.heads import Heads
from bpd_jax.benchmark.engines import (
    missing_packages,
    PACKAGES,
    PAUSE_SECONDS,
    quiet_transformers,
    Spread,
    Worker,
)
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.decoding.types import Context, Drafting, Prompt
from bpd_jax.errors import InputError
from bpd_jax.interchange.huggingface import export_model
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import decode_view, EncoderDecoder, init_params
from bpd_jax.partitioning import single_device
from bpd_jax.programs import CACHE, DECODE, DecodeParams, DecodeSettings, PREFILL
from bpd_jax.reader import ModelReader

BLOCK_SIZE = 8
# Calls that a timing of one width makes.
NUM_CALLS = 32
VOCABULARY_FILE = "shared_vocabulary.json"

# [batch, input length] int32 -> [batch, output length] int32, and its seconds.
Run = Callable[[np.ndarray], tuple[np.ndarray, float]]


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured.

  Attributes:
    batch_sizes: rows decoded together.
    widths: nodes of the decoder calls whose cost is measured; 1 is greedy's.
    repeats: timed runs of everything.
    input_length: tokens of every prompt.
    output_length: tokens of every output.
    threads: cores and threads of every engine.
  """

  batch_sizes: tuple[int, ...] = (1, 8)
  widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
  repeats: int = 5
  input_length: int = 256
  output_length: int = 128
  threads: int = 2

  def __post_init__(self):
    for name in ("repeats", "input_length", "output_length", "threads"):
      if getattr(self, name) < 1:
        raise InputError(name, getattr(self, name), "a positive integer")
    for name in ("batch_sizes", "widths"):
      values = getattr(self, name)
      if not values or min(values) < 1 or len(set(values)) < len(values):
        raise InputError(name, list(values), "different positive integers")
    if self.output_length < BLOCK_SIZE:
      raise InputError(
          "output_length", self.output_length, f"at least {BLOCK_SIZE}, the block size"
      )
    if max(self.widths) > self.output_length:
      raise InputError(
          "widths", max(self.widths), f"1 … {self.output_length}, the output length"
      )


class Decoder:
  """This package's decoding, one jitted program a stage.

  Attributes:
    config: of the model.
    options: lengths.
    view: the parameters as decoding reads them.
  """

  def __init__(self, config: ModelConfig, params: Any, options: Options):
    self.config = config
    self.options = options
    self.view = jax.block_until_ready(
        jax.jit(functools.partial(decode_view, config))(params)
    )
    model = EncoderDecoder(config, single_device(), is_view=True)
    self._model = model
    heads = Heads(BLOCK_SIZE)
    own = heads.begin(config, single_device(), jax.random.key(1))
    self._drafting = functools.partial(heads.make, ModelReader(model), ADDON_VIEW(heads, own))

  def prefill(self, inputs: np.ndarray) -> tuple[Context, float]:
    """Runs the encoder over [batch, input length]; the context and seconds."""
    lengths = np.full([inputs.shape[0]], inputs.shape[1], np.int32)
    began = time.perf_counter()
    context = jax.block_until_ready(PREFILL(self._model, self.view, inputs, lengths))
    return context, time.perf_counter() - began

  def loop(
      self, context: Context, width: int, num_tokens: int, references: np.ndarray | None = None,
  ) -> tuple[np.ndarray, int, float]:
    """Decodes to `num_tokens` tokens a row in buffers of the output length.

    Args:
      context: from `prefill`.
      width: nodes of a call; with 1 it is greedy.
      num_tokens: limit of every row.
      references: [batch, n] int32, what is drafted; by default what the heads say.

    Returns:
      Tokens [batch, num_tokens], decoder calls of the loop, and seconds.
    """
    length, batch_size = self.options.output_length, context.mask.shape[0]
    if references is not None and width > 1:
      drafting = Drafting(ReferenceDrafter(width - 1))
    else:
      drafting = self._drafting(block_size=width).drafting
    settings, params = DecodeSettings(drafting.drafter), DecodeParams(self.view, drafting.params)
    limits = np.full([batch_size], num_tokens, np.int32)
    began = time.perf_counter()
    prompt = Prompt(limits[:, None], limits, length, references=references)
    cache = CACHE(self._model, settings, batch_size, length)
    state = jax.block_until_ready(DECODE(
        self._model, settings, params, context, prompt, limits, 0, limits, cache
    ))
    seconds = time.perf_counter() - began
    return np.asarray(state.tokens)[:, :num_tokens], int(state.call), seconds


def random_params(config: ModelConfig, seed: int = 0) -> Any:
  """Random weights under which EOS is never the best token."""
  params = init_params(config, single_device(), jax.random.key(seed))
  params["logits_kernel"] = params["logits_kernel"].at[:, config.eos_id].set(0)
  return params


def load_transformers(folder: Path, options: Options) -> Run:
  """transformers on PyTorch: `generate` with its cache, greedy."""
  import torch
  import transformers

  quiet_transformers()
  torch.set_num_threads(options.threads)
  model = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
  model.eval()

  def decode(inputs):
    with torch.inference_mode():
      tokens = torch.from_numpy(inputs).long()
      began = time.perf_counter()
      out = model.generate(
          tokens, attention_mask=torch.ones_like(tokens), do_sample=False, num_beams=1,
          max_new_tokens=options.output_length,
      )
      seconds = time.perf_counter() - began
    return out[:, 1:].numpy(), seconds

  return decode


def make_words_distinct(file: Path) -> None:
  """Names the tokens of a converted vocabulary by their ids, but for the special three.

  CTranslate2 takes and gives words. Without a tokenizer its converter makes
  them up, some of them twice.
  """
  words = json.loads(file.read_text(encoding="utf-8"))
  special = ("<pad>", "</s>", "<unk>")
  words = [word if word in special else str(i) for i, word in enumerate(words)]
  file.write_text(json.dumps(words), encoding="utf-8")


def load_ctranslate2(source: Path, options: Options, compute_type: str) -> Run:
  """CTranslate2, greedy, from a folder that its own converter makes of transformers'."""
  import ctranslate2

  quiet_transformers()
  folder = source.with_name(f"ctranslate2_{compute_type}")
  ctranslate2.converters.TransformersConverter(str(source)).convert(str(folder))
  make_words_distinct(folder / VOCABULARY_FILE)
  translator = ctranslate2.Translator(
      str(folder), device="cpu", compute_type=compute_type, inter_threads=1,
      intra_threads=options.threads,
  )
  words = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
  ids = {word: i for i, word in enumerate(words)}

  def decode(inputs):
    rows = [[words[token] for token in row] for row in inputs]
    began = time.perf_counter()
    results = translator.translate_batch(
        rows, beam_size=1, min_decoding_length=options.output_length,
        max_decoding_length=options.output_length,
    )
    seconds = time.perf_counter() - began
    return np.array([[ids[word] for word in row.hypotheses[0]] for row in results]), seconds

  return decode


def load_peers(
    config: ModelConfig, params: Any, options: Options, folder: Path, say: Callable[[str], None]
) -> dict[str, Worker]:
  """The other engines that can run here, all with these weights.

  Args:
    config: of the model.
    params: its parameters.
    options: threads and lengths.
    folder: an empty folder for their files.
    say: gets one line for each engine that is left out.
  """
  workers: dict[str, Worker] = {}
  for name in PACKAGES:
    if missing := missing_packages(name):
      say(f"{name} is left out: {', '.join(missing)} not installed (extra bench)")
      continue
    if not (folder / "transformers").exists():
      export_model(folder / "transformers", config, jax.device_get(params))
    if name == "transformers":
      workers[name] = Worker(load_transformers, folder / "transformers", options)
      continue
    for compute_type in ("float32", "int8"):
      workers[f"{name} {compute_type}"] = Worker(
          load_ctranslate2, folder / "transformers", options, compute_type
      )
  return workers


def measure(
    config: ModelConfig, options: Options, progress: Progress, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
  """Runs everything; compiles first, then times in alternating repeats.

  Args:
    config: of the model; untied. It gets `BLOCK_SIZE` heads.
    options: what to run.
    progress: shows how many runs are done.
    say: gets one line for each engine that is left out.

  Returns:
    One record a batch size, raw figures only, ready for JSON:
      batch_size: rows.
      engines: name -> seconds [repeats]; num_tokens of all rows; num_calls,
        the decoder calls of a run; loop_seconds [repeats], this package's time
        without the encoder, else None; differences, [row, position of the first
        token that isn't greedy's] of every row that has one.
      calls: for each width its milliseconds [repeats] a decoder call that
        verifies given drafts, num_heads, the heads read to draft for it, and
        blockwise_milliseconds [repeats], a call that reads them too.
      floor: bytes and milliseconds [repeats] to read once what a greedy call
        reads: `weights`, and `all`, with the encoder's keys and values.
  """
  params = random_params(config)
  decoder = Decoder(config, params, options)
  with tempfile.TemporaryDirectory() as folder:
    peers = load_peers(config, params, options, Path(folder), say)
    widths = call_widths(options)
    runs = (3 + len(peers) + len(widths) + sum(1 < w <= BLOCK_SIZE for w in widths) + 2)
    task = progress.add_task("", total=runs * (options.repeats + 1) * len(options.batch_sizes))

    def timed(name: str, run: Callable[[], Any]) -> Any:
      progress.update(task, description=name)
      time.sleep(PAUSE_SECONDS)
      result = run()
      progress.advance(task)
      return result

    try:
      return [
          _measure_batch(decoder, peers, widths, batch_size, timed)
          for batch_size in options.batch_sizes
      ]
    finally:
      for peer in peers.values():
        peer.close()


def call_widths(options: Options) -> list[int]:
  """The widths to time: greedy's and that of all heads are always among them."""
  return sorted({1, BLOCK_SIZE, *options.widths})


def _measure_batch(
    decoder: Decoder, peers: dict[str, Worker], widths: Sequence[int], batch_size: int, timed
) -> dict[str, Any]:
  """The record of one batch size; see `measure`."""
  config, options = decoder.config, decoder.options
  rng = np.random.default_rng(batch_size)
  inputs = rng.integers(
      config.eos_id + 1, config.vocab_size, [batch_size, options.input_length], dtype=np.int32
  )
  context, _ = decoder.prefill(inputs)
  greedy, _, _ = decoder.loop(context, 1, options.output_length)
  # EOS as a draft is wrong at every place, so a call emits exactly one token.
  wrong = np.full_like(greedy, config.eos_id)
  num_calls = min(NUM_CALLS, options.output_length)

  def own(width, references=None):
    def decode(inputs):
      context, prefill_seconds = decoder.prefill(inputs)
      tokens, calls, seconds = decoder.loop(
          context, width, options.output_length, references
      )
      return tokens, prefill_seconds + seconds, calls, seconds

    return decode

  engines = {
      "greedy": own(1),
      "perfect drafts": own(BLOCK_SIZE, greedy),
      "fresh heads": own(BLOCK_SIZE),
      **{name: lambda inputs, run=run: (*run(inputs), None, None) for name, run in peers.items()},
  }
  record = {
      "batch_size": batch_size,
      "engines": {name: {"seconds": [], "loop_seconds": []} for name in engines},
      "calls": [
          {
              "width": width, "num_heads": min(width, BLOCK_SIZE) - 1, "milliseconds": [],
              "blockwise_milliseconds": [],
          }
          for width in widths
      ],
      "floor": {},
  }

  def run_engine(name, keep):
    tokens, seconds, calls, loop_seconds = timed(name, lambda: engines[name](inputs))
    if tokens.shape != greedy.shape:
      raise RuntimeError(f"{name} made tokens of shape {tokens.shape}, not {greedy.shape}")
    if not keep:
      return
    engine = record["engines"][name]
    engine["seconds"].append(seconds)
    engine["loop_seconds"].append(loop_seconds)
    differs = tokens != greedy
    engine["num_tokens"] = int(tokens.size)
    engine["num_calls"] = calls
    engine["differences"] = [
        [int(row), int(differs[row].argmax())] for row in np.flatnonzero(differs.any(1))
    ]

  def run_call(call, references, kept, keep):
    width = call["width"]
    _, calls, seconds = timed(
        f"{width} nodes, {'heads' if references is None else 'given drafts'}",
        lambda: decoder.loop(context, width, num_calls, references),
    )
    if keep:
      call[kept].append(1e3 * seconds / calls)

  def run_floor(name, leaves, keep):
    floor = record["floor"].setdefault(
        name, {"bytes": sum(leaf.nbytes for leaf in leaves), "milliseconds": []}
    )
    seconds = timed(f"reading {name}", lambda: read_seconds(leaves))
    if keep:
      floor["milliseconds"].append(1e3 * seconds)

  weights = call_weights(config, decoder.view)
  runs = [functools.partial(run_engine, name) for name in engines]
  for call in record["calls"]:
    runs.append(functools.partial(run_call, call, wrong, "milliseconds"))
    if 1 < call["width"] <= BLOCK_SIZE:
      runs.append(functools.partial(run_call, call, None, "blockwise_milliseconds"))
  runs.append(functools.partial(run_floor, "weights", weights))
  runs.append(functools.partial(run_floor, "all", weights + jax.tree.leaves(context.cross)))
  # The first round compiles and warms up. Later ones go back and forth, so that
  # no engine always runs after the same other.
  for repeat in range(options.repeats + 1):
    for one in runs if repeat % 2 else runs[::-1]:
      one(keep=repeat > 0)
  add_heads(record["calls"])
  return record


def add_heads(calls: list[dict[str, Any]]) -> None:
  """Fills in blockwise calls that aren't measured as such.

  One node has no draft to read heads for. A tree of more nodes than heads is
  drafted by the same heads as one of `BLOCK_SIZE` nodes, for the same price.
  """
  by_width = {call["width"]: call for call in calls}
  full = by_width[BLOCK_SIZE]
  price = np.subtract(full["blockwise_milliseconds"], full["milliseconds"])
  by_width[1]["blockwise_milliseconds"] = list(by_width[1]["milliseconds"])
  for width, call in by_width.items():
    if width > BLOCK_SIZE:
      call["blockwise_milliseconds"] = np.add(call["milliseconds"], price).tolist()


def call_weights(config: ModelConfig, view: Any) -> list[jax.Array]:
  """The parameters that a greedy call reads whole: the decoder's and the output's.

  Cross-attention's keys and values are made once a prompt, and of the embedding
  a call reads one row a token.
  """
  once = ("key", "value")
  leaves = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(view["decoder"])
      if not ("encoder_decoder_attention" in (names := [entry.key for entry in path])
              and names[-1] in once)
  ]
  return [*leaves, view["embedding" if config.is_tied else "logits_kernel"]]


@jax.jit
def _read(leaves: list[jax.Array]) -> list[jax.Array]:
  return [leaf.sum() for leaf in leaves]


def read_seconds(leaves: list[jax.Array], times: int = 10) -> float:
  """Seconds to read arrays once, by summing each; the median of some."""
  seconds = []
  for _ in range(times):
    began = time.perf_counter()
    jax.block_until_ready(_read(leaves))
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds)


def summarise(record: dict[str, Any]) -> dict[str, Any]:
  """What the tables print, from the raw figures of one batch size.

  Returns:
    batch_size, then
      engines: name -> tokens_per_second, over_greedy and over_transformers
        (how many times as fast, None without transformers), block_efficiency
        and identical_rows (a share).
      calls: for each width milliseconds, blockwise_milliseconds, and
        break_even, the block efficiency from which blockwise decoding at this
        width is faster than greedy: its call over greedy's.
      floor: of a greedy call, times the time to read `weights` and `all`.
    All but batch_size, width, block_efficiency and identical_rows are `Spread`s.
  """
  engines, calls, floor = record["engines"], record["calls"], record["floor"]
  batch_size = record["batch_size"]
  greedy = next(call["milliseconds"] for call in calls if call["width"] == 1)
  peer = engines.get("transformers")
  return {
      "batch_size": batch_size,
      "engines": {
          name: {
              "tokens_per_second": Spread.of(
                  [engine["num_tokens"] / seconds for seconds in engine["seconds"]]
              ),
              "over_greedy": Spread.ratio(engines["greedy"]["seconds"], engine["seconds"]),
              "over_transformers":
                  Spread.ratio(peer["seconds"], engine["seconds"]) if peer else None,
              # Rows that wait for the slowest one count their idle calls here.
              "block_efficiency":
                  engine["num_tokens"] / batch_size / engine["num_calls"]
                  if engine["num_calls"] else None,
              "identical_rows": 1 - len(engine["differences"]) / batch_size,
          }
          for name, engine in engines.items()
      },
      "calls": [
          {
              "width": call["width"],
              "milliseconds": Spread.of(call["milliseconds"]),
              "blockwise_milliseconds": Spread.of(call["blockwise_milliseconds"]),
              "break_even": Spread.ratio(call["blockwise_milliseconds"], greedy),
          }
          for call in calls
      ],
      "floor": {
          name: Spread.ratio(greedy, read["milliseconds"]) for name, read in floor.items()
      },
  }


def print_report(console: Console, record: dict[str, Any], options: Options) -> None:
  """The tables of one batch size."""
  summary = summarise(record)
  batch_size = record["batch_size"]
  table = Table(
      title=f"batch {batch_size}: {options.input_length} tokens in, {options.output_length} out; "
      f"median (least–largest) of {options.repeats}"
  )
  for column in ("engine", "tokens/s", "× greedy", "× transformers", "block eff.", "same rows"):
    table.add_column(column, justify="left" if column == "engine" else "right")
  for name, engine in summary["engines"].items():
    peer, efficiency = engine["over_transformers"], engine["block_efficiency"]
    table.add_row(
        name, engine["tokens_per_second"].text(1), engine["over_greedy"].text(2),
        peer.text(2) if peer else "–", f"{efficiency:.2f}" if efficiency else "–",
        f"{engine['identical_rows']:.1%}",
    )
  console.print(table)
  for name, engine in record["engines"].items():
    if engine["differences"]:
      places = ", ".join(f"row {row} from token {place}" for row, place in engine["differences"])
      console.print(f"{name} differs from greedy in {places}")
  table = Table(title=f"batch {batch_size}: decoder calls, ms")
  for column in ("nodes", "call", "heads", "call with heads", "break-even block eff."):
    table.add_column(column, justify="right")
  for call, raw in zip(summary["calls"], record["calls"]):
    table.add_row(
        str(call["width"]), call["milliseconds"].text(2), str(raw["num_heads"]),
        call["blockwise_milliseconds"].text(2), call["break_even"].text(2),
    )
  console.print(table)
  for name, what in (("weights", "the weights"), ("all", "weights, encoder's keys and values")):
    floor = record["floor"][name]
    console.print(
        f"reading {what} once: {floor['bytes'] / 1e6:.1f} MB in "
        f"{Spread.of(floor['milliseconds']).text(2)} ms; "
        f"a greedy call takes {summary['floor'][name].text(2)} times as long"
    )
