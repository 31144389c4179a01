"""Tasks and mixtures in SeqIO's registries: the corpus, pretraining, the paper's seven.

`register` fills the registries; nothing is read before a dataset is asked for.
Importing this module imports TensorFlow, so nothing that trains or decodes does:
`bpd_jax.prepare` writes what these tasks give into token caches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import os
from types import MappingProxyType

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from bpd_jax.data import objectives
from bpd_jax.data.extraction import Record
from bpd_jax.data.grammar import grammar
from bpd_jax.data.manifest import Environment, Manifest
from bpd_jax.data.rows import task_rows
from bpd_jax.data.seqio_vocabulary import SeqioVocabulary
from bpd_jax.data.sources import SPLITS
from bpd_jax.data.text_tasks import RECORD_TASKS
from bpd_jax.data.tfds_builder import Docstrings
from bpd_jax.errors import InputError
from bpd_jax.vocabulary import Vocabulary

GRAMMAR_ROWS = MappingProxyType({"train": 50_000, "validation": 2_000, "test": 2_000})
# A shorter rest of a text teaches little.
MIN_CHUNK = 16

PathLike = str | os.PathLike
Preprocessor = Callable[..., tf.data.Dataset]


@dataclasses.dataclass(frozen=True)
class TaskInfo:
  """What `register` says of a task.

  Attributes:
    about: input → target, in a few words.
    dataset: TFDS name of what it reads, with configuration and version; ""
      where it reads nothing.
    builder: of that dataset, None where there is none.
    is_made: whether the dataset is made from what is installed, on first use.
    is_by_hand: whether TFDS wants files that it can't fetch.
    is_noised: whether another pass over the data gives other examples.
  """

  about: str
  dataset: str = ""
  builder: Callable[[], tfds.core.DatasetBuilder] | None = None
  is_made: bool = False
  is_by_hand: bool = False
  is_noised: bool = False

  def is_here(self) -> bool:
    """Whether the data can be read at once."""
    return self.builder is None or self.builder().is_prepared()

  def data_version(self) -> str:
    """What the examples depend on beside the program."""
    return f"{self.dataset} {self.builder().manifest.fingerprint}" if self.is_made else self.dataset

  def make(self) -> None:
    """Makes the dataset where it isn't there.

    Raises:
      InputError: where what is installed isn't what the manifest names, or the
        folder can't be written.
    """
    make(self.builder())


@dataclasses.dataclass(frozen=True)
class PaperTask:
  """One of the tasks of Kim et al. 2024, §4, with its prompt.

  Attributes:
    dataset: in TFDS.
    inputs: format of the inputs over the record's features.
    targets: format of the targets.
    first: what is done to the records before.
    splits: SeqIO's names and TFDS's.
    is_by_hand: whether TFDS wants files that it can't fetch.
  """

  dataset: str
  inputs: str
  targets: str
  first: Preprocessor | None = None
  splits: Mapping[str, str] = dataclasses.field(
      default_factory=lambda: {split: split for split in SPLITS}
  )
  is_by_hand: bool = False


def first_answer(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """SQuAD's records with the first of the answers that people gave as `answer`."""
  return dataset.map(lambda record: record | {"answer": record["answers"]["text"][0]})


def last_sentence(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """LAMBADA's passages as `context` and the `sentence` that ends in the word to guess.

  Passages are in lower case, with spaces around punctuation. The few without
  an end of a sentence inside are left out.
  """
  pattern = r"^\s*(.*[.?!](?: '')?) (\S.*\S)\s*$"
  fits = lambda record: tf.strings.regex_full_match(record["passage"], pattern)
  part = lambda record, i: tf.strings.regex_replace(record["passage"], pattern, rf"\{i}")
  return dataset.filter(fits).map(
      lambda record: {"context": part(record, 1), "sentence": part(record, 2)}
  )


PAPER_TASKS: Mapping[str, PaperTask] = MappingProxyType({
    # The paper neither says how it splits a passage nor uses LAMBADA's training novels,
    # which TFDS hasn't got; what TFDS calls training are the development passages.
    "lambada": PaperTask(
        "lambada:1.0.0", "{context}", "{sentence}", last_sentence,
        {"validation": "train", "test": "test"},
    ),
    "squad": PaperTask(
        "squad/v1.1:3.0.0", "question: {question} context: {context}", "{answer}", first_answer,
        {"train": "train", "validation": "validation"},
    ),
    "cnn_dailymail": PaperTask("cnn_dailymail:3.4.0", "summarize: {article}", "{highlights}"),
    "samsum": PaperTask(
        "samsum:1.0.0", "Here is a dialogue: {dialogue}\nWrite a short summary!", "{summary}",
        is_by_hand=True,
    ),
    "multi_news": PaperTask(
        "multi_news:2.1.0", "Write a summary based on this article: {document}", "{summary}"
    ),
    "xsum": PaperTask("xsum:1.1.0", "Summarize: {document}", "{summary}", is_by_hand=True),
    "newsroom": PaperTask(
        "newsroom:1.0.0",
        "Please write a short summary for the following article: {title} {text}", "{summary}",
        is_by_hand=True,
    ),
})
ABOUT = MappingProxyType({
    "docstring_summary": "signature, body, rest of the docstring → its first sentence",
    "docstring_qa": "a question on a parameter + the docstring → its description",
    "docstring_lm": "opening of a docstring → how it goes on",
    "code_format": "a function without its layout → as written",
    "code_body": "signature and docstring → body",
    "docstring_repair": "a paragraph with typing errors → as written",
    "docstring_convert": "a docstring in one convention → in another",
    "grammar": "words → a phrase for each",
    "lambada": "passage → its last sentence",
    "squad": "question and context → the first answer",
    "cnn_dailymail": "article → highlights",
    "samsum": "dialogue → summary",
    "multi_news": "several articles → summary",
    "xsum": "article → summary in a sentence",
    "newsroom": "title and article → summary",
})
# Text to pretrain on: TFDS name, splits. Docstrings' is the code with its docstring.
CORPORA = MappingProxyType({
    "docstring_text": ("docstrings:1.1.0", SPLITS), "c4": ("c4/en:3.1.0", ("train", "validation"))
})
# Relative rates; a function computes them from the task.
_BY_SIZE = functools.partial(seqio.mixing_rate_num_examples, maximum=100_000)
MIXTURES = MappingProxyType({
    "docstring_tasks": {task: 1.0 for task in RECORD_TASKS},
    "docstring_pretraining": {
        "docstring_text_span_corruption": 1.0, "docstring_text_prefix_lm": 1.0
    },
    # LAMBADA isn't trained on.
    "paper_tasks": {task: _BY_SIZE for task in PAPER_TASKS if task != "lambada"},
})


def register(
    vocabulary: Vocabulary,
    *,
    data_dir: PathLike | None = None,
    manifest: Manifest | None = None,
    environment: Environment | None = None,
) -> dict[str, TaskInfo]:
  """Puts tasks and mixtures into SeqIO's registries, in place of those of the same names.

  Args:
    vocabulary: of inputs and targets.
    data_dir: TFDS's folder; its own default if None.
    manifest: of the corpus; the package's own by default.
    environment: where the corpus is read from; the running one by default.

  Returns:
    The tasks in their order.
  """
  feature = seqio.Feature(vocabulary=SeqioVocabulary(vocabulary), add_eos=True)
  tokenize = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
  encode = (tokenize, seqio.preprocessors.append_eos)
  span_length = functools.partial(
      objectives.span_corruption_length, num_sentinels=len(vocabulary.sentinels)
  )
  tasks = {}

  def add(name: str, source: seqio.DataSource, steps: Sequence[Preprocessor], info: TaskInfo):
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name, source=source, preprocessors=steps,
        output_features={"inputs": feature, "targets": feature},
    )
    tasks[name] = info

  def tfds_builder(dataset: str) -> tfds.core.DatasetBuilder:
    return tfds.builder(dataset, data_dir=data_dir)

  def docstrings() -> Docstrings:
    return Docstrings(data_dir=data_dir, manifest=manifest, environment=environment)

  @functools.cache
  def records(split: str) -> list[Record]:
    return read_records(docstrings(), split)

  corpus = {"dataset": CORPORA["docstring_text"][0], "builder": docstrings, "is_made": True}
  for task in RECORD_TASKS:
    source = _rows_source(lambda split, task=task: task_rows(task, records(split)))
    add(task, source, encode, TaskInfo(ABOUT[task], **corpus))
  source = _rows_source(
      lambda split: list(map(dataclasses.asdict, grammar(split, GRAMMAR_ROWS[split])))
  )
  add("grammar", source, encode, TaskInfo(ABOUT["grammar"]))

  for corpus_name, (dataset, splits) in CORPORA.items():
    if corpus_name == "docstring_text":
      source = _rows_source(lambda split: list(_texts(records(split))), ("text",))
      info = TaskInfo("", **corpus, is_noised=True)
    else:
      source = seqio.TfdsDataSource(dataset, tfds_data_dir=data_dir, splits=splits, read_only=True)
      info = TaskInfo("", dataset, functools.partial(tfds_builder, dataset), is_noised=True)
    # Targets hold the text until the objective splits it. Only where a text ends is there an
    # EOS to predict in prefix-LM; a corrupted chunk always says that it is done.
    read = functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"})
    add(
        f"{corpus_name}_span_corruption", source,
        (read, tokenize, _chunks(span_length), _corrupt,
         seqio.preprocessors.append_eos),
        dataclasses.replace(info, about="text with 15 % of it hidden → what is hidden"),
    )
    add(
        f"{corpus_name}_prefix_lm", source,
        (read, *encode, _chunks(objectives.prefix_lm_length), _split),
        dataclasses.replace(info, about="beginning of a text → how it goes on"),
    )

  for name, task in PAPER_TASKS.items():
    source = seqio.TfdsDataSource(
        task.dataset, tfds_data_dir=data_dir, splits=dict(task.splits), read_only=True
    )
    prompt = functools.partial(
        seqio.preprocessors.preprocess_tensorflow_examples,
        inputs_format=task.inputs, targets_format=task.targets,
    )
    first = () if task.first is None else (task.first,)
    builder = functools.partial(tfds_builder, task.dataset)
    info = TaskInfo(ABOUT[name], task.dataset, builder, is_by_hand=task.is_by_hand)
    add(name, source, (*first, prompt, *encode), info)

  for name, rates in MIXTURES.items():
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, list(rates.items()))
  return tasks


def read_records(builder: Docstrings, split: str) -> list[Record]:
  """The corpus' records of a split in their order, made first where they aren't there.

  Raises:
    InputError: see `TaskInfo.make`.
  """
  make(builder)
  # TFDS shuffles what it writes; which of equal rows a task keeps depends on the order.
  places = {entry.distribution: i for i, entry in enumerate(builder.manifest.entries)}
  return sorted(
      map(_record, tfds.as_numpy(builder.as_dataset(split=split))),
      key=lambda record: (places[record.distribution], record.path, record.line),
  )


def make(builder: tfds.core.DatasetBuilder) -> None:
  """Makes a dataset in its folder where it isn't there; see `TaskInfo.make`."""
  try:
    builder.download_and_prepare()
  except (OSError, tf.errors.OpError) as error:
    raise InputError(
        "data_dir", str(builder.data_dir),
        f"a path that can be written ({getattr(error, 'strerror', None) or error})",
    ) from error


def plain_text(record: Record) -> str:
  """Code with its docstring where it stands in the file; of a module the docstring alone."""
  if record.kind == "module":
    return record.docstring
  first = record.body.split("\n", 1)[0]
  margin = first[: len(first) - len(first.lstrip(" "))] or "    "
  ending = '\n"""' if "\n" in record.docstring else '"""'
  quoted = f'"""{record.docstring}{ending}'.split("\n")
  lines = [record.signature, *(margin + line if line else "" for line in quoted)]
  return "\n".join([*lines, record.body] if record.body else lines)


def _texts(records: Sequence[Record]) -> Iterator[dict[str, str]]:
  for record in records:
    text = plain_text(record)
    # Documentation of T5 has sentinels, which would be taken for those of a hidden span.
    if "<extra_id_" not in text:
      yield {"text": text}


def _record(row: Mapping) -> Record:
  """A record from what TFDS reads."""
  names, descriptions = (row["parameters"][key] for key in ("name", "description"))
  parameters = [
      {"name": name.decode(), "description": description.decode()}
      for name, description in zip(names, descriptions)
  ]
  fields = {
      name: value.decode() if isinstance(value, bytes) else int(value)
      for name, value in row.items() if name != "parameters"
  }
  return Record.from_dict(fields | {"parameters": parameters})


def _rows_source(
    rows: Callable[[str], Sequence[Mapping[str, str]]],
    fields: Sequence[str] = ("inputs", "targets"),
) -> seqio.FunctionDataSource:
  """A source of rows of text that are held in memory, shuffled as a whole."""

  def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    found = rows(split)
    if not found:
      raise InputError("split", split, "one with rows; the corpus gives none for it")
    data = tf.data.Dataset.from_tensor_slices(
        {field: [row[field] for row in found] for field in fields}
    )
    return data.shuffle(len(found), seed=seed) if shuffle_files else data

  return seqio.FunctionDataSource(dataset, splits=SPLITS)


def _chunks(chunk_length: Callable[[int, int], int]) -> Preprocessor:
  """A step that cuts `targets` into chunks of as many tokens as an objective says."""

  def cut(
      dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None
  ) -> tf.data.Dataset:
    length = chunk_length(*_lengths(sequence_length))

    def chunks(features: Mapping[str, tf.Tensor]) -> dict[str, tf.RaggedTensor]:
      tokens = features["targets"]
      starts = tf.range(0, tf.maximum(tf.size(tokens), 1), length)
      return {"targets": tf.RaggedTensor.from_row_starts(tokens, starts)}

    shortest = max(2, min(MIN_CHUNK, length))
    # Four times as fast as `flat_map`, which makes a dataset of each text.
    return dataset.map(chunks, tf.data.AUTOTUNE).unbatch().filter(
        lambda features: tf.size(features["targets"]) >= shortest
    )

  return cut


@seqio.map_over_dataset(num_seeds=1)
def _corrupt(
    features: Mapping[str, tf.Tensor], output_features: Mapping[str, seqio.Feature],
    seed: Sequence[tf.Tensor],
) -> dict[str, tf.Tensor]:
  """Hides spans of a chunk."""
  sentinels = output_features["targets"].vocabulary.sentinels

  def corrupt(tokens: np.ndarray, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return objectives.span_corruption(tokens, sentinels, np.random.default_rng(seed))

  return _both_sides(corrupt, features["targets"], seed)


@seqio.map_over_dataset(num_seeds=1)
def _split(
    features: Mapping[str, tf.Tensor], sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature], seed: Sequence[tf.Tensor],
) -> dict[str, tf.Tensor]:
  """Splits a chunk at a random place; inputs get an EOS, as everywhere."""
  eos_id = output_features["inputs"].vocabulary.eos_id

  def split(tokens: np.ndarray, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = objectives.prefix_lm(
        tokens, *_lengths(sequence_length), np.random.default_rng(seed)
    )
    return np.append(inputs, np.int32(eos_id)), targets

  return _both_sides(split, features["targets"], seed)


def _both_sides(
    function: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    tokens: tf.Tensor, seed: Sequence[tf.Tensor],
) -> dict[str, tf.Tensor]:
  sides = tf.numpy_function(
      function, [tokens, tf.stack(seed)], [tf.int32, tf.int32], stateful=False
  )
  return {
      name: tf.ensure_shape(side, [None]) for name, side in zip(("inputs", "targets"), sides)
  }


def _lengths(sequence_length: Mapping[str, int] | None) -> tuple[int, int]:
  if not sequence_length or {"inputs", "targets"} - set(sequence_length):
    raise InputError(
        "sequence_length", sequence_length, "{'inputs': …, 'targets': …}, as chunks are cut to fit"
    )
  return sequence_length["inputs"], sequence_length["targets"]
