"""bpd_jax: blockwise parallel decoding on T5-style encoder-decoders, in JAX."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "cpu": ["jax"],
    "cuda": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    # Ahead-of-time compilation for TPUs on a machine that has none.
    "plan-tpu": ["libtpu>=0.0.42,<0.1"],
    # Peers that the benchmark runs beside this package.
    "bench": ["torch>=2.9", "transformers>=5.0,<6", "ctranslate2>=4.6"],
}
EXTRAS["test"] = ["pytest>=8", "hypothesis>=6", "ruff", *EXTRAS["bench"], *EXTRAS["plan-tpu"]]

setup(
    name="bpd_jax",
    version="0.1.0",
    description="Blockwise parallel decoding on T5-style encoder-decoders, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["bpd_jax", "bpd_jax.*"]),
    install_requires=[
        "absl-py>=2",
        "flax>=0.12.4,<0.13",
        "gin-config>=0.5",
        "jax>=0.8,<0.11",
        "numpy>=2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
    ],
    extras_require=EXTRAS,
)
