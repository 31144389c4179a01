"""Devices that a CPU pretends to have."""

import os


def device_flags(count: int) -> str:
  """XLA_FLAGS of a process with `count` devices, which compiles as this one does."""
  return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
