"""How every entry point starts: `run(main)` under `if __name__ == "__main__"`.

An `InputError` becomes one line on stderr and exit status 2, as argparse does
with its own, and so does an argument that gin has no value for; anything else is
a bug and keeps its traceback. Entry points that are configured by gin call
`read_gin` first.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import inspect
from pathlib import Path
import re
import sys
import textwrap
from typing import Any, NoReturn

from bpd_jax.compilation_cache import describe_cache, keep_programs
from bpd_jax.environment import quiet_libtpu
from bpd_jax.errors import check_text, InputError
from bpd_jax.folders import local_path

PACKAGE = Path(__file__).parent
# Where the folder `gin` lies: beside the package in a checkout, below it where it is installed.
GIN_ROOTS = (PACKAGE.parent, PACKAGE / "gin_files")
GIN_USAGE = "[--gin_file=FILE …] [--gin.NAME=VALUE …]"
# As gin says that a call had no value for an argument.
_MISSING = re.compile(
    r"No values supplied by Gin or caller for arguments: (?P<arguments>.*)"
    r"[\s\S]*In call to configurable '(?P<name>[^']*)' \(.*\)(?: in scope '(?P<scope>[^']*)')?"
)
_STRING = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""")


class Parser(argparse.ArgumentParser):
  """A parser of arguments whose `--help` also says where compiled programs are kept."""

  def format_help(self) -> str:
    return f"{super().format_help()}\n{textwrap.fill(describe_cache(), 79)}\n"


def run(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None, *,
    has_cache: bool = True,
) -> NoReturn:
  """Calls `main` with the command line and exits.

  Args:
    main: takes the arguments after the program's name; returns the exit
      status, None for 0.
    argv: the arguments; the process's own by default.
    has_cache: whether what it compiles is kept for the next command; see
      `compilation_cache`.
  """
  if has_cache:
    keep_programs()
  argv = sys.argv[1:] if argv is None else argv
  try:
    for number, argument in enumerate(argv, start=1):
      check_text(f"argument {number}", argument)
    quiet_libtpu()
    status = main(argv)
  except (InputError, TypeError) as error:
    if not isinstance(error, InputError):
      error = _as_missing(error)
    # What libraries had begun when they failed isn't reported as well.
    sys.unraisablehook = lambda unraisable: None
    print_error(error)
    status = 2
  sys.exit(status)


def _as_missing(error: TypeError) -> InputError:
  """The InputError for an argument without a value in gin; raises any other error again."""
  found = _MISSING.search(str(error))
  if found is None:
    raise error
  scope = found["scope"] + "/" if found["scope"] else ""
  return InputError(
      f"gin {scope}{found['name']}", "absent", f"one with values for {found['arguments']}"
  )


def print_error(error: Exception) -> None:
  """Says on one line of standard error what went wrong."""
  # Gin adds in which function that was, which is nothing to a user.
  message = re.sub(r"\n *In call to configurable .*", "", str(error))
  print(f"error: {one_line(message)}", file=sys.stderr)


def one_line(error: Exception | str) -> str:
  """The message without line breaks."""
  return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def read_gin(
    argv: Sequence[str], prog: str, description: str, entry: Callable | None = None, *,
    has_cache: bool = True,
) -> None:
  """Reads `--gin_file=FILE` and `--gin.NAME=VALUE`, each as often as needed.

  Files, and what they include, are looked for as `find_gin_file` says, and read in
  order, then bindings. A binding names a parameter of a configurable
  (`ModelConfig.d_ff`) or a macro that one of the files sets.
  `--help` lists the files' macros with their values and exits.

  Args:
    argv: the command line after the program's name.
    prog: the program's name, for `--help`.
    description: what it does, for `--help`.
    entry: the configurable that is going to be called without arguments.
    has_cache: as of `run`, for `--help`.

  Raises:
    InputError: for an unknown option, file, configurable, parameter or macro,
      a value that isn't one of gin's, a required macro without a value, or a
      required argument of `entry` without one.
  """
  parser = (Parser if has_cache else argparse.ArgumentParser)(
      prog=prog, usage=f"{prog} {GIN_USAGE}", description=description, add_help=False
  )
  parser.add_argument("--gin_file", action="append", default=[])
  parser.add_argument("-h", "--help", action="store_true")
  known, rest = parser.parse_known_args(argv)
  bindings = []
  for option in rest:
    name, _, value = option.removeprefix("--gin.").partition("=")
    if not option.startswith("--gin.") or not name or not value:
      raise InputError("option", option, GIN_USAGE)
    bindings.append(f"{name} = {value}")
  if known.help:
    parser.print_help()
    read_gin_files(known.gin_file, bindings, needs_all=False)
    print(_macro_table(_macros()))
    sys.exit(0)
  read_gin_files(known.gin_file, bindings)
  if entry is not None:
    _check_arguments(entry)


def read_gin_files(
    files: Sequence[str], bindings: Sequence[str] = (), *, needs_all: bool = True
) -> None:
  """Makes these files and bindings the whole of gin's configuration.

  Args:
    files: paths, looked for as `find_gin_file` says.
    bindings: lines of gin, "NAME = value".
    needs_all: whether a required macro without a value is an error.

  Raises:
    InputError: see `read_gin`.
  """
  import gin

  import bpd_jax.configurables  # noqa: F401  What files can name.

  gin.clear_config()
  with _includes_found():
    for file in files:
      path = find_gin_file(file)
      if path is None:
        raise InputError("gin_file", file, "a file that exists, here or with the package")
      with _as_input_error(file):
        gin.config.parse_config_file(str(path))
  known = _macros()
  for binding in bindings:
    name, _, value = binding.partition(" = ")
    if "." not in name and name not in known:
      raise InputError(
          f"gin macro {name}", value,
          f"one of {sorted(known)}" if known else "a macro of a gin file, and none sets any",
      )
    with _as_input_error(binding):
      gin.parse_config(binding)
  if needs_all:
    macros = _macros()
    for name, value in macros.items():
      if _is_required(value):
        raise InputError(f"gin macro {name}", "required", f"a value: --gin.{name}=…")
    for name in re.findall(r"%(\w+)(?![\w.])", _STRING.sub("", gin.config_str())):
      if name not in macros:
        raise InputError(f"gin macro {name}", "absent", "a value, from a file that sets it")


def find_gin_file(file: str, including: Path | None = None) -> Path | None:
  """Where a gin file lies: from the working directory, else with what names it.

  Args:
    file: a path. A relative one is looked for from the working directory, then from the
      folders above the file that includes it, the nearest first, then where the package's
      own `gin/…` lies.
    including: the file that includes it; None for one that the command line names.

  Returns:
    Its absolute path; None where there is none.
  """
  above = () if including is None else including.parents
  for folder in (Path(), *above, *GIN_ROOTS):
    # An absolute path stays what it is.
    path = folder / local_path(file, "gin_file")
    if path.is_file():
      return path.absolute()
  return None


@contextlib.contextmanager
def _includes_found() -> Iterator[None]:
  """Has gin look for the files that a file includes as `find_gin_file` does.

  Gin's own search paths stay for good, and before the second of them is tried, gin takes
  the file for a Python package and logs that there is none.
  """
  import gin

  parse, open_files = gin.config.parse_config_file, []

  def parse_found(file: str, *options: Any) -> Any:
    path = find_gin_file(file, open_files[-1] if open_files else None)
    if path is None:
      raise FileNotFoundError(f"there is no file {file!r}")
    open_files.append(path)
    try:
      return parse(str(path), *options)
    finally:
      open_files.pop()

  gin.config.parse_config_file = parse_found
  try:
    yield
  finally:
    gin.config.parse_config_file = parse


@contextlib.contextmanager
def _as_input_error(source: str) -> Iterator[None]:
  """Turns what gin raises for a bad file or binding into an InputError."""
  try:
    yield
  except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, SyntaxError,
          TypeError, ValueError) as error:
    raise InputError("gin", source, f"what gin understands ({one_line(error)})") from error


def _check_arguments(entry: Callable) -> None:
  """Raises InputError where an argument without a default has no value in gin."""
  import gin

  for name, parameter in inspect.signature(entry).parameters.items():
    if parameter.default is parameter.empty:
      try:
        gin.query_parameter(f"{entry.__name__}.{name}")
      except ValueError as error:
        raise InputError(
            f"gin {entry.__name__}.{name}", "absent", "a value, from a --gin_file of gin/runs"
        ) from error


def _is_required(value: object) -> bool:
  return str(value) == "%gin.REQUIRED"


def _macros() -> dict[str, object]:
  """Macros of the configuration and their values, in order of their names."""
  import gin

  macros = {}
  for line in gin.config_str().splitlines():
    name = line.partition(" = ")[0]
    if name.isidentifier():
      macros[name] = gin.query_parameter(f"{name}/gin.macro.value")
  return dict(sorted(macros.items()))


def _macro_table(macros: dict[str, object]) -> str:
  if not macros:
    return "macros: none; --gin_file=FILE --help lists those of a file"
  width = max(map(len, macros))
  lines = [
      f"  {name:{width}}  {'(required)' if _is_required(value) else repr(value)}"
      for name, value in macros.items()
  ]
  return "\n".join(["macros, set by --gin.NAME=VALUE:", *lines])
