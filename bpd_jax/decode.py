"""Decodes prompts with a model folder, and shows what every call drafted.

  python -m bpd_jax.decode --checkpoint models/docstrings --show-drafts "continue: …"
  python -m bpd_jax.decode --checkpoint models/docstrings --file prompts.txt
  … | python -m bpd_jax.decode --checkpoint models/docstrings

A file or standard input has a prompt a line; with `--field NAME` a line is a JSON
object that has the prompt in a field.
"""

import argparse
from collections.abc import Sequence
import io
import re
import sys

from rich.console import Console, CONSOLE_SVG_FORMAT
from rich.text import Text

from bpd_jax.data.jsonl import decode_text, parse_jsonl, read_text, text_lines
from bpd_jax.errors import InputError
from bpd_jax.evaluation.drafting import Draft
from bpd_jax.evaluation.policing import GoodputSource
from bpd_jax.folders import local_path
from bpd_jax.generation import Call, Generation, load, naming_prompts
from bpd_jax.launch import Parser, run
from bpd_jax.partitioning import make_partitioning, Partitioning, single_device
from bpd_jax.terminal import plain_console
from bpd_jax.vocabulary import Vocabulary

PROMPT_WIDTH = 70
# In a pipe there are no colours, so that a character says the same.
ACCEPTED, REJECTED, BASE = ("+", "green"), ("-", "red"), ("=", "bold")
LEGEND = "# call, accepted/drafted: + accepted, = the base model's own choice, - rejected"


def read_prompts(
    prompts: Sequence[str], file: str | None, field: str | None
) -> dict[str, str]:
  """Prompts from the command line, a file or standard input.

  Args:
    prompts: those on the command line.
    file: a path; standard input where this and `prompts` are empty.
    field: of a JSON object, one a line; None where each line is a prompt.

  Returns:
    Prompts by where each comes from, for errors: "prompts[0]" or "FILE:LINE".

  Raises:
    InputError: where there are none, or from two places; naming the file's line that
      isn't UTF-8, or isn't an object with the field as a text.
  """
  if prompts:
    for name, value in (("file", file), ("field", field)):
      if value is not None:
        raise InputError(name, value, "no option beside prompts on the command line")
    return {f"prompts[{i}]": prompt for i, prompt in enumerate(prompts)}
  source = file or "standard input"
  if file is None and sys.stdin.isatty():
    print("prompts, one a line, then Ctrl-D:", file=sys.stderr)
  if file is None:
    text = decode_text(sys.stdin.buffer.read(), source)
  else:
    text = read_text(file, "file")
  if field is not None:
    rows = parse_jsonl(text, {"inputs": field}, source)
    return {place: row["inputs"] for place, row in rows.items()}
  if source.endswith(".jsonl"):
    raise InputError("field", field, f"the field of {source} that holds the prompt")
  found = {f"{source}:{number}": line for number, line in text_lines(text)}
  if not found:
    raise InputError("file", source, "at least one prompt")
  return found


def read_mesh(text: str | None) -> Partitioning:
  """The mesh of an option "DATA,FSDP,MODEL"; one device where there is none.

  Raises:
    InputError: where it isn't three whole numbers whose product is the number of devices.
  """
  if text is None:
    return single_device()
  try:
    data, fsdp, model = map(int, text.split(","))
  except ValueError as error:
    raise InputError("mesh", text, "three whole numbers, as 2,1,4") from error
  return make_partitioning(data, fsdp, model)


def print_row(
    console: Console, prompt: str, generation: Generation, row: int, vocabulary: Vocabulary,
    has_drafts: bool,
) -> None:
  """Prints a prompt's output, its counts, and where asked its calls.

  Args:
    console: for all but the output itself, which is printed as it is.
    prompt: the text.
    generation: of all prompts.
    row: index of this one.
    vocabulary: the model's.
    has_drafts: whether each call is shown.
  """
  console.print(f"# {row + 1}: {_shorten(prompt)}", style="dim")
  print(generation.texts[row])
  if has_drafts:
    for number, call in enumerate(generation.traces[row], start=1):
      console.print(describe_call(number, call, vocabulary))
  counts = describe_counts(len(generation.tokens[row]), generation.calls[row])
  console.print(f"# {counts}", style="dim")


def describe_call(number: int, call: Call, vocabulary: Vocabulary) -> Text:
  """A call on a line: what it drafted, and the token that is the base model's own.

  The token stands where it was decided, after the accepted ones; the rejected
  rest of the draft follows.
  """
  accepted = call.num_accepted
  rejected = [token for node, token in enumerate(call.draft) if node not in call.accepted]
  parts = [(ACCEPTED, call.emitted[:accepted]), (BASE, call.emitted[accepted:]),
           (REJECTED, rejected)]
  text = Text(f"{number:5}  {accepted}/{len(call.draft)} ")
  for (sign, style), tokens in parts:
    for token in tokens:
      text.append(" ").append(sign + _on_one_line(vocabulary.piece(token)), style)
  return text


def save_picture(
    path: str, prompts: Sequence[str], generation: Generation, vocabulary: Vocabulary
) -> None:
  """Writes every prompt with its calls as an SVG that needs no network.

  Raises:
    InputError: where the file can't be written.
  """
  console = plain_console(
      record=True, file=io.StringIO(), width=100, color_system="truecolor", force_terminal=True,
  )
  console.print(LEGEND, style="dim")
  for row, prompt in enumerate(prompts):
    console.print(f"# {_shorten(prompt)}", style="dim")
    for number, call in enumerate(generation.traces[row], start=1):
      console.print(describe_call(number, call, vocabulary))
    counts = describe_counts(len(generation.tokens[row]), generation.calls[row])
    console.print(f"# {counts}", style="dim")
  # Its fonts would be fetched; the reader's own will do.
  code = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
  try:
    console.save_svg(str(local_path(path, "svg")), title="bpd_jax", code_format=code)
  except OSError as error:
    raise InputError("svg", path, f"a path that can be written ({error.strerror})") from error


def describe_counts(tokens: int, calls: int) -> str:
  """Tokens, calls and block efficiency in words."""
  return f"{tokens} tokens, {calls} decoder calls, block efficiency {tokens / calls:.2f}"


def _shorten(prompt: str) -> str:
  shown = " ".join(prompt.split())
  return shown if len(shown) <= PROMPT_WIDTH else shown[: PROMPT_WIDTH - 1] + "…"


def _on_one_line(piece: str) -> str:
  return "".join(
      character if character.isprintable() else character.encode("unicode_escape").decode()
      for character in piece
  )


def _check_options(args: argparse.Namespace) -> None:
  """InputError naming an option that another one makes meaningless."""
  drafts, adapts = ("block_size", "addon"), ("costs", "measure_costs", "save_costs")
  meaningless = {"greedy": drafts + adapts, "blockwise": adapts, "auto": ()}[args.method]
  for name in meaningless:
    value = getattr(args, name)
    if value is not None and value is not False:
      raise InputError(name.replace("_", "-"), value, f"no option of --method {args.method}")
  if args.costs is not None and args.measure_costs:
    raise InputError("measure-costs", True, "no option beside --costs")


def main(argv: Sequence[str]) -> None:
  """Decodes; see `--help`."""
  parser = Parser(
      prog="python -m bpd_jax.decode", description=__doc__.splitlines()[0]
  )
  parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a model folder")
  parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text")
  parser.add_argument(
      "--file", metavar="FILE",
      help="prompts, one a line (default: standard input, where no PROMPT is given)",
  )
  parser.add_argument(
      "--field", metavar="NAME", help="lines are JSON objects, and the prompt is this field"
  )
  parser.add_argument(
      "--method", choices=("auto", "greedy", "blockwise"), default="auto",
      help="greedy's tokens come out of all, in float32: auto chooses the size of each block, "
      "or none, by what calls cost here and by how much of recent drafts passed; blockwise "
      "drafts all it can in every call (default auto)",
  )
  parser.add_argument(
      "--costs", metavar="FILE",
      help="what calls cost, for auto, as --save-costs writes it (default: what is kept with "
      "the compiled programs, measured the first time)",
  )
  parser.add_argument(
      "--measure-costs", action="store_true", help="measure them now, whatever is kept"
  )
  parser.add_argument("--save-costs", metavar="FILE", help="write them to a file")
  parser.add_argument(
      "--show-drafts", "--show_drafts", action="store_true",
      help="show each call's draft: + accepted, - rejected, = the base model's own choice",
  )
  parser.add_argument("--svg", metavar="FILE", help="save the calls as a picture")
  parser.add_argument(
      "--block-size", type=int, metavar="H",
      help="most tokens a call emits, its nodes (default all of the model's heads)",
  )
  parser.add_argument(
      "--addon", metavar="DIR", help="the folder of what drafts, in place of the model's heads"
  )
  parser.add_argument(
      "--max-length", type=int, default=128, metavar="N",
      help="most tokens of an output (default 128)",
  )
  parser.add_argument(
      "--batch-size", type=int, default=8, metavar="N",
      help="most prompts decoded together (default 8)",
  )
  parser.add_argument(
      "--dtype", metavar="DTYPE",
      help="to compute in, instead of the checkpoint's: float32, of which greedy's tokens are "
      "promised, or bfloat16 or float16, of which they aren't",
  )
  parser.add_argument(
      "--mesh", metavar="DATA,FSDP,MODEL",
      help="devices along the batch, along batch and parameters, and along heads and "
      "vocabulary; -1 is all that are left, as in --mesh=-1,1,1 (default 1,1,1: one device)",
  )
  args = parser.parse_args(argv)
  prompts = read_prompts(args.prompts, args.file, args.field)
  partitioning = read_mesh(args.mesh)
  model = load(args.checkpoint, dtype=args.dtype, partitioning=partitioning)
  names, prompts = [*prompts], [*prompts.values()]
  rows = model.encode_prompts(prompts, names=names)
  _check_options(args)
  # The last batch is filled; what divides over the mesh is said by its name.
  batch_size = min(args.batch_size, partitioning.round_batch(len(prompts)))
  method, policing = args.method, None
  if method != "greedy":
    method = Draft(args.block_size, addon=args.addon).make(model)
  if args.method == "auto":
    if method.drafter.depth:
      with naming_prompts(names):
        decision = GoodputSource(args.costs, args.measure_costs).make(
            model, method, rows, batch_size, args.max_length
        )
      policing = decision.policing
    if args.save_costs is not None:
      if policing is None:
        raise InputError("save-costs", args.save_costs, "no option where nothing drafts")
      try:
        decision.costs.save(args.save_costs)
      except OSError as error:
        allowed = f"a path that can be written ({error.strerror})"
        raise InputError("save-costs", args.save_costs, allowed) from error
  with naming_prompts(names):
    generation = model.generate(
        rows, method, policing=policing, max_length=args.max_length, batch_size=batch_size
    )
  console = plain_console(soft_wrap=True)
  if args.show_drafts:
    console.print(LEGEND, style="dim")
  for row, prompt in enumerate(prompts):
    print_row(console, prompt, generation, row, model.vocabulary, args.show_drafts)
  if len(prompts) > 1:
    total = describe_counts(sum(map(len, generation.tokens)), sum(generation.calls))
    console.print(f"# all {len(prompts)}: {total}", style="dim")
  if args.svg is not None:
    save_picture(args.svg, prompts, generation, model.vocabulary)


if __name__ == "__main__":
  run(main)
