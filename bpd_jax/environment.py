"""What a result was made with: revision, versions, device."""

from collections.abc import MutableMapping
import hashlib
import importlib.metadata
import os
from pathlib import Path
import platform
import subprocess

import jax

# libtpu reads these when it is loaded. They keep it from looking for TPUs, and
# let several processes on a machine compile at once.
LIBTPU_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Where Linux shows a TPU's chips, by one driver or the other.
TPU_NODES = ("accel*", "vfio/[0-9]*")
PACKAGES = ("bpd_jax", "jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint")


def git_revision() -> str | None:
  """The revision of the source tree, None outside one or where git isn't installed."""
  try:
    done = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    )
  except OSError:
    return None
  return done.stdout.strip() or None


def source_fingerprint() -> str:
  """Sixteen hexadecimal digits of this package's own source."""
  digest = hashlib.sha256()
  for path in sorted(Path(__file__).parent.rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def quiet_libtpu(
    environ: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> None:
  """Keeps libtpu from writing warnings about a TPU that isn't there.

  JAX loads it wherever it is installed, to see whether there is one. Does nothing where
  the machine shows a chip, or where JAX is told which platforms to look for.

  Args:
    environ: what libtpu is going to read.
    devices: the folder of the machine's devices.
  """
  if environ.get("JAX_PLATFORMS") or any(any(devices.glob(node)) for node in TPU_NODES):
    return
  for variable, value in LIBTPU_WITHOUT_TPU.items():
    environ.setdefault(variable, value)


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
