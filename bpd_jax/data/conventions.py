"""What a docstring says of parameters, returned value and exceptions, in three conventions.

`parse` reads Google's, NumPy's and reST's (Sphinx's fields), `render` writes them,
and what they say alike is an `Outline`:

  parse(render(outline, convention)) == outline

unless something reads otherwise in one of them, such as a type in Google's "Returns",
where a sentence may stand as well; who converts checks that. Only the plain form of
each is read: a description of one paragraph, and at most one returned value, which
has no name.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Item:
  """A parameter, a returned value or an exception.

  Attributes:
    name: of the parameter, stars included, or the exception; "" for a returned value.
    type: as written, "" where none is; an exception has none.
    description: its lines, moved to column 0.
  """

  name: str
  type: str
  description: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outline:
  """A docstring without its longer description.

  Attributes:
    summary: lines of the first paragraph.
    parameters: in their order.
    returns: one or none.
    raises: in their order.
  """

  summary: tuple[str, ...]
  parameters: tuple[Item, ...]
  returns: tuple[Item, ...] = ()
  raises: tuple[Item, ...] = ()

  def parts(self) -> dict[str, tuple[Item, ...]]:
    """Its lists of items."""
    return {"parameters": self.parameters, "returns": self.returns, "raises": self.raises}


_NAME = re.compile(r"\*{0,2}[A-Za-z_]\w*")
_NO_NAME = re.compile("")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*")
# What may stand before the colon of Google's "Returns", where a sentence may as well.
_RETURNED_TYPE = re.compile(r"[A-Za-z_][\w.]*(\[[^\]\n:]*\])?( or [A-Za-z_][\w.]*)?")
_PARTS = MappingProxyType({
    "Args": "parameters", "Arguments": "parameters", "Parameters": "parameters",
    "Returns": "returns", "Return": "returns", "Raises": "raises",
})
_NUMPY_HEADER = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
_GOOGLE_HEADER = re.compile(r"^([A-Z][\w ]*):$", re.MULTILINE)
_REST_FIELD = re.compile(r"^:(\w+)(?: ([^:\n]+))?:(?: (.*))?$")
# A list, a directive, an example, a table or a field isn't a paragraph.
_NO_PROSE = re.compile(r"([-*+•] |\d+[.)] |\.\. |>>>|[|+=]|:\w+ ?[^`]*:( |$))|.*::$")


def parse(docstring: str) -> Outline | None:
  """Reads a docstring in whichever convention it is.

  Longer description and other sections are left out, and so is what isn't in
  plain form.

  Returns:
    None where no parameter is left.
  """
  for read in _READERS.values():
    if (outline := read(docstring)) is not None:
      return outline
  return None


def render(outline: Outline, convention: str) -> str:
  """Writes an outline in one of `CONVENTIONS`."""
  return "\n\n".join(["\n".join(outline.summary), *_RENDERERS[convention](outline)])


def convention_of(docstring: str) -> str | None:
  """The convention in which `parse` reads a docstring; None where it doesn't."""
  return next((name for name, read in _READERS.items() if read(docstring) is not None), None)


def _outline(head: str, parts: Mapping[str, Sequence[Item]]) -> Outline | None:
  """From the text before all sections and what is in them; None where it isn't plain."""
  summary = tuple(head.strip("\n").partition("\n\n")[0].split("\n"))
  parameters, returns, raises = (
      tuple(item for item in parts.get(part, ()) if _is_plain(item) and is_name(item.name))
      for part, is_name in (
          ("parameters", _NAME.fullmatch), ("returns", _NO_NAME.fullmatch),
          ("raises", _EXCEPTION.fullmatch),
      )
  )
  # Only NumPy's can say several values, or name one.
  if len(parts.get("returns", ())) > 1:
    returns = ()
  is_plain = summary[0] and not any(
      line.startswith(" ") or _NO_PROSE.match(line) for line in summary
  )
  return Outline(summary, parameters, returns, raises) if is_plain and parameters else None


def _is_plain(item: Item) -> bool:
  """Whether a description is one paragraph, and the type one that no reader cuts at a colon."""
  return bool(item.description) and ":" not in item.type and not any(
      not line or line.startswith(" ") or _NO_PROSE.match(line) for line in item.description
  )


def _read_numpy(docstring: str) -> Outline | None:
  headers = list(_NUMPY_HEADER.finditer(docstring))
  if not headers:
    return None
  parts = {}
  for header, following in zip(headers, [*headers[1:], None]):
    part = _PARTS.get(header[1])
    if part is None:
      continue
    body = docstring[header.end() : following.start() if following else None].strip("\n")
    items = []
    for lines in _blocks(body.split("\n")):
      name, _, kind = lines[0].partition(" : ")
      if part == "returns" and not kind:
        name, kind = "", name
      items.append(Item(name.strip(), kind.strip(), _moved(lines[1:])))
    if part in parts:
      return None
    parts[part] = items
  return _outline(docstring[: headers[0].start()], parts)


def _read_google(docstring: str) -> Outline | None:
  headers = [header for header in _GOOGLE_HEADER.finditer(docstring) if header[1] in _PARTS]
  if not headers:
    return None
  parts = {}
  for header in headers:
    part = _PARTS[header[1]]
    lines = []
    for line in docstring[header.end() + 1 :].split("\n"):
      if line and not line.startswith(" "):
        break
      lines.append(line)
    body = "\n".join(_moved(lines)).strip("\n").split("\n")
    if part == "returns":
      kind, colon, rest = body[0].partition(": ")
      is_typed = bool(colon) and _RETURNED_TYPE.fullmatch(kind)
      if is_typed:
        body = [rest, *_moved(body[1:])]
      items = [Item("", kind if is_typed else "", tuple(body))]
    else:
      items = []
      for block in _blocks(body):
        match = re.fullmatch(r"(\S+?)(?: \((.*)\))?: (.*)", block[0])
        if match is None or (part == "raises" and match[2]):
          return None
        items.append(Item(match[1], match[2] or "", (match[3], *_moved(block[1:]))))
    if part in parts:
      return None
    parts[part] = items
  return _outline(docstring[: headers[0].start()], parts)


def _read_rest(docstring: str) -> Outline | None:
  lines = docstring.split("\n")
  start = next((i for i, line in enumerate(lines) if _REST_FIELD.match(line)), None)
  if start is None:
    return None
  types, parameters, returns, raises = {}, [], [], []
  end = next((i for i in range(start, len(lines)) if lines[i][:1] not in ("", " ", ":")), None)
  for block in _blocks([line for line in lines[start:end] if line]):
    match = _REST_FIELD.match(block[0])
    if match is None:
      return None
    field, argument, text = match[1], match[2] or "", match[3] or ""
    description = tuple(line for line in (text, *_moved(block[1:])) if line)
    if field == "param":
      kind, _, name = argument.rpartition(" ")
      parameters.append(Item(name, kind, description))
    elif field == "type":
      types[argument] = " ".join(description)
    elif field in ("return", "returns") and not argument:
      returns.append(Item("", "", description))
    elif field == "rtype":
      types[""] = " ".join(description)
    elif field in ("raise", "raises"):
      raises.append(Item(argument, "", description))
    else:
      return None
  if set(types) - {item.name for item in (*parameters, *returns)}:
    return None
  parameters, returns = (
      [dataclasses.replace(item, type=types.get(item.name, item.type)) for item in items]
      for items in (parameters, returns)
  )
  parts = {"parameters": parameters, "returns": returns, "raises": raises}
  return _outline("\n".join(lines[:start]), parts)


def _render_numpy(outline: Outline) -> list[str]:
  sections = []
  for title, items in _titled(outline, "Parameters"):
    lines = [title, "-" * len(title)]
    for item in items:
      lines.append(" : ".join(part for part in (item.name, item.type) if part))
      lines += [f"    {line}" for line in item.description]
    sections.append("\n".join(lines))
  return sections


def _render_google(outline: Outline) -> list[str]:
  sections = []
  for title, items in _titled(outline, "Args"):
    lines = [f"{title}:"]
    for item in items:
      if item.name:
        head = f"{item.name} ({item.type}): " if item.type else f"{item.name}: "
      else:
        head = f"{item.type}: " if item.type else ""
      first, *others = item.description
      lines.append(f"    {head}{first}")
      lines += [f"    {'    ' if head else ''}{line}" for line in others]
    sections.append("\n".join(lines))
  return sections


def _render_rest(outline: Outline) -> list[str]:
  lines = []

  def field(name: str, text: Sequence[str]) -> None:
    lines.append(f":{name}: {text[0]}")
    lines.extend(f"    {line}" for line in text[1:])

  for item in outline.parameters:
    field(f"param {item.name}", item.description)
    if item.type:
      field(f"type {item.name}", [item.type])
  for item in outline.returns:
    field("returns", item.description)
    if item.type:
      field("rtype", [item.type])
  for item in outline.raises:
    field(f"raises {item.name}", item.description)
  return ["\n".join(lines)]


def _titled(outline: Outline, parameters: str) -> list[tuple[str, Sequence[Item]]]:
  parts = (
      (parameters, outline.parameters), ("Returns", outline.returns), ("Raises", outline.raises)
  )
  return [(title, items) for title, items in parts if items]


def _blocks(lines: Sequence[str]) -> list[list[str]]:
  """Lines at column 0, each with the indented and blank ones below it."""
  blocks = []
  for line in lines:
    if blocks and (not line or line.startswith(" ")):
      blocks[-1].append(line)
    elif line:
      blocks.append([line])
  return blocks


def _moved(lines: Sequence[str]) -> tuple[str, ...]:
  """Lines moved left by the first one's margin, without blank ones at the end."""
  lines = list(lines)
  while lines and not lines[-1]:
    lines.pop()
  margin = len(lines[0]) - len(lines[0].lstrip(" ")) if lines else 0
  return tuple(line.removeprefix(" " * margin) for line in lines)


_READERS: Mapping[str, Callable[[str], Outline | None]] = MappingProxyType(
    {"numpy": _read_numpy, "google": _read_google, "rest": _read_rest}
)
_RENDERERS: Mapping[str, Callable[[Outline], list[str]]] = MappingProxyType(
    {"numpy": _render_numpy, "google": _render_google, "rest": _render_rest}
)
CONVENTIONS = tuple(_RENDERERS)
