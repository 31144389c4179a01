"""Duplicates, caps and 13-grams, against counting by hand."""

from collections import Counter
import dataclasses
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
import pytest

from bpd_jax.data import cleaning
from bpd_jax.data.extraction import Record


def record(docstring="A docstring.", distribution="d", line=1, body="", signature="def f():"):
  return Record(distribution, "p.py", line, "f", "function", signature, body, docstring)


def words(low, high, prefix="w"):
  return " ".join(f"{prefix}{i}" for i in range(low, high))


def test_duplicates_differ_in_more_than_case_and_layout():
  texts = ["One text.", "one\n  TEXT.", "Another text."]
  kept = cleaning.drop_duplicates(map(record, texts))
  assert [r.docstring for r in kept] == ["One text.", "Another text."]


def test_first_lines_that_are_common_go_with_all_their_records():
  five = [record(f"Five.\n\n{i}") for i in range(5)]
  six = [record(f"Six.\n\n{i}") for i in range(6)]
  assert cleaning.drop_common_first_lines([*five, *six]) == five


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.sampled_from([0.15, 0.3, 0.5]))
def test_no_distribution_is_over_its_share(sizes, share):
  records = [
      record(distribution=f"d{i}", line=line)
      for i, size in enumerate(sizes) for line in range(size)
  ]
  kept = cleaning.cap_distributions(records, share)
  counts = Counter(r.distribution for r in kept)
  limit = max(counts.values())
  assert kept == [r for r in records if r in kept]
  assert counts == {f"d{i}": min(size, limit) for i, size in enumerate(sizes)}
  if limit > min(sizes):
    assert limit <= share * len(kept)
  # One more of each would break the rule, unless nothing was cut.
  total = sum(min(size, limit + 1) for size in sizes)
  assert limit == max(sizes) or limit + 1 > share * total


def test_which_records_are_kept_does_not_depend_on_the_order():
  records = [record(distribution="big", line=i) for i in range(40)]
  records += [record(distribution=f"d{i}", line=i) for i in range(20)]
  kept = cleaning.cap_distributions(records)
  assert Counter(r.distribution for r in kept)["big"] == 3
  assert set(cleaning.cap_distributions(records[::-1])) == set(kept)


@pytest.mark.parametrize("text, share", [
    (words(0, 20), 1.0),
    (words(0, 20).upper().replace(" ", ",\n"), 1.0),
    (words(5, 20) + " other " + words(0, 10), 3 / 14),
    (words(8, 20), 0.0),
    (words(20, 40), 0.0),
    (words(0, 12), 0.0),
    ("A short one.", 1.0),
    ("A shorter one.", 0.0),
])
def test_share_of_ngrams_seen(text, share):
  seen = cleaning.NgramSet([record(words(0, 20)), record("a short ONE")])
  assert seen.seen_share(record(text)) == pytest.approx(share)


def test_code_counts_as_well_and_short_code_does_not():
  seen = cleaning.NgramSet([record(body=words(0, 14)), record(body="return self.x")])
  fresh = "Nobody has seen this docstring."
  assert seen.seen_share(record(fresh, body=words(0, 14))) == 1.0
  assert seen.seen_share(record(fresh, body="return self.x")) == 0.0
  assert seen.seen_share(record(words(0, 14), signature="class A:")) == 1.0


@given(st.lists(st.sampled_from("abc"), max_size=40), st.lists(st.sampled_from("abc"), max_size=40))
def test_ngrams_agree_with_a_set_of_tuples(train, test):
  def grams(text):
    width = min(cleaning.NGRAM, len(text))
    return [tuple(text[i : i + width]) for i in range(len(text) - width + 1)] if text else []

  seen = set(grams(train)) | set(grams(["def", "f"]))
  expected = [gram in seen for gram in grams(test)]
  found = cleaning.NgramSet([record(" ".join(train))]).seen_share(record(" ".join(test)))
  assert found == pytest.approx(sum(expected) / max(1, len(expected)))


def test_nothing_seen_is_nothing_leaked():
  assert cleaning.NgramSet([]).seen_share(record()) == 0.0
  assert cleaning.NgramSet([record()]).seen_share(dataclasses.replace(record(), docstring="")) == 0


def test_hash_is_the_same_in_another_process():
  code = "from bpd_jax.data.cleaning import stable_hash; print(stable_hash('ü'))"
  out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert int(out.stdout) == cleaning.stable_hash("ü") == 6192904641445441335
