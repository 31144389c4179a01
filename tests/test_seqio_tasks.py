"""SeqIO's tasks: rows of the corpus, objectives on its text, the paper's seven, mixtures."""

from collections import Counter
from pathlib import Path
import re

import numpy as np
import pytest
import seqio
import small_corpus
import tensorflow as tf
import tensorflow_datasets as tfds

from bpd_jax.data import docstrings, grammar, rows, seqio_tasks
from bpd_jax.data.extraction import Record
from bpd_jax.data.seqio_vocabulary import SeqioVocabulary
from bpd_jax.data.sources import SPLITS
from bpd_jax.errors import InputError
from bpd_jax.vocabulary import ByteVocabulary, SentencePieceVocabulary

LENGTHS = {"inputs": 64, "targets": 32}
TEXTS = (
    "def f(x):\n    return  x\n\n\n", "", "ünïcode 漢字 🙂", "a<extra_id_0>b <extra_id_1> c",
    "<extra_id_99><extra_id_100>", " leading", "tab\tand \u2581",
)
LAST, FIRST = "<extra_id_99>", "<extra_id_0>"


@pytest.fixture(scope="module")
def vocabulary():
  return SentencePieceVocabulary(rows.VOCABULARY_FILE)


@pytest.fixture(scope="module")
def small():
  return small_corpus.make()


@pytest.fixture(scope="module")
def corpus(small):
  return docstrings.build(*small)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def tasks(vocabulary, data_dir, small):
  manifest, environment = small
  return seqio_tasks.register(
      vocabulary, data_dir=data_dir, manifest=manifest, environment=environment
  )


def examples(task, split="validation", lengths=None, **options):
  """Ids of a task's examples, in order."""
  dataset = seqio.TaskRegistry.get(task).get_dataset(
      lengths, split, **{"shuffle": False, "trim_output_features": False, **options}
  )
  return [
      (example["inputs"].tolist(), example["targets"].tolist())
      for example in dataset.as_numpy_iterator()
  ]


# Vocabulary.


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_ids_are_those_of_the_packages_vocabulary(kind, vocabulary):
  vocabulary = vocabulary if kind == "sentencepiece" else ByteVocabulary()
  wrapped = SeqioVocabulary(vocabulary)
  assert (wrapped.vocab_size, wrapped.pad_id, wrapped.eos_id, wrapped.unk_id) == (
      vocabulary.size, 0, 1, 2
  )
  features = {"text": seqio.Feature(wrapped)}
  dataset = seqio.preprocessors.tokenize(
      tf.data.Dataset.from_tensor_slices({"text": list(TEXTS)}), features
  )
  found = [row["text"].tolist() for row in dataset.as_numpy_iterator()]
  assert found == [vocabulary.encode(text) for text in TEXTS] == list(map(wrapped.encode, TEXTS))
  for text, ids in zip(TEXTS, found):
    expected = vocabulary.decode(ids)
    assert wrapped.decode(ids) == expected
    assert wrapped.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() == expected
    assert expected == text or "\u2581" in text
  assert wrapped == SeqioVocabulary(vocabulary) != SeqioVocabulary


def test_sentinels_are_the_last_ids(vocabulary):
  wrapped = SeqioVocabulary(vocabulary)
  assert (wrapped.encode(FIRST), wrapped.encode(LAST)) == ([4095], [3996])
  assert wrapped != SeqioVocabulary(ByteVocabulary())


# The corpus.


def test_records_come_back_in_their_order(tasks, corpus):
  builder = tasks["docstring_qa"].builder()
  for split in SPLITS:
    assert seqio_tasks.read_records(builder, split) == list(corpus.records[split])


@pytest.mark.parametrize("task", rows.RECORD_TASKS)
def test_a_task_gives_its_rows_in_ids(task, tasks, corpus, vocabulary):
  for split in SPLITS:
    expected = [
        tuple([*vocabulary.encode(row[side]), 1] for side in ("inputs", "targets"))
        for row in rows.task_rows(task, corpus.records[split])
    ]
    assert len(expected) > 10
    assert examples(task, split) == expected


def test_grammar_begins_with_the_shipped_rows(tasks, vocabulary):
  for split, count in (("train", 50_000), ("validation", 2_000), ("test", 2_000)):
    assert seqio_tasks.GRAMMAR_ROWS[split] == count
  found = examples("grammar", "test")
  shipped = rows.load_rows("grammar", "test")
  assert len(found) == 2_000
  assert [vocabulary.decode(inputs) for inputs, _ in found[:500]] == [
      row["inputs"] for row in shipped
  ]
  assert found[7][1] == [*vocabulary.encode(grammar.grammar("test", 8)[7].targets), 1]


def test_shuffling_shows_the_same_rows_in_another_order(tasks):
  plain = examples("docstring_qa")
  one, again, other = (
      examples("docstring_qa", shuffle=True, seed=seed) for seed in (1, 1, 2)
  )
  assert one == again != other
  assert sorted(one) == sorted(other) == sorted(plain) != one


def test_shuffling_reaches_further_than_seqios_buffer(tasks, vocabulary):
  dataset = seqio.TaskRegistry.get("grammar").get_dataset(None, "train", shuffle=True, seed=0)
  found = {vocabulary.decode(row["inputs"]) for row in dataset.take(20).as_numpy_iterator()}
  first = {example.inputs for example in grammar.grammar("train", 2_000)}
  assert len(found - first) > 10


# Plain text.


@pytest.mark.parametrize("fields, expected", [
    ({"kind": "module", "docstring": "All of it.\n\nMore."}, "All of it.\n\nMore."),
    (
        {"kind": "class", "signature": "class A:", "docstring": "Is an A."},
        'class A:\n    """Is an A."""',
    ),
    (
        {"kind": "function", "signature": "def f(x):", "body": "  y = x\n  return y",
         "docstring": "Returns it.\n\n  Yes:\nit."},
        'def f(x):\n  """Returns it.\n\n    Yes:\n  it.\n  """\n  y = x\n  return y',
    ),
])
def test_text_is_code_with_its_docstring(fields, expected):
  record = Record(**{
      "distribution": "d", "path": "p.py", "line": 1, "name": "f", "signature": "", "body": "",
      **fields,
  })
  assert seqio_tasks.plain_text(record) == expected


def test_text_with_sentinels_in_it_is_left_out():
  record = Record("d", "p.py", 1, "f", "module", "", "", "Hides <extra_id_0> here.")
  assert list(seqio_tasks._texts([record])) == []


def restore(inputs, targets):
  """Text ids from a corrupted pair, EOS of both sides off."""
  assert inputs[-1] == targets[-1] == 1
  spans, ids = {}, []
  for token in targets[:-1]:
    if token >= 3996:
      spans[token] = here = []
    else:
      here.append(token)
  for token in inputs[:-1]:
    ids += spans[token] if token >= 3996 else [token]
  return ids


def pieces(ids, length, shortest=seqio_tasks.MIN_CHUNK):
  """Chunks of a text that are long enough."""
  chunks = [ids[start : start + length] for start in range(0, len(ids), length)]
  return [chunk for chunk in chunks if len(chunk) >= shortest]


@pytest.fixture(scope="module")
def texts(corpus, vocabulary):
  return [vocabulary.encode(seqio_tasks.plain_text(r)) for r in corpus.records["validation"]]


def test_span_corruption_hides_parts_of_every_text(tasks, texts):
  task = "docstring_text_span_corruption"
  found = examples(task, lengths=LENGTHS, seed=0)
  expected = [chunk for ids in texts for chunk in pieces(ids, 70)]
  assert [restore(*pair) for pair in found] == expected
  assert max(len(inputs) for inputs, _ in found) == 64
  assert max(len(targets) for _, targets in found) <= 32
  assert found == examples(task, lengths=LENGTHS, seed=0) != examples(
      task, lengths=LENGTHS, seed=1
  )
  # The same place isn't hidden in every chunk.
  full = [pair for pair in found if len(pair[0]) == 64]
  assert len({tuple(np.flatnonzero(np.array(inputs) >= 3996)) for inputs, _ in full}) > 10


def test_copies_have_noise_of_their_own(tasks):
  for task in ("docstring_text_span_corruption", "docstring_text_prefix_lm"):
    once = examples(task, lengths=LENGTHS, seed=0)
    thrice = examples(task, lengths=LENGTHS, seed=0, num_epochs=3)
    copies = [thrice[i * len(once) : (i + 1) * len(once)] for i in range(3)]
    assert copies[0] == once
    assert len(thrice) == 3 * len(once)
    for a, b in ((0, 1), (0, 2), (1, 2)):
      same = sum(x == y for x, y in zip(copies[a], copies[b]))
      assert same < 0.2 * len(once)


def test_prefix_lm_goes_on_and_ends_where_the_text_does(tasks, texts):
  found = examples("docstring_text_prefix_lm", lengths=LENGTHS, seed=0)
  expected = [chunk for ids in texts for chunk in pieces([*ids, 1], 64)]
  assert all(inputs[-1] == 1 for inputs, _ in found)
  assert [inputs[:-1] + targets for inputs, targets in found] == expected
  assert max(len(inputs) for inputs, _ in found) == 64
  assert max(len(targets) for _, targets in found) == 32
  num_ends = sum(targets[-1] == 1 for _, targets in found)
  assert 0 < num_ends == sum(chunk[-1] == 1 for chunk in expected) < len(found)


def test_bytes_are_corrupted_with_their_last_values_as_sentinels(data_dir, small):
  manifest, environment = small
  try:
    seqio_tasks.register(
        ByteVocabulary(), data_dir=data_dir, manifest=manifest, environment=environment
    )
    inputs, targets = examples("docstring_text_span_corruption", lengths=LENGTHS, seed=0)[0]
  finally:
    seqio_tasks.register(
        SentencePieceVocabulary(rows.VOCABULARY_FILE), data_dir=data_dir, manifest=manifest,
        environment=environment,
    )
  assert targets[0] == 258 and 258 in inputs


def test_chunks_need_lengths(tasks):
  with pytest.raises(InputError, match="^sequence_length = None"):
    examples("docstring_text_prefix_lm")
  with pytest.raises(InputError, match=r"^lengths = \(64, 1\)"):
    examples("docstring_text_span_corruption", lengths={"inputs": 64, "targets": 1})


# The paper's tasks: records as the builders have them, in files of TFDS.

NEWSROOM = {
    "url": "u", "date": "d", "density_bin": "low", "coverage_bin": "low",
    "compression_bin": "low", "density": 1.0, "coverage": 0.5, "compression": 9.0,
}
PAPER = {
    "lambada": (
        {"passage": "he sat down . `` what is it ? '' she asked for the third time\n"},
        "he sat down . `` what is it ? ''", "she asked for the third time",
    ),
    "squad": (
        {"id": "5", "title": "T", "context": "Rome is in Italy.", "question": "Where is Rome?",
         "answers": {"text": ["Italy", "in Italy"], "answer_start": [11, 8]}},
        "question: Where is Rome? context: Rome is in Italy.", "Italy",
    ),
    "cnn_dailymail": (
        {"article": "It rained. {summary}", "highlights": "Rain .\nMuch of it .",
         "publisher": "cnn", "id": "1"},
        "summarize: It rained. {summary}", "Rain .\nMuch of it .",
    ),
    "samsum": (
        {"id": "1", "dialogue": "Amy: Hi!\r\nBob: Hi.", "summary": "Amy greets Bob."},
        "Here is a dialogue: Amy: Hi!\r\nBob: Hi.\nWrite a short summary!", "Amy greets Bob.",
    ),
    "multi_news": (
        {"document": "One. ||||| Two.\nThree.", "summary": "– All."},
        "Write a summary based on this article: One. ||||| Two.\nThree.", "– All.",
    ),
    "xsum": (
        {"document": "A long text.", "summary": "A text."}, "Summarize: A long text.", "A text.",
    ),
    "newsroom": (
        {"title": "Big News", "text": "It was big.", "summary": "Big.", **NEWSROOM},
        "Please write a short summary for the following article: Big News It was big.", "Big.",
    ),
}


def write_tfds(builder, records):
  """Writes records, by TFDS's split, where a builder looks for them."""
  Path(builder.data_dir).mkdir(parents=True)
  writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=100)
  writer.initialize_splits(list(records))
  writer.add_examples(records)
  writer.close_all()


# Records in each of TFDS's splits, and where SeqIO's splits read them.
COUNTS = {"train": 3, "validation": 2, "test": 1}
READS = {split: split for split in SPLITS}
PAPER_SPLITS = {task: READS for task in PAPER} | {
    "lambada": {"validation": "train", "test": "test"},
    "squad": {"train": "train", "validation": "validation"},
}


@pytest.fixture(scope="module")
def paper(tasks):
  """All seven with their record; the later in the list, the more often."""
  for i, (task, (record, _, _)) in enumerate(PAPER.items()):
    assert not tasks[task].is_here()
    by_hand = bool(tasks[task].builder().MANUAL_DOWNLOAD_INSTRUCTIONS)
    assert tasks[task].is_by_hand == by_hand == (task in {"samsum", "xsum", "newsroom"})
    write_tfds(tasks[task].builder(), {
        split: [record] * (i + COUNTS[split]) for split in PAPER_SPLITS[task].values()
    })
  return tasks


@pytest.mark.parametrize("task", PAPER)
def test_a_task_of_the_paper_has_its_prompt(task, paper, vocabulary):
  assert paper[task].is_here()
  _, inputs, targets = PAPER[task]
  expected = tuple([*vocabulary.encode(text), 1] for text in (inputs, targets))
  assert tuple(seqio.TaskRegistry.get(task).splits) == tuple(PAPER_SPLITS[task])
  for split, origin in PAPER_SPLITS[task].items():
    assert examples(task, split) == [expected] * (list(PAPER).index(task) + COUNTS[origin])


def test_versions_are_those_that_tfds_has():
  for task in PAPER:
    name, _, version = seqio_tasks.PAPER_TASKS[task].dataset.partition(":")
    assert str(tfds.builder_cls(name.partition("/")[0]).VERSION) == version


@pytest.mark.parametrize("passage, expected", [
    ("a b . c d", ("a b .", "c d")),
    ("a ! b ? c .", ("a ! b ?", "c .")),
    ("`` a . '' b . '' c d\n", ("`` a . '' b . ''", "c d")),
    ("no end at all", None),
    ("it ends .", None),
    ("a mr. b left . c d", ("a mr. b left .", "c d")),
])
def test_passages_are_split_before_their_last_sentence(passage, expected):
  dataset = tf.data.Dataset.from_tensors({"passage": passage})
  found = [
      (row["context"].decode(), row["sentence"].decode())
      for row in seqio_tasks.last_sentence(dataset).as_numpy_iterator()
  ]
  assert found == ([expected] if expected else [])


# Registries.


def test_registering_again_replaces(vocabulary, data_dir, small, tasks):
  again = seqio_tasks.register(
      vocabulary, data_dir=data_dir, manifest=small[0], environment=small[1]
  )
  assert list(again) == list(tasks)
  assert set(again) <= set(seqio.TaskRegistry.names())
  assert set(seqio_tasks.MIXTURES) <= set(seqio.MixtureRegistry.names())


def test_data_has_a_version(tasks, small):
  assert tasks["docstring_lm"].data_version() == f"docstrings:1.1.0 {small[0].fingerprint}"
  assert tasks["squad"].data_version() == "squad/v1.1:3.0.0"
  assert tasks["grammar"].data_version() == ""


def test_a_mixture_has_its_rates(tasks, vocabulary):
  dataset = seqio.MixtureRegistry.get("docstring_tasks").get_dataset(
      None, "train", shuffle=True, seed=0, trim_output_features=False
  )
  prompts = {"summarize", "question", "continue", "format", "implement", "repair", "convert"}
  found = Counter(
      re.match(r"\w+", vocabulary.decode(example["inputs"].tolist()))[0]
      for example in dataset.take(2100).as_numpy_iterator()
  )
  assert set(found) == prompts
  assert all(abs(count - 300) < 60 for count in found.values())


def test_the_papers_mixture_goes_by_size(paper):
  mixture = seqio.MixtureRegistry.get("paper_tasks")
  rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
  assert rates == {
      "squad": 4, "cnn_dailymail": 5, "samsum": 6, "multi_news": 7, "xsum": 8, "newsroom": 9
  }
