"""A seeded grammar whose block efficiency can be computed by hand.

The input is a list of different words. The output has a phrase for each word,
in order: an *opener*, drawn at random, then a *run* of as many symbols as the
word is long (1 … 7), which only depends on the word and on whether the opener is
the first of the ten. So a phrase of word w is

  first opener (probability 1/4), then the symbols of w's list A, or
  one of nine others (1/12 each), then the symbols of w's list B,

where A and B have the same length and differ at every place.

**Entropy.** Openers are all that is random: 1/4 · log2 4 + 9/12 · log2 12 =
3.19 bits a phrase, whatever its length.

**Greedy output.** The likeliest opener is always the first (1/4 against 1/12), so
greedy decoding writes the first opener and list A for each word, then EOS.

**Ideal heads.** Head i sees the tokens up to position t and predicts the token at
t + i with the largest probability *averaged over what may stand in between*.
 - A symbol of a run whose opener is at t or before: certain, hence right.
 - An opener, however far: 1/4 against 1/12, the first one, hence right.
 - A symbol of a run whose opener comes after t: list B with 3/4 against list A
   with 1/4, hence *wrong*, since greedy writes list A.
 - EOS: its place is known from the input, hence right.
The probabilities are chosen such that each of these decisions is one of 3 to 1.

**Calls.** A draft is made where a position t is the newest whose hidden state is
known, so it passes up to the next opener after t and no further. From t = 0 (start
token): the first opener, 1 token. From an opener with a run of L: the run and
the next opener, L + 1 tokens, in ceil((L + 1) / h) drafts of at most h; the last
phrase needs its run and then EOS, which the call that ends the run emits anyway:
ceil(L / h). The first call has no draft and emits one token, every other call
emits what the draft before it was worth, and therefore

  calls  = 2 + Σ_{all but the last phrase} ceil((L + 1) / h) + ceil(L_last / h)
  tokens = 1 + Σ (L + 1), EOS included

With h = 8 every phrase is one draft: n words need n + 2 calls. Lengths are uniform
on 1 … 7, so the block efficiency of eight words is about (1 + 8 · 5) / 10 = 4.1;
perfect heads would reach 41 / (1 + ceil(40 / 8)) = 6.8 on a row of that length.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math

import numpy as np

from bpd_jax.data.sources import SPLITS
from bpd_jax.data.text_tasks import Example
from bpd_jax.errors import check_count, InputError

NUM_OPENERS = 10
FIRST_OPENER = 1 / 4
RUN_LENGTHS = (1, 7)
NUM_WORDS = (4, 10)
ENTROPY_BITS = FIRST_OPENER * math.log2(1 / FIRST_OPENER) + (1 - FIRST_OPENER) * math.log2(
    (NUM_OPENERS - 1) / (1 - FIRST_OPENER)
)

# Each is one piece of the shipped vocabulary, at the beginning of a text or after a space.
_OPENERS = "the if for from import not with as is and".split()
_WORDS = (
    "index name value key type shape axis data array tensor function class method object "
    "list model input output result error file path code size time line"
).split()
_SYMBOLS = (
    "return self in of to a be an or by on this that are at it can will use used which set "
    "number default given when new all one first example optional parameters other only string "
    "dimension"
).split()


PREFIX = "grammar:\n"


@dataclasses.dataclass(frozen=True)
class Word:
  """What a phrase says for a word.

  Attributes:
    first: symbols after the first opener.
    other: as many symbols after another opener, different at every place.
  """

  first: tuple[str, ...]
  other: tuple[str, ...]


@functools.cache
def lexicon(seed: int = 0) -> dict[str, Word]:
  """All words, drawn from a seed; their lengths go round from 1 to 7."""
  generator = np.random.Generator(np.random.PCG64(seed))
  low, high = RUN_LENGTHS
  words = {}
  for i, word in enumerate(_WORDS):
    length = low + i % (high - low + 1)
    first = generator.integers(len(_SYMBOLS), size=length)
    other = (first + generator.integers(1, len(_SYMBOLS), size=length)) % len(_SYMBOLS)
    words[word] = Word(*(tuple(_SYMBOLS[i] for i in symbols) for symbols in (first, other)))
  return words


def grammar(split: str, num_examples: int, seed: int = 0) -> list[Example]:
  """Rows of the task.

  Args:
    split: "train" has openers drawn at random; in "validation" and "test" every
      target is the likeliest output, so that a model can be seen to be right.
    num_examples: how many; a longer list begins with the shorter one.
    seed: of the lexicon and the rows.
  """
  words = lexicon(seed)
  examples = []
  for i in range(num_examples):
    generator = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), i]))
    chosen = generator.choice(list(words), generator.integers(*NUM_WORDS, endpoint=True), False)
    target = []
    for word in chosen:
      is_first = split != "train" or generator.random() < FIRST_OPENER
      opener = 0 if is_first else generator.integers(1, NUM_OPENERS)
      target += [_OPENERS[opener], *(words[word].first if is_first else words[word].other)]
    examples.append(Example(PREFIX + " ".join(chosen), " ".join(target)))
  return examples


def run_lengths(inputs: str, seed: int = 0) -> list[int]:
  """Length of each run in the output for an input."""
  words = lexicon(seed)
  return [len(words[word].first) for word in inputs.removeprefix(PREFIX).split()]


def ideal_calls(lengths: Sequence[int], block_size: int) -> int:
  """Decoder calls of ideal heads for a row, see above.

  Args:
    lengths: of the runs, one for each word.
    block_size: h.
  """
  *others, last = lengths
  drafts = sum(math.ceil((length + 1) / block_size) for length in others)
  return 2 + drafts + math.ceil(last / block_size)


def ideal_block_efficiency(rows: Sequence[Sequence[int]], block_size: int) -> float:
  """Tokens, EOS included, over decoder calls of ideal heads.

  Args:
    rows: `run_lengths` of each row.
    block_size: h.
  """
  tokens = sum(1 + sum(length + 1 for length in lengths) for lengths in rows)
  return tokens / sum(ideal_calls(lengths, block_size) for lengths in rows)


@dataclasses.dataclass(frozen=True)
class GrammarTask:
  """Rows of the grammar, any number of them.

  Attributes:
    split: "train", "validation" or "test"; see `grammar`.
    max_examples: how many.
    seed: of the lexicon and the rows.
    name: in results.
  """

  split: str = "train"
  max_examples: int = 10_000
  seed: int = 0
  name: str = "grammar"

  def rows(self) -> list[dict[str, str]]:
    """`inputs` and `targets` of each."""
    if self.split not in SPLITS:
      raise InputError("GrammarTask.split", self.split, f"one of {SPLITS}")
    check_count("GrammarTask.max_examples", self.max_examples)
    return [
        dataclasses.asdict(example)
        for example in grammar(self.split, self.max_examples, self.seed)
    ]
