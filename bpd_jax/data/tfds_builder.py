"""The corpus as a TFDS dataset: `tfds.builder("docstrings", data_dir=…)`.

Importing this module imports TensorFlow Datasets and registers the builder;
`bpd_jax.data.docstrings` does neither.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bpd_jax.data import docstrings
from bpd_jax.data.extraction import Record
from bpd_jax.data.manifest import Environment, Manifest, read_manifest
from bpd_jax.data.sources import SPLITS
from bpd_jax.errors import InputError


class Docstrings(tfds.core.GeneratorBasedBuilder):
  """Docstrings of installed Python packages with their code; needs no network.

  Attributes:
    manifest: what to read; the package's own by default.
    environment: where to look; the running one by default.

  Raises:
    InputError: where the folder holds the records of another manifest.
  """

  VERSION = tfds.core.Version("1.1.0")
  RELEASE_NOTES = {"1.0.0": "First manifest.", "1.1.0": "More distributions in training."}

  def __init__(
      self,
      *,
      manifest: Manifest | None = None,
      environment: Environment | None = None,
      **kwargs,
  ):
    self.manifest = read_manifest() if manifest is None else manifest
    self.environment = environment
    super().__init__(**kwargs)
    prepared = self.info.metadata["fingerprint"]
    if prepared != self.manifest.fingerprint:
      raise InputError(
          f"{self.data_dir} fingerprint", prepared,
          f"{self.manifest.fingerprint}, from the manifest; remove the folder to prepare it anew",
      )

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
        builder=self,
        description=docstrings.__doc__,
        features=tfds.features.FeaturesDict({
            "distribution": text(),
            "path": text(),
            "line": tfds.features.Scalar(np.int32),
            "name": text(),
            "kind": text(),
            "signature": text(),
            "body": text(),
            "docstring": text(),
            "parameters": tfds.features.Sequence({"name": text(), "description": text()}),
        }),
        metadata=tfds.core.MetadataDict(fingerprint=self.manifest.fingerprint),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # Nothing is downloaded.
    corpus = docstrings.build(self.manifest, self.environment)
    return {split: self._generate_examples(corpus.records[split]) for split in SPLITS}

  def _generate_examples(self, records: list[Record]) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in records:
      yield record.key, record.to_dict()
