"""Measures decoding methods on one model: calls, exactness and time per task.

Greedy is always among the methods and what the others are compared with. All
decode the same rows in the same batches; timed repeats alternate between them
after one untimed pass that compiles.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
from rich.progress import Progress

from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Drafter
from bpd_jax.errors import InputError
from bpd_jax.evaluation.bootstrap import ratio_interval
from bpd_jax.evaluation.drafting import (
  describe_draft,
  Draft,
  draft_identity,
  DraftSource,
)
from bpd_jax.evaluation.exactness import check_differences, Difference, find_differences
from bpd_jax.evaluation.policing import PolicySource
from bpd_jax.evaluation.quality import is_looping
from bpd_jax.evaluation.scoring import (
  describe_source,
  load_scoring,
  Source,
  source_identity,
)
from bpd_jax.generation import Generation, Generator


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to decode.

  Attributes:
    name: in results; one of its own among the methods.
    draft: what drafts: a source, the model's own heads by default; a drafter that learned
      nothing; "greedy" or "blockwise".
    search: "chain", "p_best", "beam", "batched" or "best_first"; see
      `bpd_jax.decoding.search.SearchSettings`, also for what follows.
    num_paths: p of a search for paths.
    num_nodes: nodes a call.
    beam_width: prefixes that a beam keeps.
    scorers: what re-scores the lattice before it is searched.
    policy: how many tokens rows draft; all that the drafter can by default.
  """

  name: str
  draft: str | Drafter | DraftSource = Draft()
  search: str = "chain"
  num_paths: int = 1
  num_nodes: int | None = None
  beam_width: int = 64
  scorers: tuple[Source, ...] = ()
  policy: PolicySource | None = None

  def __post_init__(self):
    object.__setattr__(self, "scorers", tuple(self.scorers))
    if self.policy is not None and (self.scorers or self.search != "chain"):
      # What searching and scoring cost is in no table.
      raise InputError(
          f"{self.name} policy", type(self.policy).__name__,
          "None for a method with scorers, or with another search than 'chain'",
      )

  def options(self, generator: Generator) -> dict[str, Any]:
    """Of `Generator.generate` and `replay`, but for the scorers."""
    return {
        "method": self.draft.make(generator) if hasattr(self.draft, "make") else self.draft,
        "search": SearchSettings(
            self.search, self.num_paths, self.num_nodes, self.beam_width
        ),
    }


def method_identity(method: Method) -> dict[str, Any]:
  """All that a method's results depend on, with the contents of files in place of paths."""
  fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
  return fields | {
      "draft": draft_identity(method.draft),
      "scorers": [source_identity(source) for source in method.scorers],
      "policy": None if method.policy is None else method.policy.identity(),
  }


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
      else load_scoring(method.scorers, generator)
      for method in methods
  }
  options = {
      method.name: {**method.options(generator), "scoring": scoring[method.name]}
      for method in methods
  }
  settings = {name: generator.settings(**own) for name, own in options.items()}
  generator.partitioning.check_batch(batch_size)
  rows = generator.encode_prompts(prompts)
  decisions = {
      method.name: method.policy.make(
          generator, generator.drafting(options[method.name]["method"]), rows, batch_size,
          max_decode_length,
      )
      for method in methods if method.policy is not None
  }
  for name, decision in decisions.items():
    options[name]["policing"] = decision.policing
    settings[name] = generator.settings(**options[name])
  bar = None
  if progress is not None:
    bar = progress.add_task(label, total=len(methods) * (1 + repeats))

  def decode(method: Method, greedy: Generation | None) -> Generation:
    reads_references = settings[method.name].reads_references
    generation = generator.generate(
        rows, references=greedy.tokens if reads_references else None,
        max_length=max_decode_length, batch_size=batch_size, **options[method.name],
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
            "block_size": settings[method.name].drafter.depth + 1,
            "draft": describe_draft(method.draft),
            "nodes": settings[method.name].num_nodes,
            **describe_method(method, scoring[method.name]),
            **(decisions[method.name].describe() if method.name in decisions else {}),
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
  top_k = getattr(method.draft, "top_k", getattr(method.draft, "num_candidates", 1))
  if (top_k, method.search, method.scorers) == (1, "chain", ()):
    return {}
  return {
      "top_k": top_k,
      "search": method.search,
      "num_paths": method.num_paths,
      "scorers": [
          {**describe_source(source), "weight": part.weight, "entropy_power": part.entropy_power}
          for source, part in zip(method.scorers, scoring)
      ],
  }


def describe_generation(generation: Generation) -> dict[str, Any]:
  """Counts of a generation: tokens, calls, block efficiency, accepted lengths.

  `nodes_per_call` are those that a row had verified, its root among them, on average;
  `wasted_tokens` were drafted and verified in vain.
  """
  tokens = np.array([len(row) for row in generation.tokens])
  calls = np.array(generation.calls)
  is_free = np.array([not is_looping(row.tolist()) for row in generation.tokens])
  drafted = np.array([len(call.draft) for trace in generation.traces for call in trace])
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
      "nodes_per_call": float(1 + drafted.mean()),
      "wasted_tokens": int(drafted.sum() - sum(accepted)),
      "proved_searches": float(
          np.mean([call.is_exact for trace in generation.traces for call in trace])
      ),
  }
