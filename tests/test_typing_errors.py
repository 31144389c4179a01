"""Typing errors: drawn alike everywhere, small, and such that what was meant can be read."""

import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

from bpd_jax.data import typing_errors as module
from bpd_jax.data.typing_errors import apply_edits, Edit, typing_errors

TEXT = (
    "The values are sorted, then written to the file. Nothing else is changed; use "
    "`keep_order=True` or np.sort() to keep all 12 of the \"first\" items (see NumPy)."
)
# Words and signs that a docstring may have, in any order.
WORDS = st.lists(
    st.sampled_from([
        *TEXT.split(), "I", "I'm", "a", "B.", "it's", "don't,", "x=1", "[one]", "ünï", "--",
    ]),
    min_size=1, max_size=25,
).map(" ".join)


@given(WORDS, st.integers(0, 2**64 - 1))
def test_edits_are_small_apart_and_spare_words_and_code(text, seed):
  check_edits(text, seed)


def test_edits_of_many_seeds_are_small_apart_and_spare_words_and_code():
  for seed in range(1000):
    check_edits(TEXT, seed)


def check_edits(text, seed):
  edits = typing_errors(text, seed)
  assert edits == typing_errors(text, seed)
  ends = [0, *(edit.stop for edit in edits)]
  for edit, end in zip(edits, ends):
    assert end <= edit.start < edit.stop <= edit.start + 2
    assert len(edit.typed) <= 2 and edit.typed != text[edit.start : edit.stop]
  typed = apply_edits(text, edits)
  # The first letter of each word is there in its order, whatever the spaces do.
  letters = iter(typed.lower())
  assert all(word[0].lower() in letters for word in re.findall(r"[a-z']+", text.lower()))
  for literal in re.findall(r"\S*[`=\d_]\S*|[\w.]+\(\)|NumPy", text):
    assert literal in typed
  # Taken back from the right, they give the text again.
  shift = len(typed) - len(text)
  for edit in reversed(edits):
    shift -= len(edit.typed) - (edit.stop - edit.start)
    start = edit.start + shift
    assert typed[start : start + len(edit.typed)] == edit.typed
    typed = typed[:start] + text[edit.start : edit.stop] + typed[start + len(edit.typed) :]
  assert typed == text


def test_a_known_draw():
  # The same on every machine: rows are made by it.
  assert apply_edits(TEXT, typing_errors(TEXT, 9)) == (
      "The values are sorted thhen written to teh file Nothing else is changed; use `keep_o"
      'rder=True` or np.sort() tokeep all 12 of the "first" items (see NumPy).'
  )
  assert apply_edits(TEXT, typing_errors(TEXT, 7)) == (
      "thevlues are sorted, then written tot eh file. nothing ekse is changed; use `keep_or"
      'der=True` or np.sort() to kep all 12 of the "first" items (see NumPy).'
  )


def test_rates_go_from_light_to_heavy():
  words = len(re.findall(r"[A-Za-z]{3,}", TEXT))
  shares = sorted(len(typing_errors(TEXT, seed)) / words for seed in range(400))
  assert shares[20] < 0.1 and shares[-20] > 0.45
  assert 0.2 < sum(shares) / len(shares) < 0.45


def test_some_writers_leave_capitals_and_punctuation_out():
  typed = [apply_edits(TEXT, typing_errors(TEXT, seed)) for seed in range(400)]
  lower = [text for text in typed if text[0] == "t" and " N" not in text[1:60]]
  unmarked = [text for text in typed if not re.search("[.,]", text[:60])]
  assert 0.2 < len(lower) / 400 < 0.4
  assert 0.1 < len(unmarked) / 400 < 0.25
  # Only at the start of sentences; nobody could tell elsewhere.
  for seed in range(400):
    names = apply_edits("It is for Amy and Bob.", typing_errors("It is for Amy and Bob.", seed))
    assert "A" in names and "B" in names


@pytest.mark.parametrize("text, possible", [
    ("data", {"neighbour": {"dsta", "dara", "daya"}, "doubled": {"daata", "datta"},
              "lost": {"dta", "daa"}, "swapped": {"dtaa", "daat"}}),
    ("the", {"swapped": {"teh"}}),
    ("at one", {"joined": {"atone"}, "late space": {"ato ne"}, "swapped": {"at oen"}}),
    ("for a", {"joined": {"fora"}, "early space": {"fo ra"}, "swapped": {"fro a"}}),
    ("No, it", {"joined": {"No,it"}, "no punctuation": {"No it"}, "wrong punctuation": {"No. it"},
                "no capital": {"no, it"}}),
    ("I'm", {"no capital": {"i'm"}}),
    ("One", {"late shift": {"ONe"}, "swapped": {"Oen"}, "no capital": {"one"}}),
])
def test_what_can_happen(text, possible, monkeypatch):
  monkeypatch.setattr(module, "RATES", (0.6, 0.6))
  found = {
      apply_edits(text, edits) for seed in range(3000)
      if len(edits := typing_errors(text, seed)) == 1
  }
  assert found == set().union(*possible.values())


@pytest.mark.parametrize("text", ["`values`", "np.sort", "x_1", "12", "HTTP", "key=value", "I"])
def test_what_looks_like_code_stays(text, monkeypatch):
  monkeypatch.setattr(module, "RATES", (1.0, 1.0))
  assert not any(typing_errors(text, seed) for seed in range(200))


def test_edits_are_made():
  edits = [Edit(0, 1, "t"), Edit(3, 4, ""), Edit(5, 7, "ba")]
  assert apply_edits("The abcd", edits) == "theabad"
