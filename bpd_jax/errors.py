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


def check_count(field: str, value, least: int = 1) -> None:
  """Raises InputError where a value isn't a whole number from `least` on."""
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    allowed = "a positive integer" if least == 1 else f"an integer from {least} on"
    raise InputError(field, value, allowed)


def check_number(field: str, value, allowed: str, is_allowed) -> None:
  """Raises InputError where a value isn't a number, or not an allowed one."""
  if not isinstance(value, int | float) or isinstance(value, bool) or not is_allowed(value):
    raise InputError(field, value, allowed)
