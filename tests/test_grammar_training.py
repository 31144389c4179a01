"""A tiny model learns the grammar, and its heads do what heads can do there."""

import jax
import numpy as np
import pytest

from bpd_jax.addons.heads import Heads
from bpd_jax.data.batches import Batches
from bpd_jax.data.grammar import grammar, ideal_block_efficiency, PREFIX, run_lengths
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device
from bpd_jax.training.loop import Schedule, train_steps
from bpd_jax.training.loss import Loss
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.step import Step

CONFIG = ModelConfig(
    vocab_size=128, d_model=64, d_ff=128, d_kv=16, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2,
)
HEADS = Heads(4, 128)
STEPS = 2500


class Words:
  """Rows of the grammar, a word an id."""

  name = "grammar"

  def __init__(self, split, count):
    self.examples = grammar(split, count)
    words = sorted({w for row in grammar("train", 300) for w in self._words(row.inputs)
                    + self._words(row.targets)})
    self._ids = {word: i + 2 for i, word in enumerate(words)}
    assert len(words) + 2 <= CONFIG.vocab_size
    self.rows = [
        [np.array([*map(self._ids.get, self._words(side)), 1], np.int32)
         for side in (row.inputs, row.targets)]
        for row in self.examples
    ]
    self.lengths = np.array([[len(side) for side in row] for row in self.rows])

  @staticmethod
  def _words(text):
    return text.removeprefix(PREFIX).split()

  def __getitem__(self, i):
    return self.rows[i]


@pytest.mark.slow  # Trains for minutes.
def test_a_trained_model_decodes_as_many_tokens_a_call_as_ideal_heads(tmp_path):
  batches = Batches([Words("train", 20_000)], batch_size=64, input_length=12, target_length=64)
  optimizer = Optimizer("adamw", 4e-3, "cosine", 100, STEPS)
  step = Step(CONFIG, single_device(), optimizer, Loss(trains_base=True), HEADS)
  where = single_device(), jax.random.key(0)
  outcome = train_steps(
      tmp_path, step, batches, Schedule(STEPS, log_every=100, save_every=STEPS),
      lambda: {"base": init_params(CONFIG, *where), "own": HEADS.begin(CONFIG, *where)},
  )
  test, params = Words("test", 100), outcome.state.params
  generator = Generator(CONFIG, params["base"], own_heads=(HEADS, params["own"]))
  out = generator.generate(
      [inputs.tolist() for inputs, _ in test.rows], "blockwise", max_length=100, batch_size=25
  )
  # Quality first: the likeliest output, every token.
  exact = np.mean([
      np.array_equal(row, targets) for row, (_, targets) in zip(out.tokens, test.rows)
  ])
  ideal = ideal_block_efficiency([run_lengths(row.inputs) for row in test.examples], 4)
  print(exact, out.block_efficiency, ideal)
  assert exact > 0.97
  assert abs(out.block_efficiency / ideal - 1) < 0.05
