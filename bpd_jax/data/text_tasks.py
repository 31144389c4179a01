"""Seven tasks over the records of `docstrings`: functions from a record to text pairs.

Each takes a `Record` and gives the examples that it holds, none where it isn't
fit: texts too long or too short, or not what the task is about. Lengths are
bounded in characters such that with the shipped vocabulary nearly all inputs
fit in 256 tokens and all targets in 128.
"""

from collections.abc import Callable, Mapping
import dataclasses
import io
import re
import tokenize
from types import MappingProxyType

from bpd_jax.data.cleaning import stable_hash
from bpd_jax.data.conventions import convention_of, CONVENTIONS, parse, render
from bpd_jax.data.extraction import Record
from bpd_jax.data.typing_errors import apply_edits, typing_errors

MAX_INPUT = 700
MAX_SIGNATURE = 240
MAX_CONVERTED = 340
MAX_DESCRIPTION = 110


@dataclasses.dataclass(frozen=True)
class Example:
  """One row of a task.

  Attributes:
    inputs: what the encoder reads.
    targets: what is to be written.
  """

  inputs: str
  targets: str


# A section of a docstring begins here: the summary and the opening end.
_SECTION = re.compile(
    r"^(\w[\w ]*\n-{3,}|(Args|Arguments|Returns?|Yields?|Raises|Notes?|Examples?|References|"
    r"Usage|Attributes|Parameters|Warnings?|See also):\s*$|\.\. |:\w|>>> |@)",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE = re.compile(r"[\"'`*(\[]{0,3}\w")


def docstring_summary(record: Record) -> list[Example]:
  """Signature, the rest of the docstring and as much of the body as fits → first sentence.

  The first paragraph is the target where it is one sentence on one to three
  lines; those lines are joined.
  """
  first, _, rest = record.docstring.partition("\n\n")
  lines = first.split("\n")
  summary = " ".join(first.split())
  is_sentence = (
      record.kind != "module" and len(lines) <= 3 and 20 <= len(summary) <= 200
      and len(summary.split()) >= 4 and _SENTENCE.match(summary) and not _SECTION.match(first)
      and summary.endswith((".", "!")) and not re.search(r"[.!?] [A-Z]|::|%\(|>>>", summary)
  )
  rest = _first_lines(rest.strip("\n"), 300)
  if not is_sentence or len(record.signature) > MAX_SIGNATURE or summary[:-1] in rest:
    return []
  inputs = f"summarize:\n{record.signature}"
  body = _first_lines(record.body, MAX_INPUT - len(inputs) - len(rest) - 3)
  if len(rest) + len(body) < 40:
    return []
  if body:
    inputs += f"\n{body}"
  if rest:
    inputs += f"\n\n{rest}"
  return [Example(inputs, summary)]


def docstring_qa(record: Record, most: int = 2) -> list[Example]:
  """A question on one parameter + the docstring around it → its description.

  The answer's first paragraph stands in the context, over one or more lines.

  Args:
    record: a function's or class's.
    most: questions of one record; which parameters is decided by a hash.
  """
  lines = record.docstring.split("\n")
  examples = []
  owner = record.name.removesuffix(".__init__")
  if not owner.endswith("__"):
    owner = owner.rpartition(".")[2]
  for parameter in sorted(
      record.parameters, key=lambda parameter: stable_hash(f"{record.key} {parameter.name}")
  ):
    paragraph = parameter.description.partition("\n\n")[0]
    answer = " ".join(paragraph.split())
    if not (15 <= len(answer) <= 220 and len(answer.split()) >= 3 and answer.endswith(".")
            and re.match(r"[\"'`(\[]{0,2}\w", answer)):
      continue
    # A list under a description isn't an answer in one line.
    if re.search(r"\n\s*([-*+]|\d+[.)]) ", paragraph) or "::" in answer or ">>>" in answer:
      continue
    question = f"question: what is {parameter.name} in {owner}?\ncontext:\n"
    window = _window(lines, parameter.name, paragraph, MAX_INPUT - len(question))
    if window is None or answer not in " ".join(window.split()):
      continue
    examples.append(Example(question + window, answer))
    if len(examples) == most:
      break
  return examples


def docstring_lm(record: Record) -> list[Example]:
  """The opening of a docstring → its continuation, up to the end of a sentence.

  The cut is where a line of prose begins after the end of a sentence or
  paragraph; a hash decides which of them. The two parts meet without a gap: the
  opening ends with its line break.
  """
  lines = record.docstring.split("\n")
  starts = []
  for i in range(1, len(lines)):
    opening = "".join(line + "\n" for line in lines[:i])
    if len(opening) > MAX_INPUT:
      break
    if len(opening) >= 80 and (not lines[i - 1] or lines[i - 1].endswith((".", "!", "?"))):
      continuation = _prose(lines[i:])
      if continuation:
        starts.append((opening, continuation))
  if not starts:
    return []
  opening, continuation = starts[stable_hash(record.key) % len(starts)]
  return [Example(f"continue:\n{opening}", continuation)]


def code_format(record: Record) -> list[Example]:
  """A function with its layout squeezed out → the function as written.

  Blocks are in braces and statements end with semicolons, see `squeeze`.
  Functions with comments, or with strings over several lines, are left out:
  nobody can guess where they were broken.
  """
  code = f"{record.signature}\n{record.body}"
  lines = code.split("\n")
  fits = record.kind == "function" and 3 <= len(lines) <= 14 and 90 <= len(code) <= 380
  if not fits or "\t" in code or max(map(len, lines)) > 100 or "\n\n\n" in code:
    return []
  squeezed = squeeze(code)
  return [] if squeezed is None else [Example(f"format:\n{squeezed}", code)]


def code_body(record: Record) -> list[Example]:
  """Signature and docstring → body."""
  lines = record.body.split("\n")
  fits = (
      record.kind == "function" and len(record.signature) <= MAX_SIGNATURE
      and 30 <= len(record.body) <= 320 and len(lines) <= 12 and max(map(len, lines)) <= 100
  )
  first = lines[0].strip()
  is_stub = re.match(r"(raise NotImplementedError|pass\b|\.\.\.|#)", first) or not first
  if not fits or is_stub or record.body.lstrip().startswith(('"""', "'''")):
    return []
  room = MAX_INPUT - len(record.signature) - 40
  docstring = _first_lines(record.docstring, room)
  if not docstring or '"""' in docstring:
    return []
  margin = " " * (len(lines[0]) - len(lines[0].lstrip(" ")))
  quoted = "\n".join(margin + line if line else line for line in docstring.split("\n"))
  inputs = f'implement:\n{record.signature}\n{margin}"""{quoted.lstrip()}"""'
  return [Example(inputs, record.body)]


def docstring_repair(record: Record) -> list[Example]:
  """A paragraph as somebody would type it in haste → the paragraph as written.

  Lines are joined; which of a docstring's paragraphs is decided by a hash, as is
  what goes wrong in it.
  """
  paragraphs = [
      text for paragraph in record.docstring.split("\n\n")
      if (text := _plain_paragraph(paragraph)) is not None
  ]
  if not paragraphs:
    return []
  text = paragraphs[stable_hash(f"paragraph {record.key}") % len(paragraphs)]
  edits = typing_errors(text, stable_hash(f"typing {record.key}"))
  return [Example(f"repair:\n{apply_edits(text, edits)}", text)] if edits else []


def docstring_convert(record: Record) -> list[Example]:
  """A docstring in one convention → summary and sections in each of the two others.

  Left out of both are the longer description, other sections, long or odd items, and
  the last parameters where there are too many. A docstring that says nothing
  beside the rest is the input as written.
  """
  outline = parse(record.docstring)
  if outline is None:
    return []
  convention = convention_of(record.docstring)
  parts = {
      part: tuple(item for item in items if len(" ".join(item.description)) <= MAX_DESCRIPTION)
      for part, items in outline.parts().items()
  }
  examples = []
  for to in CONVENTIONS:
    outline = dataclasses.replace(outline, **parts)
    while len(outline.parameters) > 2 and len(render(outline, to)) > MAX_CONVERTED:
      outline = dataclasses.replace(outline, parameters=outline.parameters[:-1])
    target, source = render(outline, to), render(outline, convention)
    if (
        to == convention or not outline.parameters or sum(map(len, outline.parts().values())) < 2
        or len(target) > MAX_CONVERTED or not parse(target) == outline == parse(source)
    ):
      continue
    # Indentation and blank lines are the writer's where all the words are.
    if source.split() == record.docstring.split():
      source = record.docstring
    examples.append(Example(f"convert to {to}:\n{source}", target))
  return examples


RECORD_TASKS: Mapping[str, Callable[[Record], list[Example]]] = MappingProxyType({
    task.__name__: task
    for task in (
        docstring_summary, docstring_qa, docstring_lm, code_format, code_body, docstring_repair,
        docstring_convert,
    )
})


def squeeze(code: str) -> str | None:
  """Code without its layout, on one line.

  An indented block becomes `{…}`, a statement's end `;` unless a block closes
  there, and spaces stay only between words: "def f(x):{if x:{return 1}return 2}".

  Args:
    code: a function.

  Returns:
    None where the code has comments, strings over several lines, backslashes
    at line ends, or isn't Python.
  """
  pieces: list[str] = []
  previous = ""
  try:
    for token in tokenize.generate_tokens(io.StringIO(code + "\n").readline):
      text = token.string
      if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and "\n" in text):
        return None
      if token.type == tokenize.INDENT:
        if pieces[-1] == ";":
          pieces.pop()
        text = "{"
      elif token.type == tokenize.DEDENT:
        if pieces[-1] == ";":
          pieces.pop()
        text = "}"
      elif token.type == tokenize.NEWLINE:
        text = ";"
      elif token.type in (tokenize.NL, tokenize.ENDMARKER):
        continue
      elif previous and _is_word(previous[-1]) and _is_word(text[0]):
        pieces.append(" ")
      pieces.append(text)
      previous = text
  except (tokenize.TokenError, SyntaxError):
    return None
  return None if "\\\n" in code else "".join(pieces)


def _is_word(character: str) -> bool:
  return character.isalnum() or character in "_\"'"


def _first_lines(text: str, room: int) -> str:
  """As many whole lines as fit in `room` characters, without blank ones at the end."""
  kept, size = [], 0
  for line in text.split("\n"):
    size += len(line) + 1
    if size > room:
      break
    kept.append(line)
  return "\n".join(kept).rstrip("\n")


def _window(lines: list[str], name: str, paragraph: str, room: int) -> str | None:
  """Lines around a parameter's description that fit in `room`; None where it isn't found."""
  first = " ".join(paragraph.split("\n")[0].split())
  place = next(
      (
          i for i, line in enumerate(lines)
          if " ".join(line.split()).endswith(first)
          and name.lstrip("*") in lines[i - 1] + line
      ),
      None,
  )
  if place is None:
    return None
  low, high = max(0, place - 1), min(len(lines), place + paragraph.count("\n") + 1)
  size = sum(len(line) + 1 for line in lines[low:high])
  if size > room:
    return None
  # The docstring's beginning first, then line by line on both sides.
  grew = True
  while grew:
    grew = False
    for edge in (low - 1, high):
      if 0 <= edge < len(lines) and size + len(lines[edge]) + 1 <= room:
        size += len(lines[edge]) + 1
        low, high = min(low, edge), max(high, edge + 1)
        grew = True
  return "\n".join(lines[low:high]).strip("\n")


def _prose(lines: list[str]) -> str | None:
  """The text that begins here, to the last sentence end within bounds; None if it isn't prose."""
  paragraph = []
  for line in lines:
    if not line or sum(map(len, paragraph)) + len(line) > 280:
      break
    paragraph.append(line)
  while paragraph and not paragraph[-1].endswith((".", "!", "?")):
    paragraph.pop()
  text = "\n".join(paragraph)
  letters = sum(character.isalpha() or character.isspace() for character in text)
  is_prose = (
      40 <= len(text) <= 280 and len(text.split()) >= 7 and letters >= 0.85 * len(text)
      and not re.search(r">>>|::|^\s*\.\. |^\s*[:@]|---", text, re.MULTILINE)
  )
  return text if is_prose else None


def _plain_paragraph(paragraph: str) -> str | None:
  """A paragraph of one to four sentences on one line; None where it isn't plain prose."""
  lines = paragraph.split("\n")
  text = " ".join(paragraph.split())
  letters = sum(character.isalpha() or character == " " for character in text)
  is_prose = (
      60 <= len(text) <= 280 and len(text.split()) >= 9 and letters >= 0.9 * len(text)
      and re.match(r"[A-Z]", text) and text.endswith((".", "!", "?"))
      and len(re.findall(r"[.!?] [A-Z]", text)) <= 3
      and len({len(line) - len(line.lstrip(" ")) for line in lines}) == 1
      and not any(line.endswith("-") for line in lines)
      and not _SECTION.match(text)
      and not re.search(r">>>|::|---|^\s*([-*+] |\.\. |[:@]|[\w ]+:( |$))", paragraph, re.MULTILINE)
  )
  return text if is_prose else None
