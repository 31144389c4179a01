"""Typing errors: what a text looks like when it is typed fast and not read again.

`typing_errors` draws edits for a text, `apply_edits` makes them. Every edit is of
two characters at most and inside a word, at its first letter, at the punctuation
behind it or at the space after that; no word is lost, and what looks like code or
a number keeps its characters, so that what was meant can be read from what is left.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import random
import re

# Words in error, and how often a writer doesn't bother with capitals or punctuation at all.
RATES = (0.08, 0.45)
NO_CAPITALS = 0.35
NO_PUNCTUATION = 0.15

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# A word in its quotes and brackets, with the punctuation behind it.
_WORD = re.compile(r"(?P<before>[(\"'\[]?)(?P<core>[A-Za-z][a-z]*(?:['-][a-z]+)*)"
                   r"(?P<after>[)\"'\]]?[.,;:!?]?)")
# How often each kind happens, where it can.
_WEIGHTS = {
    "neighbour": 5, "swapped": 5, "doubled": 3, "lost": 5, "joined": 3, "late space": 1,
    "early space": 1, "late shift": 1, "no punctuation": 4, "wrong punctuation": 2,
}
_WRONG = {",": ".", ".": ",", ";": ",", ":": ";", "!": "1", "?": "/"}


@dataclasses.dataclass(frozen=True)
class Edit:
  """`text[start:stop]` is typed as `typed`."""

  start: int
  stop: int
  typed: str


def typing_errors(text: str, seed: int) -> list[Edit]:
  """Edits that don't overlap, in order.

  Args:
    text: words with single spaces between them.
    seed: all is drawn from it, the rate of errors first.
  """
  # `random` is alike in every version of Python, other functions of `Random` aren't.
  draw = random.Random(seed).random
  low, high = RATES
  rate = low + (high - low) * draw()
  has_capitals, has_punctuation = draw() >= NO_CAPITALS, draw() >= NO_PUNCTUATION
  edits = []
  words = list(re.finditer(r"\S+", text))
  for i, place in enumerate(words):
    match = _WORD.fullmatch(place[0])
    following = words[i + 1][0] if i + 1 < len(words) else ""
    if match is None:
      continue
    offset = place.start()
    core, start = match["core"], offset + match.start("core")
    mark = place.end() - 1 if match["after"][-1:] and match["after"][-1] in _WRONG else None
    # Elsewhere a capital is a name's, or one that nobody could tell.
    is_first = i == 0 or words[i - 1][0].endswith((".", "!", "?"))
    if is_first and core[0].isupper() and core != "I" and not has_capitals:
      edits.append(Edit(start, start + 1, core[0].lower()))
    if mark is not None and text[mark] in ".," and not has_punctuation:
      edits.append(Edit(mark, mark + 1, ""))
      mark = None
    is_wrong, which, where = draw() < rate, draw(), draw()
    if is_wrong:
      kinds = _kinds(text, core, start, mark, place.end(), following, has_capitals, where)
      if kinds:
        edits.append(_pick(kinds, which))
  return sorted(edits, key=lambda edit: edit.start)


def apply_edits(text: str, edits: Sequence[Edit]) -> str:
  """The text as typed."""
  pieces, end = [], 0
  for edit in edits:
    pieces += [text[end : edit.start], edit.typed]
    end = edit.stop
  return "".join([*pieces, text[end:]])


def _kinds(
    text: str, core: str, start: int, mark: int | None, end: int, following: str,
    has_capitals: bool, where: float,
) -> dict[str, Edit]:
  """What can happen to a word, at a place of it that `where` in 0 … 1 decides.

  A first letter stays, as does a last one but for its order: an s or d less is
  another word. Short words only change in order.
  """
  kinds = {}
  length = len(core)
  if length >= 4:
    i = 1 + int(where * (length - 2))
    if core[i].isalpha():
      near = _neighbours(core[i])
      letter = near[int(where * 997) % len(near)]
      kinds["neighbour"] = Edit(start + i, start + i + 1, letter)
      kinds["doubled"] = Edit(start + i, start + i + 1, core[i] * 2)
      kinds["lost"] = Edit(start + i, start + i + 1, "")
  if length >= 3:
    i = 1 + int(where * (length - 2))
    if core[i : i + 2].isalpha() and core[i] != core[i + 1]:
      kinds["swapped"] = Edit(start + i, start + i + 2, core[i + 1] + core[i])
    # A sign has no capital: I'm, X-axis.
    if core[0].isupper() and core[1].isalpha() and has_capitals:
      kinds["late shift"] = Edit(start + 1, start + 2, core[1].upper())
  is_before_word = _WORD.fullmatch(following) is not None
  if is_before_word and length >= 2:
    kinds["joined"] = Edit(end, end + 1, "")
    if end == start + length and length >= 3:
      kinds["early space"] = Edit(end - 1, end + 1, " " + core[-1])
    if following[0].islower() and len(following) >= 3:
      kinds["late space"] = Edit(end, end + 2, following[0] + " ")
  if mark is not None:
    kinds["no punctuation"] = Edit(mark, mark + 1, "")
    kinds["wrong punctuation"] = Edit(mark, mark + 1, _WRONG[text[mark]])
  return kinds


def _pick(kinds: dict[str, Edit], which: float) -> Edit:
  """One of the kinds by their weights, at the place of `which` in 0 … 1 among them."""
  ends = itertools.accumulate(_WEIGHTS[kind] for kind in kinds)
  total = sum(_WEIGHTS[kind] for kind in kinds)
  return next(edit for end, edit in zip(ends, kinds.values()) if which * total < end)


def _neighbours(letter: str) -> str:
  """Keys to the left and right of a letter's, in its case."""
  row = next(row for row in _KEYS if letter.lower() in row)
  i = row.index(letter.lower())
  near = row[max(0, i - 1) : i] + row[i + 1 : i + 2]
  return near.upper() if letter.isupper() else near
