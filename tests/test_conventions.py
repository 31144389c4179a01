"""Docstrings in three conventions: read, written, and what isn't plain left out."""

import docstring_parser
import pytest

from bpd_jax.data import rows
from bpd_jax.data.conventions import convention_of, CONVENTIONS, Item, Outline, parse, render

OUTLINE = Outline(
    ("Adds two numbers,", "whatever they are."),
    (
        Item("x", "number", ("The first of them,", "of any kind.")),
        Item("**y", "", ("Second: not the first.",)),
        Item("z", "int, optional", ("Third.",)),
    ),
    (Item("", "number", ("The sum", "of all.")),),
    (Item("errors.ValueError", "", ("If there is none.",)),),
)
TEXTS = {
    "numpy": """\
Adds two numbers,
whatever they are.

Parameters
----------
x : number
    The first of them,
    of any kind.
**y
    Second: not the first.
z : int, optional
    Third.

Returns
-------
number
    The sum
    of all.

Raises
------
errors.ValueError
    If there is none.""",
    "google": """\
Adds two numbers,
whatever they are.

Args:
    x (number): The first of them,
        of any kind.
    **y: Second: not the first.
    z (int, optional): Third.

Returns:
    number: The sum
        of all.

Raises:
    errors.ValueError: If there is none.""",
    "rest": """\
Adds two numbers,
whatever they are.

:param x: The first of them,
    of any kind.
:type x: number
:param **y: Second: not the first.
:param z: Third.
:type z: int, optional
:returns: The sum
    of all.
:rtype: number
:raises errors.ValueError: If there is none.""",
}
STYLES = {"numpy": "NUMPYDOC", "google": "GOOGLE", "rest": "REST"}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_each_is_written_and_read(convention):
  assert render(OUTLINE, convention) == TEXTS[convention]
  assert parse(TEXTS[convention]) == OUTLINE
  assert convention_of(TEXTS[convention]) == convention


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_docstring_parser_reads_the_same(convention):
  style = docstring_parser.DocstringStyle[STYLES[convention]]
  found = docstring_parser.parse(TEXTS[convention], style)
  assert [(param.arg_name, param.description) for param in found.params] == [
      (item.name, "\n".join(item.description)) for item in OUTLINE.parameters
  ]
  assert (found.returns.type_name, found.returns.description) == ("number", "The sum\nof all.")
  assert [error.type_name for error in found.raises] == ["errors.ValueError"]


@pytest.mark.parametrize("docstring, expected", [
    # Longer descriptions and other sections are left out.
    ("Adds.\n\nA lot.\n\nArgs:\n  x: One.\n\nExample:\n  Two.\n\nMore.", ("x",)),
    ("Adds.\n\nParameters\n----------\nx\n    One.\n\nNotes\n-----\ny : int\n    No.", ("x",)),
    ("Adds.\n\n:param x: One.\n\nMore of it.", ("x",)),
    # So are items that aren't plain.
    ("Adds.\n\nArgs:\n  x: One.\n\n    Two.\n  y: Three.", ("y",)),
    ("Adds.\n\nArgs:\n  x: One:\n    - two\n  y: Three.", ("y",)),
    ("Adds.\n\nParameters\n----------\nx, y : int\n    Both.\nz\n    One.\na", ("z",)),
    ("Adds.\n\nParameters\n----------\nx : {1: 2}\n    Maps.\ny\n    One.", ("y",)),
    ("Adds.\n\n:param int x: One.\n:keyword y: Two.", None),
    ("Adds.\n\n:param int x: One.\n:type z: int", None),
    ("Adds.\n\nArgs:\n  no colon", None),
    ("Adds.\n\nArgs:\n  x: One.\n\nArgs:\n  y: Two.", None),
    ("Adds.", None),
    ("Args:\n  x: No summary.", None),
    ("Adds.\n\nReturns:\n  The sum.", None),
])
def test_what_is_read(docstring, expected):
  outline = parse(docstring)
  assert (outline and tuple(item.name for item in outline.parameters)) == expected


@pytest.mark.parametrize("returns, expected", [
    ("s : int\n    Sum.", ()),
    ("int\n    Sum.\nint\n    Rest.", ()),
    ("int\n    Sum.", (Item("", "int", ("Sum.",)),)),
])
def test_returned_values_without_a_name_are_read(returns, expected):
  docstring = f"Adds.\n\nParameters\n----------\nx\n    One.\n\nReturns\n-------\n{returns}"
  assert parse(docstring).returns == expected


def test_a_type_in_the_field_itself_is_read():
  assert parse("Adds.\n\n:param int x: One.").parameters == (Item("x", "int", ("One.",)),)


@pytest.mark.parametrize("split", rows.NUM_ROWS)
def test_shipped_targets_say_what_their_inputs_do(split):
  for row in rows.load_rows("docstring_convert", split):
    instruction, _, docstring = row["inputs"].partition(":\n")
    to = instruction.removeprefix("convert to ")
    outline = parse(docstring)
    assert convention_of(docstring) != to == convention_of(row["targets"])
    assert render(outline, to) == row["targets"] and parse(row["targets"]) == outline
    found = docstring_parser.parse(row["targets"], docstring_parser.DocstringStyle[STYLES[to]])
    assert [(param.arg_name, param.description) for param in found.params] == [
        (item.name, "\n".join(item.description)) for item in outline.parameters
    ]
