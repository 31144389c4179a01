"""What each task makes of a record, character for character."""

import re

import pytest

from bpd_jax.data import rows
from bpd_jax.data.extraction import Parameter, Record
from bpd_jax.data.text_tasks import (
    code_body,
    code_format,
    docstring_convert,
    docstring_lm,
    docstring_qa,
    docstring_repair,
    docstring_summary,
    Example,
    MAX_CONVERTED,
    MAX_INPUT,
    squeeze,
)
from bpd_jax.evaluation.quality import edit_similarity

DOCSTRING = """\
Return the sum of two numbers,
whatever they are.

Numbers of different kinds are converted before they are added up.
The kind of the result is that of the wider one. It does not matter
which of the two comes first.

Parameters
----------
x : number
    The first of the two numbers,
    of any kind.

    Other things than numbers fail.
y : number
    Second."""
RECORD = Record(
    "dist", "a.py", 3, "Adder.add", "function", "def add(x, y):",
    "    total = x\n    total += y\n    return total",
    DOCSTRING,
    (
        Parameter("x", "The first of the two numbers,\nof any kind.\n\nOther things fail."),
        Parameter("y", "Second."),
    ),
)


def with_(**fields):
  return Record(**RECORD.__dict__ | fields)


def test_summary():
  rest = DOCSTRING.partition("\n\n")[2][:300]
  rest = rest[: rest.rindex("\n")]
  assert docstring_summary(RECORD) == [Example(
      f"summarize:\ndef add(x, y):\n    total = x\n    total += y\n    return total\n\n{rest}",
      "Return the sum of two numbers, whatever they are.",
  )]


def test_summary_cuts_the_body_at_lines_to_fit():
  body = "\n".join(f"    line_{i} = {i}" for i in range(100))
  [example] = docstring_summary(with_(body=body, docstring="Return one hundred lines."))
  assert MAX_INPUT - 20 < len(example.inputs) <= MAX_INPUT
  assert f"{body}\n".startswith(example.inputs.removeprefix("summarize:\ndef add(x, y):\n") + "\n")


@pytest.mark.parametrize("first", [
    "Return it.",
    "Return the sum of two numbers",
    "Return the sum. Then forget all about it.",
    "Parameters\n----------\nx : int that is added.",
    "Args:\n  x: is a number to add.",
    "Return the sum of two numbers, as in::",
    "\n".join(["Return the sum", "of two", "numbers", "on four lines."]),
])
def test_first_paragraphs_that_are_no_summary(first):
  assert docstring_summary(with_(docstring=f"{first}\n\n{'The rest of it. ' * 5}")) == []


def test_summary_that_is_said_again_is_no_task():
  docstring = "Return the sum of two numbers.\n\nNote: return the sum of two numbers, both of them."
  assert len(docstring_summary(with_(docstring=docstring))) == 1
  assert docstring_summary(with_(docstring=docstring.replace("return", "Return"))) == []


def test_summary_needs_something_to_read():
  assert docstring_summary(with_(docstring="Return the sum of two numbers.", body="")) == []


def test_question():
  assert docstring_qa(RECORD) == [Example(
      f"question: what is x in add?\ncontext:\n{DOCSTRING}",
      "The first of the two numbers, of any kind.",
  )]


def test_context_of_a_question_is_cut_around_the_answer():
  many = [(f"arg{i:02}", f"    The value number {i:02} of them.") for i in range(40)]
  docstring = "Takes many.\n\nParameters\n----------\n" + "\n".join(
      f"{name} : int\n{text}" for name, text in many
  )
  record = with_(
      docstring=docstring, parameters=tuple(Parameter(name, text.strip()) for name, text in many)
  )
  examples = docstring_qa(record, most=40)
  assert len(examples) == 40
  for example in examples:
    question, context = example.inputs.split("\ncontext:\n")
    assert context in docstring
    assert MAX_INPUT - 60 < len(example.inputs) <= MAX_INPUT
    name = re.search(r"what is (\w+) in add", question)[1]
    assert f"{name} : int\n    {example.targets}" in context
  assert len(docstring_qa(record)) == 2


@pytest.mark.parametrize("description", [
    "Not said in the docstring.", "The first of the two numbers,\nbut this isn't said."
])
def test_answer_that_is_not_in_the_docstring_is_not_asked_for(description):
  assert docstring_qa(with_(parameters=(Parameter("x", description),))) == []


def test_continuation_meets_its_opening():
  prose = DOCSTRING.split("\n\n")[1]
  [example] = docstring_lm(RECORD)
  opening = example.inputs.removeprefix("continue:\n")
  assert example.targets in (prose, prose.split("\n", 1)[1])
  assert DOCSTRING.startswith(opening + example.targets)
  assert docstring_lm(with_(docstring=f"Sums.\n\n>>> add(1, 2)\n3\n{'>>> add(3, 4)' * 20}")) == []


def test_format():
  assert code_format(with_(body="    if x:\n        return [x,\n                y]\n    return y"
                                "  + x\n\n    # nothing")) == []
  code = "    if x is not None:\n        return [x,\n                y]\n\n    return y + x"
  assert code_format(with_(body=code)) == [Example(
      "format:\ndef add(x,y):{if x is not None:{return[x,y]}return y+x}",
      f"def add(x, y):\n{code}",
  )]


@pytest.mark.parametrize("code, squeezed", [
    ("def f():\n  pass", "def f():{pass}"),
    ("def f():\n  for x in y:\n    if x:\n      a = 'b  c'\n  return a",
     "def f():{for x in y:{if x:{a='b  c'}}return a}"),
    ("def f():\n  if x: return not y\n  return 'a' in f'{x}'",
     "def f():{if x:return not y;return 'a' in f'{x}'}"),
    ("def f(\n    x: int = 1,\n) -> int:\n  return {1: 2}", "def f(x:int=1,)->int:{return{1:2}}"),
    ("def f():\n  return 1  # one", None),
    ("def f():\n  return '''a\nb'''", None),
    ("def f():\n  return 1 + \\\n      2", None),
    ("def f(:\n  (", None),
])
def test_squeeze(code, squeezed):
  assert squeeze(code) == squeezed


def test_body():
  [example] = code_body(with_(docstring="Adds.\n\n  Two numbers."))
  assert example == Example(
      'implement:\ndef add(x, y):\n    """Adds.\n\n      Two numbers."""',
      "    total = x\n    total += y\n    return total",
  )
  for body in ("    raise NotImplementedError('later, when there is time')", "    pass",
               "    # Nothing is done here, nothing at all", "    return x"):
    assert code_body(with_(body=body)) == []


def test_repair():
  first, second = (
      "Return the sum of two numbers, whatever they are.",
      "Numbers of different kinds are converted before they are added up. The kind of the result "
      "is that of the wider one. It does not matter which of the two comes first.",
  )
  # The first paragraph is too short, so the second is it; what goes wrong is the record's.
  [example] = docstring_repair(RECORD)
  assert len(first) < 60 and example.targets == second
  assert example == docstring_repair(RECORD)[0]
  [other] = docstring_repair(with_(line=4))
  assert other.targets == second and len({example.inputs, other.inputs, second}) == 3
  assert example.inputs.startswith("repair:\n")
  # Letters are lost, doubled, changed or moved, one by one.
  assert 0.9 < edit_similarity(f"repair:\n{second}", example.inputs) < 1


def test_repair_chooses_one_of_the_paragraphs():
  one = "One of the paragraphs is this, which is about nothing in particular."
  two = "Two of the paragraphs are there, but only one of them is ever chosen."
  found = {docstring_repair(with_(line=i, docstring=f"{one}\n\n{two}"))[0].targets
           for i in range(20)}
  assert found == {one, two}


@pytest.mark.parametrize("docstring", [
    "Is too short for a paragraph to be repaired.",
    "this one begins in the middle of a sentence, and nobody knows where it began.",
    "This one has no end of a sentence where there should be one, only a comma,",
    "This has code in it:: and that is nothing that anybody would repair by hand.",
    "- This is an item of a list, which isn't a paragraph of prose, as it seems.",
    "value: This is what is said of a parameter, which isn't a paragraph of prose.",
    "This paragraph has lines of which\n  one is indented, so that it may well be a list.",
    "This is (1, 2), [3], {4: 5}, <6>, x_7, y[8], 9 + 10 == 19, and so on, and so forth.",
    "This one has many sentences. Here is one. And here is one. There it is. One more here.",
    "This is a para-\ngraph with a word that is broken at the end of the line above it.",
])
def test_paragraphs_that_nobody_repairs(docstring):
  assert docstring_repair(with_(docstring=docstring)) == []


def test_convert():
  docstring = (
      "Return the sum of two numbers,\nwhatever they are.\n\nArgs:\n  x (int): The first,\n"
      "    of them.\n\n  y: Second.\n\nRaises:\n  TypeError: For others."
  )
  numpy = Example(
      f"convert to numpy:\n{docstring}",
      "Return the sum of two numbers,\nwhatever they are.\n\nParameters\n----------\nx : int\n"
      "    The first,\n    of them.\ny\n    Second.\n\nRaises\n------\nTypeError\n    For others.",
  )
  rest = Example(
      f"convert to rest:\n{docstring}",
      "Return the sum of two numbers,\nwhatever they are.\n\n:param x: The first,\n    of them.\n"
      ":type x: int\n:param y: Second.\n:raises TypeError: For others.",
  )
  # With nothing left out the input is as written, two spaces and blank line included.
  assert docstring_convert(with_(docstring=docstring)) == [numpy, rest]
  # With something left out it is written anew.
  longer = docstring.replace("\n\nArgs", "\n\nThey may be large.\n\nArgs")
  again = docstring.replace("\n\n  y", "\n  y").replace("  ", "    ")
  assert docstring_convert(with_(docstring=longer)) == [
      Example(f"convert to {to}:\n{again}", example.targets)
      for to, example in (("numpy", numpy), ("rest", rest))
  ]


def test_convert_leaves_out_what_is_long_and_what_is_too_much():
  many = "\n".join(f":param value{i:02}: The value number {i:02} of them." for i in range(20))
  docstring = f"Takes many.\n\n:param long: {'Much is said. ' * 10}\n{many}\n:returns: All."
  for example in docstring_convert(with_(docstring=docstring)):
    assert MAX_CONVERTED - 60 < len(example.targets) <= MAX_CONVERTED
    for text in (example.inputs, example.targets):
      assert "long" not in text and "All." in text
      assert [f"value{i:02}" in text for i in range(20)] == sorted(
          (f"value{i:02}" in text for i in range(20)), reverse=True
      )
    assert set(re.findall(r"value\d+", example.inputs)) == set(
        re.findall(r"value\d+", example.targets)
    )


@pytest.mark.parametrize("docstring", [
    DOCSTRING.replace("    Second.", "    Second: a:\n    - b"),
    "Takes one.\n\n:param x: The one.",
    # "int" would be read as a type.
    "Takes one.\n\n:param x: The one.\n:returns: int: or not.",
    "Takes none, and says so.",
])
def test_docstrings_that_are_not_converted(docstring):
  assert docstring_convert(with_(docstring=docstring)) == []


@pytest.mark.parametrize("split", ["validation", "test"])
def test_shipped_code_differs_from_its_squeezed_form_in_layout_alone(split):
  def letters(text):
    return re.sub(r"[\s;{}]", "", text)

  for row in rows.load_rows("code_format", split):
    assert letters(row["inputs"].removeprefix("format:\n")) == letters(
        re.sub(r"\n\s*", "", row["targets"])
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_shipped_repairs_are_of_what_is_written_with_something_wrong(split):
  found = rows.load_rows("docstring_repair", split)
  changed = []
  for row in found:
    typed, text = row["inputs"].removeprefix("repair:\n"), row["targets"]
    # No word is lost or made up: letters and spaces change one by one.
    assert typed != text and abs(len(typed) - len(text)) <= 0.15 * len(text)
    changed.append(1 - edit_similarity(text, typed))
    assert changed[-1] < 0.25
    for code in re.findall(r"`\w+`|\w+\(\)|\w*_\w*", text):
      assert code in typed
  assert min(changed) < 0.02 and max(changed) > 0.12
