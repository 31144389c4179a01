"""What is learned from: the form of everything that is minimised."""

from typing import Any

import jax
import jax.numpy as jnp

from bpd_jax.model.model import EncoderDecoder

Array = jax.Array

TEXTS = ("references", "outputs")


class Objective:
  """What is minimised; a frozen dataclass, whose fields are its config.

  Attributes:
    texts: "references", what people wrote, or "outputs", the base's own greedy outputs
      on the same inputs.
    reads_states: whether all that is read of the base is `decoder_states`: one process
      then has the base read each text once, and trains on states from disk.
    trains_base: whether the base learns too; else it stays as it is, bit for bit.
    unlearns_loops: whether own outputs, where a batch has `decoder_output_mask`, teach not
      to repeat them.
  """

  texts: str = "references"
  reads_states: bool = True
  trains_base: bool = False
  unlearns_loops: bool = False

  def check(self, addon: Any) -> None:
    """Raises InputError where the add-on can't learn from it."""

  def shared(self, addon: Any, batch: dict[str, Array], key: Array | None) -> Any:
    """What is the same for all parts of a batch: numbers that sums are divided by, draws.

    Args:
      addon: its config.
      batch: all of it.
      key: of what is drawn; None where a loss is only measured.

    Returns:
      Any pytree of arrays.
    """
    raise NotImplementedError

  def loss(
      self, addon: Any, model: EncoderDecoder, base: Any, own: Any,
      batch: dict[str, Array], shared: Any, key: Array | None,
  ) -> tuple[Array, dict[str, Array]]:
    """What a part of a batch adds to the loss.

    Args:
      addon: its config.
      model: the base, for its parameters as they are stored.
      base: these; differentiated where `trains_base`.
      own: the add-on's parameters, which are differentiated.
      batch: `decoder_target_tokens`, `decoder_segment_ids` and what else
        `bpd_jax.data.batches.Batch` has, of the part; see `decoder_states`.
      shared: see there.
      key: of what is drawn; None where a loss is only measured.

    Returns:
      The loss, already divided; and sums by step, [steps] each: `nll` and `correct` over
      the targets of a step, and their number `count`.
    """
    raise NotImplementedError


def decoder_states(
    model: EncoderDecoder, base: Any, batch: dict[str, Array], dropout_key: Array | None = None
) -> Array:
  """Normed last states of the decoder, [batch, length, d_model], teacher-forced.

  Args:
    model: the base.
    base: its parameters as they are stored.
    batch: of `bpd_jax.data.batches.Batch`; or with `hidden` [batch, length, d_model], states
      from disk, in place of the encoder's arrays.
    dropout_key: None for no dropout.
  """
  if "hidden" in batch:
    return batch["hidden"]
  is_training = dropout_key is not None and model.config.dropout_rate > 0
  rngs = lambda i: {"dropout": jax.random.fold_in(dropout_key, i)} if is_training else {}
  encoder, decoder = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
  same = lambda rows, columns: (rows[:, :, None] == columns[:, None, :]) & (
      columns[:, None, :] > 0
  )
  encoded = model.apply(
      {"params": base}, batch["encoder_input_tokens"], same(encoder, encoder), is_training,
      rngs=rngs(0), method="encode",
  )
  causal = jnp.tri(decoder.shape[1], dtype=bool)
  return model.apply(
      {"params": base}, encoded, same(decoder, encoder), batch["decoder_input_tokens"],
      same(decoder, decoder) & causal, is_training, rngs=rngs(1), method="decode",
  )
