"""What each task makes of a record, character for character."""

import re

import pytest

from bpd_jax.data import rows
from bpd_jax.data.extraction import Parameter, Record
from bpd_jax.data.text_tasks import (
    code_body,
    code_format,
    docstring_lm,
    docstring_qa,
    docstring_summary,
    Example,
    MAX_INPUT,
    squeeze,
)

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


@pytest.mark.parametrize("split", ["validation", "test"])
def test_shipped_code_differs_from_its_squeezed_form_in_layout_alone(split):
  def letters(text):
    return re.sub(r"[\s;{}]", "", text)

  for row in rows.load_rows("code_format", split):
    assert letters(row["inputs"].removeprefix("format:\n")) == letters(
        re.sub(r"\n\s*", "", row["targets"])
    )
