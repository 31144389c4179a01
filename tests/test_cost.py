"""What decoding costs by counting, by hand."""

import pytest

from bpd_jax.evaluation.cost import call_cost, Cost, token_cost
from bpd_jax.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=10, d_model=4, d_ff=6, d_kv=2, num_heads=3, num_encoder_layers=1,
    num_decoder_layers=2, dtype="bfloat16",
)
HEADS = {"num_heads": 2, "head_d_ff": 5}


@pytest.mark.parametrize("nodes, rows, heads, operations, traffic", [
    # Weights of a layer: 4 + 2 projections of 4 x 6 and 3 of 4 x 6; two layers
    # are 432, the output projection 40. A node attends to 7 + 1 slots, itself
    # and 5 inputs: 2 layers x 2 products x 6 x 14 = 336. Keys and values are as
    # many numbers.
    (1, 1, {}, 2 * (432 + 40 + 336), 2 * (432 + 40 + 336)),
    # Two heads of 2 x 4 x 5 draft for each row, through the projection as well;
    # 10 slots, 3 nodes and 5 inputs give 432 for a node.
    (3, 2, HEADS, 2 * 2 * (3 * (432 + 40 + 432) + 2 * (40 + 40)),
     2 * (432 + 2 * 40 + 2 * 40 + 2 * 432)),
    # Eight nodes are a tree: still two heads.
    (8, 1, HEADS, 2 * (8 * (432 + 40 + 552) + 2 * (40 + 40)), 2 * (432 + 2 * 40 + 2 * 40 + 552)),
])
def test_cost_of_a_call_by_hand(nodes, rows, heads, operations, traffic):
  cost = call_cost(CONFIG, nodes, rows, 7, 5, **heads)
  assert (cost.flops, cost.bytes) == (operations, traffic)
  assert call_cost(CONFIG, nodes, rows, 7, 5, split=2, **heads) == cost / 2


def test_numbers_of_float32_are_twice_as_wide():
  cost = call_cost(CONFIG, 3, 2, 7, 5, **HEADS)
  wide = call_cost(CONFIG.replace(dtype="float32"), 3, 2, 7, 5, **HEADS)
  assert wide == Cost(cost.flops, 2 * cost.parameter_bytes, 2 * cost.cache_bytes)


def test_a_token_costs_its_share_of_a_call():
  greedy = token_cost(CONFIG, 1, 0, 1.0, output_length=7, input_length=5)
  assert greedy == call_cost(CONFIG, 1, 1, 7, 5)
  # Of what isn't heads the call alone is counted.
  assert token_cost(CONFIG, 3, 2, 2.0, output_length=7, input_length=5) == (
      call_cost(CONFIG, 3, 1, 7, 5) / 2
  )
  # Weights are read once for two tokens, but with two heads and the projection again.
  block = token_cost(CONFIG, 3, 2, 2.0, output_length=7, input_length=5, head_d_ff=5)
  assert block.parameter_bytes == 2 * (432 + 2 * 40 + 2 * 40) / 2
  assert block.cache_bytes == 2 * 432 / 2
  # 16 nodes of two steps: as many heads, more operations.
  tree = token_cost(CONFIG, 16, 2, 2.0, output_length=7, input_length=5, head_d_ff=5)
  assert tree.parameter_bytes == block.parameter_bytes and tree.flops > 4 * block.flops


def test_a_small_model_is_called_for_the_certain_tokens_and_for_each_step_after_the_first():
  small = CONFIG.replace(num_decoder_layers=1)
  plain, scored = (
      token_cost(
          CONFIG, 4, 3, 2.0, output_length=7, input_length=5, scorers=scorers, num_prefixes=5,
          head_d_ff=5,
      )
      for scorers in ((), (small,))
  )
  # Four certain tokens at most; then the newest token of five prefixes, twice.
  calls = [call_cost(small, width, 1, 7, 5) for width in (4, 5, 5)]
  assert scored == plain + (calls[0] + calls[1] + calls[2]) / 2
