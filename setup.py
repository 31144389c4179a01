"""bpd_jax: blockwise parallel decoding on T5-style encoder-decoders, in JAX."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
GIN_FILES = [path.relative_to(ROOT) for path in sorted(ROOT.glob("gin/**/*.gin"))]


class BuildWithGin(build_py):
  """The package, and below it the gin files; a package of their own would hide gin-config's."""

  def run(self):
    super().run()
    # An editable install finds them where they are.
    for path in () if self.editable_mode else GIN_FILES:
      to = Path(self.build_lib, "bpd_jax/gin_files", path)
      self.mkpath(str(to.parent))
      self.copy_file(str(ROOT / path), str(to))

  def get_source_files(self):
    return [*super().get_source_files(), *map(str, GIN_FILES)]


EXTRAS = {
    "cpu": ["jax"],
    "cuda": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    # Ahead-of-time compilation for TPUs on a machine that has none.
    "plan-tpu": ["libtpu>=0.0.42,<0.1"],
    # Peers that the benchmark runs beside this package.
    "bench": [
        "torch>=2.9", "transformers>=5.0,<6", "ctranslate2>=4.6", "kenlm>=0.2", "pynini>=2.1.6",
    ],
    # Plots of an evaluation's report.
    "report": ["matplotlib>=3.9"],
    # Preparing data; neither training nor decoding imports TensorFlow.
    "data": [
        "array_record>=0.8",
        "clu>=0.0.12",
        "docstring_parser>=0.18",
        "importlib_resources>=6",  # TFDS needs it and doesn't ask for it.
        "seqio==0.0.20",
        "tensorflow>=2.21,<2.22",
        "tensorflow-datasets>=4.9.10,<5",
        "tensorflow-text>=2.21,<2.22",
    ],
}
# Tests of the core; `make test-newest` has these alone.
EXTRAS["test-core"] = ["pytest>=8", "pytest-xdist>=3.7", "hypothesis>=6"]
EXTRAS["test"] = [
    *EXTRAS["test-core"], "ruff",
    # kenlm is built by a C++ compiler; tests that compare with it are skipped without.
    *(name for name in EXTRAS["bench"] if not name.startswith("kenlm")),
    *EXTRAS["plan-tpu"], *EXTRAS["report"], *EXTRAS["data"],
]

setup(
    name="bpd_jax",
    version="0.1.0",
    description="Blockwise parallel decoding on T5-style encoder-decoders, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["bpd_jax", "bpd_jax.*"]),
    cmdclass={"build_py": BuildWithGin},
    package_data={"bpd_jax": ["data/files/*"]},
    install_requires=[
        "absl-py>=2",
        "flax>=0.12.4,<0.13",
        "gin-config>=0.5",
        "jax>=0.8,<0.13",
        "numpy>=2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "rich>=13",
        "rouge_score>=0.1.2",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tokenizers>=0.20",  # Reads the tokenizer.json that transformers 5 saves.
    ],
    extras_require=EXTRAS,
)
