"""What is measured of a model while it trains: loss by head, and what it decodes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from bpd_jax.data.batches import cut_inputs, Dataset, in_order
from bpd_jax.data.datasets import CachedTask, task_label, TextTask
from bpd_jax.decoding.types import Drafting
from bpd_jax.errors import check_count
from bpd_jax.evaluation.quality import is_looping
from bpd_jax.generation import Generator, INPUT_BUCKETS, naming_prompts
from bpd_jax.training.loss import head_losses
from bpd_jax.training.step import place_batch, Step


@dataclasses.dataclass(frozen=True)
class Validation:
  """What an evaluation during training looks at.

  Attributes:
    tasks: whose first examples to read.
    max_examples: teacher-forced, of each task, for loss and accuracy by head.
    num_decoded: decoded, of each task, for block efficiency, exact match and loops.
  """

  tasks: Sequence[CachedTask | TextTask]
  max_examples: int = 200
  num_decoded: int = 32

  def __post_init__(self):
    check_count("Validation.max_examples", self.max_examples)
    check_count("Validation.num_decoded", self.num_decoded, 0)


DECODED = ("block_efficiency", "exact_match", "looping_rows")


def metric_names(validation: Validation, block_size: int) -> list[str]:
  """What an evaluation measures, by the names that metrics have."""
  heads = [f"{name}_head_{i}" for i in range(1, block_size + 1) for name in ("loss", "accuracy")]
  names = ["loss", *heads, *(DECODED if validation.num_decoded else ())]
  groups = ["validation", *map(task_label, validation.tasks)]
  return [f"{group}/{name}" for group in groups for name in names]


class Evaluation:
  """Figures of a model on validation tasks; to be called with parameters and a step."""

  def __init__(
      self, step: Step, datasets: Sequence[Dataset], validation: Validation, batch_size: int,
      lengths: Mapping[str, int],
      decoder: Callable[[Any], tuple[Generator, str | Drafting]], base: Any = None,
  ):
    """Opens nothing, compiles nothing.

    Args:
      step: measures the parameters.
      datasets: of the validation's tasks.
      validation: what is looked at.
      batch_size: rows together.
      lengths: `input_length` and `target_length`.
      decoder: from what is trained to what decodes, and how.
      base: parameters of a frozen base.
    """
    self._step = step
    self._datasets = datasets
    self._validation = validation
    self._batch_size = batch_size
    self._lengths = lengths
    self._decoder = decoder
    self._base = base

  def __call__(self, params: Any, step: int) -> dict[str, float]:
    """TASK/loss_head_i, accuracy_head_i, and of decoded rows block_efficiency, exact_match
    and looping_rows; and `validation/` the mean of each over the tasks.

    Raises:
      NotFinite: naming task and example, where NaN or infinity would choose a token.
    """
    del step
    # One for all tasks, as it makes its own view of the parameters.
    decoder = self._decoder(params)
    tasks = {
        dataset.name: self._measure(params, decoder, dataset) for dataset in self._datasets
    }
    names = set.intersection(*map(set, tasks.values()))
    figures = {
        f"validation/{name}": float(np.mean([task[name] for task in tasks.values()]))
        for name in sorted(names)
    }
    for task, values in tasks.items():
      figures |= {f"{task}/{name}": value for name, value in values.items()}
    return figures

  def _measure(
      self, params: Any, decoder: tuple[Generator, str | Drafting], dataset: Dataset
  ) -> dict[str, float]:
    place = functools.partial(place_batch, self._step.partitioning)
    sums = add_up(
        jax.device_get(self._step.measure(params, place(batch), self._base))
        for batch in in_order(
            dataset, self._batch_size, max_examples=self._validation.max_examples,
            **self._step.config.special_ids, **self._lengths,
        )
    )
    figures = head_losses(sums)
    figures["loss"] = sum(
        value for name, value in figures.items() if name.startswith("loss_head_")
    )
    count = min(self._validation.num_decoded, len(dataset.lengths))
    if count:
      figures |= self._decode(*decoder, dataset, count)
    return figures

  def _decode(
      self, generator: Generator, method: str | Drafting, dataset: Dataset, count: int
  ) -> dict[str, float]:
    config, most = generator.config, self._lengths["input_length"]
    inputs, targets = zip(*(dataset[i] for i in range(count)))
    with naming_prompts([f"{dataset.name} example {i}" for i in range(count)]):
      out = generator.generate(
          [cut_inputs(row, most, config.eos_id).tolist() for row in inputs],
          method, max_length=self._lengths["target_length"], batch_size=self._batch_size,
          buckets=(*INPUT_BUCKETS, most),
      )
    same = [np.array_equal(row, target) for row, target in zip(out.tokens, targets)]
    looping = [is_looping(row.tolist()) for row in out.tokens]
    return dict(zip(DECODED, (
        out.block_efficiency, float(np.mean(same)), float(np.mean(looping)),
    )))


def add_up(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """Sums of like entries."""
  total: dict[str, Any] = {}
  for part in parts:
    for name, value in part.items():
      total[name] = total.get(name, 0) + value
  return total
