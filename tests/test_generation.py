"""The generator: bad input before anything compiles, and rows that come back in order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpd_jax.addons.heads import Heads
from bpd_jax.call_costs import CallCosts
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.decoding.types import Drafter, Lattice
from bpd_jax.errors import InputError
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import make_partitioning, single_device

CONFIG = ModelConfig(
    vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=2,
    num_decoder_layers=2,
).with_dtype("float64")
HEADS = Heads(4, 24)
PROMPTS = [[5, 6, 7, 1], [9], list(range(2, 40)), [30, 31, 1], [8, 8]]
COPIES = ReferenceDrafter(3)
COSTS = CallCosts({}, (1, 4), (1.0, 2.0), ((1.0, 1.0), (2.0, 2.0)))


@pytest.fixture(scope="module")
def model():
  with jax.enable_x64(True):
    params = jax.device_get(init_params(CONFIG, single_device(), jax.random.key(2)))
    own = jax.device_get(HEADS.begin(CONFIG, single_device(), jax.random.key(3)))
    own["w2"] = np.random.default_rng(0).standard_normal(own["w2"].shape) / 4
    yield Generator(CONFIG, params, own_heads=(HEADS, own))


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "prompts = []: allowed is a non-empty list"),
        ("text", {}, "prompts = 'text': allowed is a non-empty list"),
        ([[5], []], {}, r"prompts[1] = []: allowed is at least one token"),
        ([[5], [64]], {}, "prompts[1] token = 64: allowed is 0 … 63"),
        ([[-1]], {}, "prompts[0] token = -1"),
        (["text"], {}, "prompts[0] = 'text': allowed is token ids, as the model has no"),
        ([[5] * 33], {"buckets": (16, 32)}, "prompts[0] length = 33: allowed is 1 … 32"),
        ([[5]], {"method": "beam"}, "method = 'beam': allowed is one of ('auto', 'greedy'"),
        ([[5]], {"method": "auto", "policing": 3}, "policing = 3: allowed is None for"),
        ([[5]], {"costs": COSTS}, "costs = 'given': allowed is None but for method 'auto'"),
        ([[5]], {"method": "auto", "costs": COSTS}, "costs model = None: allowed is '"),
        ([[5]], {"method": 7}, "method = 7: allowed is one of ('auto', 'greedy', 'blockwise'), a"),
        ([[5]], {"method": ReferenceDrafter(-1)}, "drafter.depth = -1: allowed is an integer of"),
        ([[5]], {"max_length": 0}, "max_length = 0: allowed is a positive integer"),
        ([[5]], {"batch_size": 0}, "batch_size = 0"),
        ([[5]], {"limits": [1, 2]}, "limits = '2 numbers': allowed is 1, one a prompt"),
        ([[5]], {"limits": [9], "max_length": 8}, "limits[0] = 9: allowed is 1 … 8"),
        ([[5]], {"limits": [0]}, "limits[0] = 0"),
        ([[5]], {"references": [[5]]}, "references = 'given'"),
        ([[5]], {"method": COPIES}, "references = None: allowed is one list of ids"),
        ([[5]], {"method": COPIES, "references": [[5], [6]]}, "references = '2 lists'"),
    ],
)
def test_bad_input_is_named_before_anything_compiles(model, prompts, options, message):
  fresh = Generator(CONFIG, params=None, own_heads=model.own_heads)
  with pytest.raises(InputError) as caught:
    fresh.generate(prompts, **{"method": "blockwise", **options})
  assert message in str(caught.value)
  assert fresh.num_compilations == 0


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 3, "fsdp": 1, "model": 1}, "mesh = (3, 1, 1): allowed is sizes whose product"),
        ({"data": -1, "fsdp": -1}, "mesh = (-1, -1, 1): allowed is at most one -1"),
        ({"model": 0}, "mesh.model = 0: allowed is -1 or a positive integer"),
    ],
)
def test_mesh_that_does_not_divide_the_devices(sizes, message):
  with pytest.raises(InputError) as caught:
    make_partitioning(**sizes)
  assert message in str(caught.value)


def test_rows_come_back_in_order_whatever_the_batch(model):
  options = {"max_length": 11, "buckets": (40,)}
  with jax.enable_x64(True):
    alone = [model.generate([prompt], "blockwise", batch_size=1, **options) for prompt in PROMPTS]
    for batch_size in (2, 5, 8):
      together = model.generate(PROMPTS, "blockwise", batch_size=batch_size, **options)
      for row, one in enumerate(alone):
        assert together.tokens[row].tolist() == one.tokens[0].tolist()
        assert together.calls[row] == one.calls[0]
        assert together.traces[row] == one.traces[0]
      assert len(together.seconds) == len(together.is_warm) == -(-5 // batch_size)
    assert model.generate(PROMPTS, "blockwise", batch_size=8, **options).is_warm == [True]


@dataclasses.dataclass(frozen=True)
class Dice(Drafter):
  """Drafts what a row's key and the number of its tokens say."""

  depth: int = 3

  def init(self, params, prompt, context):
    return prompt.keys, jnp.zeros_like(prompt.lengths)

  def start(self, params, state, step, proposed):
    return state[0], state[1] + step.num_tokens

  def propose(self, params, state, noise, past):
    throw = lambda key, n: jax.random.randint(jax.random.fold_in(key, n), [3], 2, 64)
    tokens = jax.vmap(throw)(*state)
    return Lattice(tokens[..., None], jnp.zeros([*tokens.shape, 1]), 3 + 0 * state[1])


def test_keys_are_a_rows_own_whatever_the_batch(model):
  options = {"max_length": 9, "buckets": (40,)}
  drafts = lambda found: [[call.draft for call in trace] for trace in found.traces]
  with jax.enable_x64(True):
    expected = drafts(model.generate(PROMPTS, Dice(), batch_size=1, seed=3, **options))
    for batch_size in (2, 5, 8):
      found = model.generate(PROMPTS, Dice(), batch_size=batch_size, seed=3, **options)
      assert drafts(found) == expected
    other = drafts(model.generate(PROMPTS, Dice(), batch_size=8, seed=4, **options))
  assert len({str(row[0]) for row in expected + other}) == 2 * len(PROMPTS)


def test_traces_add_up_to_the_tokens(model):
  limits = [11, 1, 5, 11, 3]
  with jax.enable_x64(True):
    found = model.generate(PROMPTS, "blockwise", max_length=11, batch_size=8, limits=limits)
    greedy = model.generate(PROMPTS, "greedy", max_length=11, batch_size=8)
  for tokens, calls, trace, limit, base in zip(
      found.tokens, found.calls, found.traces, limits, greedy.tokens
  ):
    assert [t for call in trace for t in call.emitted] == tokens.tolist()
    assert len(trace) == calls and tokens.tolist() == base[:limit].tolist()
    assert trace[0].draft == [] and all(len(call.draft) == 3 for call in trace[1:])
    for call in trace:
      assert call.emitted[: call.num_accepted] == call.draft[: call.num_accepted]
      assert len(call.emitted) - call.num_accepted in (0, 1)
  assert found.block_efficiency == sum(map(len, found.tokens)) / sum(found.calls)
  assert greedy.block_efficiency == 1.0 and found.texts is None


def test_eos_ends_a_row_and_is_kept(model):
  """Drafts go on after EOS; rows don't."""
  with jax.enable_x64(True):
    free = model.generate(PROMPTS, "greedy", max_length=11, batch_size=8)
    # The third token of the first row becomes EOS, in a model that is the same.
    eos = int(free.tokens[0][2])
    ending = Generator(CONFIG.replace(eos_id=eos), model.params, own_heads=model.own_heads)
    expected = []
    for row in free.tokens:
      row = row.tolist()
      expected.append(row[: row.index(eos) + 1] if eos in row else row)
    assert len(expected[0]) <= 3
    for method in ("greedy", "blockwise", COPIES):
      known = {} if isinstance(method, str) else {"references": free.tokens}
      found = ending.generate(PROMPTS, method, max_length=11, batch_size=8, **known)
      assert [row.tolist() for row in found.tokens] == expected
      assert [[t for call in trace for t in call.emitted] for trace in found.traces] == expected
