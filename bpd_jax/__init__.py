"""bpd_jax: blockwise parallel decoding on T5-style encoder-decoders.

  import bpd_jax
  model = bpd_jax.load("models/flan-small")
  model.generate(["Summarize: …"], method="blockwise").texts
"""

from bpd_jax.errors import InputError
from bpd_jax.generation import Generation, Generator, load

__all__ = ["Generation", "Generator", "InputError", "load"]
