"""A task's token ids on disk, each example found by its number.

A folder holds `tokens.bin`, all ids one after the other, `ends.npy`, where the
inputs and the targets of each example end in it, and `cache.json`, what they
are. `write_cache` makes one whole or not at all; `TokenCache` maps it into
memory, so that opening costs nothing and processes share the pages. Raw numbers
behind a memory map, because a row is then found and read without a library that
the training process wouldn't need otherwise.
"""

from collections.abc import Iterable, Sequence
import hashlib

import numpy as np

from bpd_jax.errors import InputError
from bpd_jax.folders import local_path, new_folder, PathLike, read_object, write_object
from bpd_jax.vocabulary import Vocabulary

INFO_FILE = "cache.json"
TOKENS_FILE = "tokens.bin"
ENDS_FILE = "ends.npy"
# Ids that are gathered before they are written.
CHUNK = 1 << 20


class TokenCache:
  """A folder from `write_cache`, open for reading.

  Attributes:
    name: "TASK.SPLIT", or what the writer called it.
    vocabulary: fingerprint of the vocabulary whose ids these are.
    vocab_size: ids that may occur.
    eos_id: ends each side.
    fingerprint: a hash of all examples in order.
    lengths: [examples, 2] int64, tokens of inputs and targets, EOS included.
  """

  def __init__(self, folder: PathLike):
    """Opens; InputError where the folder isn't a whole cache."""
    folder = local_path(folder, "token cache")
    if not folder.is_dir():
      raise InputError("token cache", str(folder), "a folder from python -m bpd_jax.prepare")
    info = read_object(folder / INFO_FILE)
    try:
      self.name: str = f"{info['task']}.{info['split']}"
      self.vocabulary: str = info["vocabulary"]
      self.vocab_size: int = info["vocab_size"]
      # Caches without the field were made when there was no other.
      self.eos_id: int = info.get("eos_id", 1)
      self.fingerprint: str = info["fingerprint"]
      self._tokens = np.memmap(folder / TOKENS_FILE, np.dtype(info["dtype"]), "r")
      self._ends = np.load(folder / ENDS_FILE, mmap_mode="r")
    except (KeyError, OSError, TypeError, ValueError) as error:
      raise InputError("token cache", str(folder), f"one that is whole ({error})") from error
    ends = self._ends
    if ends.shape != (info["num_examples"], 2) or ends[-1, 1] != len(self._tokens):
      raise InputError(
          "token cache", str(folder), f"{info['num_examples']} examples, from its {INFO_FILE}"
      )
    starts = np.concatenate([[0], ends[:-1, 1]])
    self.lengths = np.stack([ends[:, 0] - starts, ends[:, 1] - ends[:, 0]], axis=1)

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of an example, int32, EOS included."""
    middle, end = self._ends[i]
    start = middle - self.lengths[i, 0]
    return (
        self._tokens[start:middle].astype(np.int32), self._tokens[middle:end].astype(np.int32)
    )


def write_cache(
    folder: PathLike,
    examples: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    task: str,
    split: str,
    vocabulary: Vocabulary,
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> TokenCache:
  """Writes examples in their order.

  Args:
    folder: a path that doesn't exist yet.
    examples: pairs of ids, inputs and targets, with EOS where they should have it.
    task: whose examples these are.
    split: of the task.
    vocabulary: whose ids these are.
    vocab_size: ids that may occur; the vocabulary's by default. A model may write
      some that it has beyond.
    eos_id: what examples end with, to be written down; the vocabulary's by default.

  Returns:
    The cache, open.

  Raises:
    InputError: where the folder exists or can't be written, an id isn't the
      vocabulary's, or there are no examples.
  """
  vocab_size = vocab_size or vocabulary.size
  dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
  digest, ends, end = hashlib.sha256(), [], 0
  with new_folder(folder) as partial:
    try:
      with open(partial / TOKENS_FILE, "wb") as file:
        chunk: list[int] = []

        def flush():
          if chunk and not 0 <= min(chunk) <= max(chunk) < vocab_size:
            raise InputError(
                f"{task}.{split} token", f"{min(chunk)} … {max(chunk)}",
                f"0 … {vocab_size - 1}, the vocabulary's ids",
            )
          data = np.asarray(chunk, dtype).tobytes()
          digest.update(data)
          file.write(data)
          chunk.clear()

        for inputs, targets in examples:
          chunk += [*inputs, *targets]
          ends.append((end + len(inputs), end + len(inputs) + len(targets)))
          end = ends[-1][1]
          if len(chunk) > CHUNK:
            flush()
        flush()
      if not ends:
        raise InputError(f"{task}.{split}", "no examples", "at least one")
      array = np.asarray(ends, np.int64)
      np.save(partial / ENDS_FILE, array)
      digest.update(array.tobytes())
      write_object(partial / INFO_FILE, {
          "task": task,
          "split": split,
          "num_examples": len(ends),
          "num_tokens": end,
          "dtype": dtype.name,
          "vocabulary": vocabulary.fingerprint,
          "vocab_size": vocab_size,
          "eos_id": vocabulary.eos_id if eos_id is None else eos_id,
          "fingerprint": digest.hexdigest()[:16],
      })
    except OSError as error:
      raise InputError(
          "folder", str(folder), f"a path that can be written ({error.strerror})"
      ) from error
  return TokenCache(folder)
