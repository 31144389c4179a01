"""The corpus from a handful of installed packages: real rows in a few seconds."""

from bpd_jax.data import docstrings
from bpd_jax.data.manifest import Environment, Manifest
from bpd_jax.data.sources import Source

# Not in the order of their paths, so that this order shows.
SOURCES = (
    Source("urllib3", "MIT", "train"),
    Source("rich", "MIT", "train"),
    Source("absl-py", "Apache-2.0", "train"),
    Source("etils", "Apache-2.0", "train"),
    Source("opt_einsum", "MIT", "validation"),
    Source("requests", "Apache-2.0", "test"),
)


def make() -> tuple[Manifest, Environment]:
  """A manifest of what is installed here, and where."""
  environment = Environment()
  return docstrings.make_manifest(SOURCES, environment), environment
