"""From a registered SeqIO task to a token cache.

`write_task` runs a split once and writes it with what was asked for, so that
`check_same` can tell whether a folder is what another call would make. Importing
this module imports TensorFlow.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import itertools
from pathlib import Path
import shutil

import seqio

from bpd_jax.data.batches import cut_inputs
from bpd_jax.data.token_cache import TokenCache, write_cache
from bpd_jax.errors import InputError
from bpd_jax.folders import read_object, write_object
from bpd_jax.vocabulary import Vocabulary

REQUEST_FILE = "prepare.json"

Pair = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Request:
  """What a cache is to hold.

  Attributes:
    task: a registered name.
    split: of the task.
    data: what the task reads, with its version.
    vocabulary: fingerprint.
    max_input_length: tokens, EOS included; longer inputs are cut.
    max_target_length: tokens, EOS included; examples with longer targets are left out.
    copies: passes over the data; where a task adds noise, each has its own.
    seed: of the noise, and of the choice where not all are wanted.
    max_examples: how many, drawn at random from those that fit; all of them, in
      their order, if None.
  """

  task: str
  split: str
  data: str
  vocabulary: str
  max_input_length: int
  max_target_length: int
  copies: int = 1
  seed: int = 0
  max_examples: int | None = None


@dataclasses.dataclass
class TooLong:
  """Examples that didn't fit: with inputs that were cut, and left out for their targets.

  Only those that were read are counted.
  """

  cut: int = 0
  left_out: int = 0


def write_task(
    folder: Path,
    request: Request,
    vocabulary: Vocabulary,
    track: Callable[[Iterable[Pair]], Iterable[Pair]] = lambda examples: examples,
) -> tuple[TokenCache, TooLong]:
  """Writes a task's split into a folder that doesn't exist yet.

  Args:
    folder: of the cache.
    request: what to write.
    vocabulary: the one that the tasks are registered with.
    track: wraps the examples, to show progress; the corpus has been read by then.

  Returns:
    The cache, open, and what was too long for it.

  Raises:
    InputError: where the data can't be read or the folder can't be written.
  """
  lengths = request.max_input_length, request.max_target_length
  too_long = TooLong()
  examples = task_examples(
      request.task, request.split, lengths, copies=request.copies, seed=request.seed,
      is_shuffled=request.max_examples is not None,
  )
  fitting = itertools.islice(fit(examples, lengths, too_long), request.max_examples)
  written = write_cache(
      folder, track(fitting), task=request.task, split=request.split, vocabulary=vocabulary
  )
  try:
    write_object(folder / REQUEST_FILE, dataclasses.asdict(request))
  except OSError as error:
    # Without that file the folder would be in the way of the next attempt.
    shutil.rmtree(folder, ignore_errors=True)
    raise InputError(
        "folder", str(folder), f"a path that can be written ({error.strerror})"
    ) from error
  return written, too_long


def check_same(folder: Path, request: Request, vocabulary: Vocabulary) -> None:
  """InputError where a folder isn't the whole cache that is asked for."""
  # The same pieces may end otherwise, as a model says.
  found = TokenCache(folder).eos_id
  if found != vocabulary.eos_id:
    raise InputError(f"{folder} eos_id", vocabulary.eos_id, f"{found}, of the cache that is there")
  path = folder / REQUEST_FILE
  found = read_object(path) if path.exists() else {}
  for name, value in dataclasses.asdict(request).items():
    if found.get(name) != value:
      raise InputError(
          f"{folder} {name}", found.get(name),
          f"{value!r}, as asked for; remove the folder, or write to another one",
      )


def task_examples(
    task: str, split: str, lengths: tuple[int, int], *, copies: int = 1, seed: int = 0,
    is_shuffled: bool = False,
) -> Iterator[Pair]:
  """A registered task's ids, with EOS.

  Args:
    task: its name.
    split: one that it has.
    lengths: most tokens of inputs and of targets, for objectives that cut texts
      into chunks; nothing else is cut here.
    copies: passes over the data.
    seed: of the noise, and of the order if shuffled.
    is_shuffled: whether the order is a random one.
  """
  dataset = seqio.TaskRegistry.get(task).get_dataset(
      dict(zip(("inputs", "targets"), lengths)), split, shuffle=is_shuffled, seed=seed,
      num_epochs=copies, trim_output_features=False,
  )
  return (
      (example["inputs"].tolist(), example["targets"].tolist())
      for example in dataset.as_numpy_iterator()
  )


def fit(
    examples: Iterable[Pair], lengths: tuple[int, int], too_long: TooLong
) -> Iterator[Pair]:
  """Cuts long inputs before their EOS and leaves out examples with long targets.

  An article's beginning is an article; half a summary isn't a summary.

  Args:
    examples: ids with EOS.
    lengths: most tokens of inputs and of targets.
    too_long: is added to.
  """
  for inputs, targets in examples:
    if len(targets) > lengths[1]:
      too_long.left_out += 1
      continue
    if len(inputs) > lengths[0]:
      too_long.cut += 1
      inputs = cut_inputs(inputs, lengths[0], inputs[-1])
    yield inputs, targets
