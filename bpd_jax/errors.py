"""The one error that a user's input can cause, said in one line."""


class InputError(ValueError):
  """A field holds a value that isn't allowed; entry points exit with status 2."""

  def __init__(self, field: str, value, allowed: str):
    super().__init__(f"{field} = {value!r}: allowed is {allowed}")
    self.field = field
    self.value = value
    self.allowed = allowed


def brief(error: Exception) -> str:
  """An error's first line, cut: TensorStore's are pages."""
  line = str(error).partition("\n")[0].strip() or type(error).__name__
  return line if len(line) <= 200 else line[:200] + " …"


def check_text(field: str, value: str) -> None:
  """Raises InputError where a text has halves of characters, which UTF-8 hasn't.

  JSON has them as a lone \\ud83d, and Python for the bytes of arguments that aren't UTF-8.
  """
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    near = value[max(error.start - 20, 0) : error.start + 20]
    raise InputError(
        field, near, f"text in UTF-8, where {value[error.start]!r} is no character"
    ) from error


def check_count(field: str, value, least: int = 1) -> None:
  """Raises InputError where a value isn't a whole number from `least` on."""
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    allowed = "a positive integer" if least == 1 else f"an integer from {least} on"
    raise InputError(field, value, allowed)


def check_number(field: str, value, allowed: str, is_allowed) -> None:
  """Raises InputError where a value isn't a number, or not an allowed one."""
  if not isinstance(value, int | float) or isinstance(value, bool) or not is_allowed(value):
    raise InputError(field, value, allowed)
