"""How every entry point starts: `run(main)` under `if __name__ == "__main__"`.

An `InputError` becomes one line on stderr and exit status 2, as argparse does
with its own; anything else is a bug and keeps its traceback.
"""

import sys
from typing import Callable, NoReturn, Sequence

from bpd_jax.errors import InputError


def run(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None
) -> NoReturn:
  """Calls `main` with the command line and exits.

  Args:
    main: takes the arguments after the program's name; returns the exit
      status, None for 0.
    argv: the arguments; the process's own by default.
  """
  try:
    status = main(sys.argv[1:] if argv is None else argv)
  except InputError as error:
    print(f"error: {one_line(error)}", file=sys.stderr)
    status = 2
  sys.exit(status)


def one_line(error: Exception) -> str:
  """The message without line breaks; gin, for one, appends lines to a message."""
  return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
