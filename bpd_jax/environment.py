"""What a result was made with: revision, versions, device."""

import hashlib
import importlib.metadata
import os
from pathlib import Path
import platform
import subprocess

import jax

PACKAGES = ("bpd_jax", "jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint")


def git_revision() -> str | None:
  """The revision of the source tree, None outside one."""
  done = subprocess.run(
      ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
      capture_output=True, text=True, check=False,
  )
  return done.stdout.strip() or None


def source_fingerprint() -> str:
  """Sixteen hexadecimal digits of this package's own source."""
  digest = hashlib.sha256()
  for path in sorted(Path(__file__).parent.rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that compute."""
  return {"python": platform.python_version()} | {
      name: importlib.metadata.version(name) for name in PACKAGES
  }


def describe_device() -> str:
  """The first device in words, and how many there are."""
  devices = jax.devices()
  cores = f" of {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
  return f"{len(devices)} × {devices[0].device_kind}{cores}"
