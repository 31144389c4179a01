"""Whether outputs say something: repetition, the mark of an undertrained model."""

from collections.abc import Sequence

# A row loops where more than this share of its 3-grams came before in the row.
LOOPING_SHARE = 0.1


def repeated_share(tokens: Sequence[int], n: int = 3) -> float:
  """Share of a row's n-grams that stood earlier in the same row; 0 below n + 1 tokens."""
  grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_looping(tokens: Sequence[int]) -> bool:
  """Whether a row repeats itself; see `LOOPING_SHARE`."""
  return repeated_share(tokens) > LOOPING_SHARE
