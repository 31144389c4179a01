"""What an add-on learns from: the form of everything that is minimised behind a frozen base."""

from typing import Any

import jax

from bpd_jax.model.model import EncoderDecoder

Array = jax.Array

TEXTS = ("references", "outputs")


class Objective:
  """What is minimised; a frozen dataclass, whose fields are its config.

  Attributes:
    texts: "references", what people wrote, or "outputs", the base's own greedy outputs
      on the same inputs.
    reads_states: whether a batch has `hidden` [batch, length, d_model], the decoder's
      normed last states, read from disk, in place of the encoder's arrays.
  """

  texts: str = "references"
  reads_states: bool = True

  def counts(self, batch: dict[str, Array]) -> Any:
    """What sums are divided by, of the whole batch: any pytree of numbers."""
    raise NotImplementedError

  def loss(
      self, addon: Any, model: EncoderDecoder, base: Any, own: Any,
      batch: dict[str, Array], counts: Any, key: Array,
  ) -> tuple[Array, dict[str, Array]]:
    """What a part of a batch adds to the loss.

    Args:
      addon: its config.
      model: the base, for its parameters as they are stored.
      base: these, frozen.
      own: the add-on's parameters, which are differentiated.
      batch: `decoder_target_tokens`, `decoder_segment_ids` and what else
        `bpd_jax.data.batches.Batch` has, of the part; or `hidden`, see `reads_states`.
      counts: of the whole batch.
      key: of what is drawn.

    Returns:
      The loss, already divided; and sums by step, [steps] each: `nll` and `correct` over
      the targets of a step, and their number `count`.
    """
    raise NotImplementedError
