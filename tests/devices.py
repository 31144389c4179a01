"""Devices that a CPU pretends to have."""

import os


def device_flags(count: int) -> str:
  """XLA_FLAGS of a process with `count` devices, which compiles as this one does.

  Of devices that don't meet within 40 s, as on a machine that does much else, XLA ends the
  process by default.
  """
  flags = {
      "xla_force_host_platform_device_count": count,
      "xla_cpu_collective_call_terminate_timeout_seconds": 600,
  }
  more = [f"--{name}={value}" for name, value in flags.items()]
  return " ".join([os.environ.get("XLA_FLAGS", ""), *more])
