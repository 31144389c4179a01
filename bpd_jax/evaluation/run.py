"""Measures decoding methods on one model: calls, exactness and time per task.

Greedy is always among the methods and what the others are compared with. All
decode the same rows in the same batches; timed repeats alternate between them
after one untimed pass that compiles.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np
from rich.progress import Progress

from bpd_jax.errors import InputError
from bpd_jax.evaluation.bootstrap import ratio_interval
from bpd_jax.evaluation.exactness import check_differences, Difference, find_differences
from bpd_jax.evaluation.quality import is_looping
from bpd_jax.generation import Generation, Generator


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to decode.

  Attributes:
    name: in results; one of its own among the methods.
    method: of `Generator.generate`; "reference" drafts greedy's own output,
      the ceiling of every drafter.
    block_size: h; the model's by default.
    verify_width: nodes a call; the block size by default.
  """

  name: str
  method: str = "blockwise"
  block_size: int | None = None
  verify_width: int | None = None


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
  settings = {
      method.name: generator.settings(
          method.method, method.block_size, method.verify_width, max_decode_length
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
        rows, method.method, block_size=method.block_size, verify_width=method.verify_width,
        references=greedy.tokens if method.method == "reference" else None,
        max_length=max_decode_length, batch_size=batch_size,
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
            "nodes": settings[method.name].verify_width,
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
  }
