"""What is printed is what was given, whatever brackets and colons are in it."""

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bpd_jax import terminal
from bpd_jax.training.metrics import Display, shown

ROOT = Path(__file__).resolve().parent.parent
# Closing what wasn't opened is an error to rich, an unknown tag is left out.
ODD = ["run[x]", "[a]/[/b]", "[bold]b[/bold]", r"\[x]", ":smile:", "{braces}", "[link=x]y"]


def console(**options):
  return terminal.plain_console(file=io.StringIO(), width=100, **options)


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_texts_are_printed_as_they_are(text, is_terminal):
  out = console(force_terminal=is_terminal)
  out.print(text)
  out.rule(text)
  table = Table(text, title=text, caption=text)
  table.add_row(text)
  out.print(table)
  columns = terminal.description_column(), terminal.description_column(40)
  with Progress(*columns, console=out) as progress:
    progress.add_task(text)
  assert list(terminal.track([1, 2], text, out)) == [1, 2]
  printed = out.file.getvalue()
  assert list(terminal.track([1, 2], text, out, is_shown=False)) == [1, 2]
  assert out.file.getvalue() == printed
  assert printed.startswith(text + "\n")
  assert printed.count(text) >= 8


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_runs_display_prints_names_as_they_are(text, is_terminal):
  out = console(force_terminal=is_terminal)
  with Display(10, out) as display:
    display.say(text)
    display.report(1, {text: 1.0}, 5.0)
    display.evaluation(1, {text: 1.0})
  assert list(shown([1], text, out)) == [1]
  # On a terminal the bars are drawn several times.
  assert out.file.getvalue().count(text) >= 4


def test_every_console_and_description_is_a_plain_one():
  """No module makes its own: rich's read markup unless each is told not to."""
  def is_plain(name, call):
    # A word of the program's own is no text of anybody's.
    words = [text.value for text in call.args if isinstance(text, ast.Constant)]
    return name == "TextColumn" and words and "{task.description" not in words[0]

  paths = [path for folder in ("bpd_jax", "experiments") for path in ROOT.glob(f"{folder}/**/*.py")]
  assert len(paths) > 80
  wrong = []
  for path in sorted(paths):
    if path.name == "terminal.py":
      continue
    tree = ast.parse(path.read_text(encoding="utf-8"))
    from_rich = {
        alias.asname or alias.name for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich")
        for alias in node.names
    }
    for node in ast.walk(tree):
      name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
      makes_one = name in from_rich & {"Console", "TextColumn", "track"}
      if makes_one and not is_plain(name, node):
        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
  assert not wrong
  # What it would miss otherwise.
  assert Console().render_str("[a]x").plain == "x"
