"""Measures decoding methods on one model: calls, exactness and time per task.

Greedy is always among the methods and what the others are compared with. All
decode the same rows in the same batches; timed repeats alternate between them
after one untimed pass that compiles.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import sys
from typing import Any

import numpy as np
from rich.progress import Progress

from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Drafter
from bpd_jax.errors import InputError
from bpd_jax.evaluation.bootstrap import ratio_interval
from bpd_jax.evaluation.exactness import check_differences, Difference, find_differences
from bpd_jax.evaluation.quality import is_looping
from bpd_jax.evaluation.scoring import (
    describe_source,
    is_oracle,
    load_scoring,
    Source,
    source_identity,
)
from bpd_jax.folders import contents_fingerprint
from bpd_jax.generation import Generation, Generator


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to decode.

  Attributes:
    name: in results; one of its own among the methods.
    method: of `Generator.generate`, or a drafter; "reference" drafts greedy's own output,
      the ceiling of every drafter.
    block_size: h; the model's by default.
    verify_width: tokens a call verifies along a path; the block size by default.
    top_k: candidates that each head offers.
    search: "chain", "p_best", "beam", "batched" or "best_first"; see
      `bpd_jax.decoding.search.SearchSettings`, also for what follows.
    num_paths: p of a search for paths.
    num_nodes: nodes a call.
    beam_width: prefixes that a beam keeps.
    scorers: what re-scores the lattice before it is searched.
  """

  name: str
  method: str | Drafter = "blockwise"
  block_size: int | None = None
  verify_width: int | None = None
  top_k: int = 1
  search: str = "chain"
  num_paths: int = 1
  num_nodes: int | None = None
  beam_width: int = 64
  scorers: tuple[Source, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "scorers", tuple(self.scorers))

  @property
  def options(self) -> dict[str, Any]:
    """Of `Generator.settings`, `Generator.generate` and `replay`, but for the scorers."""
    return {
        "method": self.method, "block_size": self.block_size,
        "verify_width": self.verify_width, "top_k": self.top_k,
        "search": SearchSettings(
            self.search, self.num_paths, self.num_nodes, self.beam_width
        ),
    }

  @property
  def wants_references(self) -> bool:
    """Whether it reads greedy's output."""
    return self.method == "reference" or is_oracle(self.scorers)


def method_identity(method: Method) -> dict[str, Any]:
  """All that a method's results depend on: its fields, the contents of its scorers' files,
  and of the module of a drafter of one's own."""
  fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
  if not isinstance(method.method, str):
    module = sys.modules[type(method.method).__module__]
    # A drafter that was typed into an interpreter has no file.
    source = getattr(module, "__file__", None)
    kind = type(method.method)
    # The default says where in memory an object lies, which is another place every time.
    has_own = kind.__repr__ is not object.__repr__
    fields["method"] = repr(method.method) if has_own else f"{kind.__module__}.{kind.__qualname__}"
    fields["module"] = None if source is None else contents_fingerprint(source)
  return fields | {"scorers": [source_identity(source) for source in method.scorers]}


GREEDY = Method("greedy", "greedy")


@dataclasses.dataclass(frozen=True)
class Measurement:
  """What a method did on a task's rows.

  Attributes:
    results: the entry of the method in `results.json`.
    generation: the outputs of the untimed pass.
    differences: rows that aren't greedy's.
    is_exact: whether the differences are legal; see `check_differences`.
  """

  results: dict[str, Any]
  generation: Generation
  differences: list[Difference]
  is_exact: bool


def measure_methods(
    generator: Generator,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    methods: Sequence[Method],
    *,
    max_decode_length: int,
    batch_size: int,
    repeats: int = 3,
    progress: Progress | None = None,
    label: str = "",
    scoring: Mapping[str, Sequence[Scoring]] | None = None,
) -> dict[str, Measurement]:
  """Decodes the prompts with every method.

  Args:
    generator: the model.
    prompts: texts, or token ids.
    methods: besides greedy, which is put first where it isn't among them.
    max_decode_length: most tokens of an output.
    batch_size: rows decoded together.
    repeats: timed passes of each method.
    progress: gets one task, of methods times passes.
    label: of that task.
    scoring: of methods by name, with tuned weights; as their scorers say by default.

  Returns:
    A measurement a method, by its name, greedy's first.

  Raises:
    InputError: for two methods of one name, or a setting that the model lacks,
      before anything is decoded.
  """
  methods = [GREEDY, *(method for method in methods if method != GREEDY)]
  names = [method.name for method in methods]
  for name in names:
    if names.count(name) > 1:
      raise InputError("methods", names, "names that differ")
  if repeats < 1:
    raise InputError("repeats", repeats, "a positive integer")
  given = scoring or {}
  scoring = {
      method.name: given[method.name] if method.name in given
      else load_scoring(method.scorers, generator, max_decode_length)
      for method in methods
  }
  settings = {
      method.name: generator.settings(
          max_length=max_decode_length, scoring=scoring[method.name], **method.options
      )
      for method in methods
  }
  generator.partitioning.check_batch(batch_size)
  rows = generator.encode_prompts(prompts)
  bar = None
  if progress is not None:
    bar = progress.add_task(label, total=len(methods) * (1 + repeats))

  def decode(method: Method, greedy: Generation | None) -> Generation:
    generation = generator.generate(
        rows, references=greedy.tokens if method.wants_references else None,
        max_length=max_decode_length, batch_size=batch_size, scoring=scoring[method.name],
        **method.options,
    )
    if progress is not None:
      progress.advance(bar)
    return generation

  first: dict[str, Generation] = {}
  for method in methods:
    first[method.name] = decode(method, first.get(GREEDY.name))
  seconds = {name: [] for name in names}
  for _ in range(repeats):
    for method in methods:
      timed = decode(method, first[GREEDY.name])
      seconds[method.name].append(sum(timed.seconds))
  base = np.array(seconds[GREEDY.name])
  measured = {}
  for method in methods:
    generation = first[method.name]
    differences = find_differences(
        generator.config, generator.params, rows, first[GREEDY.name].tokens, generation.tokens
    )
    results = describe_generation(generation)
    elapsed = np.array(seconds[method.name])
    measured[method.name] = Measurement(
        results={
            "block_size": settings[method.name].block_size,
            "verify_width": settings[method.name].verify_width,
            "nodes": settings[method.name].num_nodes,
            **describe_method(method, scoring[method.name]),
            **results,
            "identical_to_greedy": 1 - len(differences) / len(rows),
            "near_tie_rows": sum(difference.is_near_tie for difference in differences),
            "seconds": float(np.median(elapsed)),
            "seconds_range": [float(elapsed.min()), float(elapsed.max())],
            "tokens_per_second": results["tokens"] / float(np.median(elapsed)),
            "speedup_over_greedy": float(np.median(base / elapsed)),
            "speedup_range": [float((base / elapsed).min()), float((base / elapsed).max())],
        },
        generation=generation,
        differences=differences,
        is_exact=check_differences(differences, len(rows)),
    )
  return measured


def describe_method(method: Method, scoring: Sequence[Scoring]) -> dict[str, Any]:
  """How the lattice is scored and searched; nothing where it is one draft as it is."""
  if method.top_k == 1 and not method.scorers:
    return {}
  return {
      "top_k": method.top_k,
      "search": method.search,
      "num_paths": method.num_paths,
      "scorers": [
          {**describe_source(source), "weight": part.weight, "entropy_power": part.entropy_power}
          for source, part in zip(method.scorers, scoring)
      ],
  }


def describe_generation(generation: Generation) -> dict[str, Any]:
  """Counts of a generation: tokens, calls, block efficiency, accepted lengths."""
  tokens = np.array([len(row) for row in generation.tokens])
  calls = np.array(generation.calls)
  is_free = np.array([not is_looping(row.tolist()) for row in generation.tokens])
  accepted = [call.num_accepted for trace in generation.traces for call in trace]
  return {
      "tokens": int(tokens.sum()),
      "decoder_calls": int(calls.sum()),
      "block_efficiency": generation.block_efficiency,
      "block_efficiency_interval": ratio_interval(tokens, calls),
      "block_efficiency_loop_free": (
          float(tokens[is_free].sum() / calls[is_free].sum()) if is_free.any() else None
      ),
      "accepted_length_histogram": np.bincount(accepted).tolist(),
      "proved_searches": float(
          np.mean([call.is_exact for trace in generation.traces for call in trace])
      ),
  }
