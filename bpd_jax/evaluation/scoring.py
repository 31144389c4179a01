"""Scorers by name and file: what a method's entry in a gin file becomes.

Each source says what to load and how much it counts; `load_scoring` makes it ready
for one model. A weight that is to be tuned is given as a start.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.scorers.cache_ngram import CacheNgramScorer
from bpd_jax.decoding.scorers.ngram import ngram_params, NgramParams, NgramScorer
from bpd_jax.decoding.scorers.no_repeat import NoRepeatScorer
from bpd_jax.decoding.scorers.reference import ReferenceScorer
from bpd_jax.errors import InputError
from bpd_jax.folders import contents_fingerprint
from bpd_jax.generation import Generator, load
from bpd_jax.ngram_lm.arpa import info_path, read_arpa
from bpd_jax.partitioning import Partitioning

Weight = float | tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class NgramSource:
  """Back-off n-grams of an ARPA file.

  Attributes:
    arpa: the file, plain or .gz; its words are the vocabulary's ids.
    order: n to use, at most the file's, which is the default.
    weight: see `bpd_jax.decoding.rescoring.Scoring`.
    entropy_power: likewise.
  """

  arpa: str
  order: int | None = None
  weight: Weight = 1.0
  entropy_power: float = 0.0

  def make(self, generator: Generator) -> Scoring:
    config = generator.config
    params = _read_ngrams(
        self.arpa, config.vocab_size, generator.vocabulary_fingerprint, config.start_id,
        config.eos_id,
    )
    most = params.arrays.order
    order = most if self.order is None else self.order
    if not 1 <= order <= most:
      raise InputError("NgramSource.order", order, f"1 … {most}, that of {self.arpa}")
    scorer = NgramScorer(order, config.start_id)
    return Scoring(scorer, params, self.weight, self.entropy_power)


@dataclasses.dataclass(frozen=True)
class NeuralSource:
  """A small model of the same vocabulary.

  Attributes:
    checkpoint: its model folder.
    sees_input: whether its encoder reads the inputs.
    weight: see `bpd_jax.decoding.rescoring.Scoring`.
    entropy_power: likewise.
  """

  checkpoint: str
  sees_input: bool = True
  weight: Weight = 1.0
  entropy_power: float = 0.0

  def make(self, generator: Generator) -> Scoring:
    small = _load_model(
        self.checkpoint, generator.config.dtype, generator.partitioning.replicated()
    )
    found = (small.config.vocab_size, small.vocabulary_fingerprint)
    wanted = (generator.config.vocab_size, generator.vocabulary_fingerprint)
    if found != wanted:
      raise InputError(
          "NeuralSource.checkpoint", f"{self.checkpoint} of vocabulary {found}",
          f"one of the model's vocabulary, {wanted}",
      )
    return small.scoring(
        self.weight, sees_input=self.sees_input, entropy_power=self.entropy_power
    )


@dataclasses.dataclass(frozen=True)
class CacheSource:
  """n-grams of the row's own input and output.

  Attributes:
    order: n.
    smoothing: see `CacheNgramScorer`.
    sees_input: whether the input is counted too.
    weight: see `bpd_jax.decoding.rescoring.Scoring`.
    entropy_power: likewise.
  """

  order: int = 3
  smoothing: float = 0.5
  sees_input: bool = True
  weight: Weight = 1.0
  entropy_power: float = 0.0

  def make(self, generator: Generator) -> Scoring:
    scorer = CacheNgramScorer(
        generator.config.vocab_size, self.order, self.smoothing, self.sees_input
    )
    return Scoring(scorer, (), self.weight, self.entropy_power)


@dataclasses.dataclass(frozen=True)
class NoRepeatSource:
  """The rule that a token doesn't follow itself.

  Attributes:
    weight: nats that a repeat costs.
  """

  weight: Weight = 100.0

  def make(self, generator: Generator) -> Scoring:
    return Scoring(NoRepeatScorer(), (), self.weight)


@dataclasses.dataclass(frozen=True)
class OracleSource:
  """Knows greedy's output: what the best re-scoring of a lattice could do in a call."""

  def make(self, generator: Generator) -> Scoring:
    return Scoring(ReferenceScorer(), (), 1.0)


Source = NgramSource | NeuralSource | CacheSource | NoRepeatSource | OracleSource


def source_identity(source: Source) -> dict[str, Any]:
  """`describe_source` with the contents of files in place of their paths."""
  fields = describe_source(source)
  if isinstance(source, NeuralSource):
    fields["checkpoint"] = contents_fingerprint(
        source.checkpoint, "NeuralSource.checkpoint"
    )
  if isinstance(source, NgramSource):
    about = info_path(source.arpa)
    fields["arpa"] = contents_fingerprint(source.arpa, "NgramSource.arpa")
    fields["arpa_json"] = contents_fingerprint(about) if about.is_file() else None
  return fields


def load_scoring(
    sources: Sequence[Source], generator: Generator
) -> tuple[Scoring, ...]:
  """Loads every source for a model.

  Args:
    sources: what to load.
    generator: the model whose drafts are scored.

  Raises:
    InputError: for a file that can't be read or is of another vocabulary.
  """
  return tuple(source.make(generator) for source in sources)


def is_oracle(sources: Sequence[Source]) -> bool:
  """Whether any of them reads greedy's output."""
  return any(isinstance(source, OracleSource) for source in sources)


def describe_source(source: Source) -> dict[str, Any]:
  """Kind and fields, for `results.json`."""
  return {"scorer": type(source).__name__.removesuffix("Source"), **dataclasses.asdict(source)}


@functools.lru_cache(maxsize=8)
def _read_ngrams(
    arpa: str, vocab_size: int, vocabulary: str | None, start_id: int, eos_id: int
) -> NgramParams:
  model = read_arpa(arpa, vocab_size, vocabulary=vocabulary)
  for name, found, wanted in (
      ("start_id", model.start_id, start_id), ("eos_id", model.eos_id, eos_id)
  ):
    if found != wanted:
      raise InputError(f"{arpa} {name}", found, f"{wanted}, the model's")
  return ngram_params(model)


@functools.lru_cache(maxsize=4)
def _load_model(folder: str, dtype: str, partitioning: Partitioning) -> Generator:
  return load(folder, dtype=dtype, partitioning=partitioning)
