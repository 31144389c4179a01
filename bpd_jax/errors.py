"""The one error that a user's input can cause, said in one line."""


class InputError(ValueError):
  """A field holds a value that isn't allowed; entry points exit with status 2."""

  def __init__(self, field: str, value, allowed: str):
    super().__init__(f"{field} = {value!r}: allowed is {allowed}")
    self.field = field
    self.value = value
    self.allowed = allowed
