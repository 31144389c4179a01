"""Docstrings of a Python source with the code that they describe, by `ast`."""

import ast
from collections.abc import Iterator
import dataclasses
import inspect
import re
from typing import Any
import warnings

from bpd_jax.data.sources import is_generated


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One entry of a docstring's list of parameters; `name` as written, stars included."""

  name: str
  description: str


@dataclasses.dataclass(frozen=True)
class Record:
  """A docstring and its code, both as written but moved to column 0.

  Attributes:
    distribution: where it is from; "python" is the standard library.
    path: file, from the folder that packages are installed in.
    line: of the `def` or `class`; 0 for a module.
    name: qualified inside its module, "" for the module.
    kind: "function", "class" or "module".
    signature: from `def` or `class` to the colon, without decorators; "" for a module.
    body: what follows the docstring; "" for classes and modules.
    docstring: cleaned as by `inspect.cleandoc`, without spaces at line ends.
    parameters: of functions and classes, in their order.
  """

  distribution: str
  path: str
  line: int
  name: str
  kind: str
  signature: str
  body: str
  docstring: str
  parameters: tuple[Parameter, ...] = ()

  @property
  def key(self) -> str:
    """Unique in a corpus."""
    return f"{self.distribution}/{self.path}:{self.line}"

  def to_dict(self) -> dict[str, Any]:
    """Plain fields, as the TFDS builder yields them."""
    return dataclasses.asdict(self) | {"parameters": list(map(dataclasses.asdict, self.parameters))}

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "Record":
    """The inverse of `to_dict`."""
    parameters = tuple(Parameter(**parameter) for parameter in fields["parameters"])
    return cls(**fields | {"parameters": parameters})


# What a docstring is too short or too odd without, and characters that no text has:
# controls, replacement character, and SentencePiece's sign for a space.
MIN_CHARACTERS = 12
_ODD_CHARACTERS = re.compile(r"[^\S \n]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u2581\ufffd]")
# A line that only stands for text put in at run time: "%(params)s", "{doc}", "##".
_PLACEHOLDER = re.compile(r"^ *(%\([^)]*\)s|\{\w+\}|##+) *\n?", re.MULTILINE)

_STYLES = (
    (re.compile(r"^Parameters\s*\n-{3,}", re.MULTILINE), "NUMPYDOC"),
    (re.compile(r"^(Args|Arguments|Parameters):\s*$", re.MULTILINE), "GOOGLE"),
    (re.compile(r"^:param ", re.MULTILINE), "REST"),
)


def extract(distribution: str, path: str, content: bytes) -> list[Record]:
  """Records of a source, in order of their lines.

  Args:
    distribution: for the records.
    path: for the records.
    content: the file. What isn't Python in UTF-8, or is generated, has none.
  """
  try:
    source = content.decode("utf-8-sig").replace("\r\n", "\n")
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Escapes such as "\d" in other people's strings.
      tree = ast.parse(source)
  except (SyntaxError, ValueError):
    return []
  if is_generated(source):
    return []
  lines = source.split("\n")
  records = []
  for name, node in _documented(tree, ""):
    docstring = _clean(node.body[0].value.value)
    if docstring is None:
      continue
    if isinstance(node, ast.Module):
      code = ("module", "", "")
    else:
      code = _code(node, lines)
    if code is None:
      continue
    kind, signature, body = code
    records.append(Record(
        distribution=distribution, path=path, line=getattr(node, "lineno", 0), name=name,
        kind=kind, signature=signature, body=body, docstring=docstring,
        parameters=() if kind == "module" else parse_parameters(docstring),
    ))
  return records


def parse_parameters(docstring: str) -> tuple[Parameter, ...]:
  """Parameters that a docstring describes in Google's, NumPy's or reST's style."""
  # Records are read in places that have no parser of docstrings.
  import docstring_parser

  for pattern, style in _STYLES:
    if pattern.search(docstring):
      try:
        parsed = docstring_parser.parse(docstring, docstring_parser.DocstringStyle[style])
      except docstring_parser.ParseError:
        return ()
      return tuple(
          Parameter(param.arg_name, param.description.strip())
          for param in parsed.params
          # "attribute" sections list fields, not parameters.
          if param.args[0] in ("param", "arg", "argument", "parameter", "other_param")
          and param.arg_name and param.description and param.description.strip()
      )
  return ()


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, Any]]:
  """Nodes with a docstring and their qualified names, outer before inner."""
  if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
    if not isinstance(node, ast.Module):
      prefix = f"{prefix}.{node.name}" if prefix else node.name
    if ast.get_docstring(node, clean=False) is not None:
      yield prefix, node
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.stmt | ast.ExceptHandler):
      yield from _documented(child, prefix)


def _clean(docstring: str) -> str | None:
  """The docstring as it is shown; None where it isn't a text to learn from."""
  text = inspect.cleandoc(docstring)
  text = _PLACEHOLDER.sub("", text)
  text = "\n".join(line.rstrip(" ") for line in text.split("\n")).strip()
  text = re.sub(r"\n{3,}", "\n\n", text)
  if len(text) < MIN_CHARACTERS or _ODD_CHARACTERS.search(text):
    return None
  return text


def _code(node: Any, lines: list[str]) -> tuple[str, str, str] | None:
  """Kind, signature and body of a node; None where the layout is unusual."""
  docstring = node.body[0]
  head = lines[node.lineno - 1 : docstring.lineno - 1]
  rest = lines[docstring.end_lineno : node.end_lineno]
  is_function = not isinstance(node, ast.ClassDef)
  shares_line = len(node.body) > 1 and node.body[1].lineno <= docstring.end_lineno
  signature = _dedent(head, node.col_offset)
  if shares_line or not signature.endswith(":"):
    return None
  body = _dedent(rest, node.col_offset) if is_function else ""
  if _ODD_CHARACTERS.search(signature) or _ODD_CHARACTERS.search(body):
    return None
  return ("function" if is_function else "class"), signature, body


def _dedent(lines: list[str], column: int) -> str:
  """Lines moved left by `column` where they begin with as many spaces."""
  margin = " " * column
  return "\n".join(line.removeprefix(margin).rstrip(" ") for line in lines).strip("\n")
