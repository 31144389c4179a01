"""Probes seed drafts and change nothing: real columns never see them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpd_jax.decoding import tree as trees
from bpd_jax.decoding.types import Tree
from bpd_jax.errors import InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import decode_view, EncoderDecoder, init_params
from bpd_jax.model.probes import column_mask, ProbeSpec
from bpd_jax.partitioning import single_device

CONFIG = ModelConfig(
    vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=3, relpos_buckets=8, relpos_max_distance=20,
).with_dtype("float64")
LENGTHS = np.array([5, 2])
SLOTS = 12
# Of one size, so that they share compiled programs.
TREES = {"chain": [-1, 0, 1, 2, 3, 4], "branches": [-1, 0, 0, 1, 1, 2]}


@pytest.fixture(scope="module", autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def call(x64):
  """Runs a block over random committed columns; returns hidden, keys, values, probes."""
  rng = np.random.default_rng(0)
  place = single_device()
  params = init_params(CONFIG, place, jax.random.key(0))
  # Nothing at its start value: norms and relative biases count.
  params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)
  view = decode_view(CONFIG, params)
  model = EncoderDecoder(CONFIG, place, is_view=True)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
  cache = [
      (draw(2, 2, 8, SLOTS), draw(2, 2, SLOTS, 8)) for _ in range(CONFIG.num_decoder_layers)
  ]
  mask = jnp.array([[True] * 6, [True] * 3 + [False] * 3])
  cross = model.apply({"params": view}, draw(2, 6, 16), method="cross_keys_values")

  @functools.partial(jax.jit, static_argnames="probes")
  def block(view, tokens, depth, visible, past, probes):
    return model.apply(
        {"params": view}, tokens, depth, visible, past, LENGTHS, cross, mask, probes,
        method="decode_block",
    )

  def run(tokens, tree, probes=None, past=cache):
    return block(view, tokens, tree.depth[None], trees.ancestors(tree)[None], past, probes)

  run.embedding = view["embedding"]
  run.cache = cache
  return run


def make_tree(parents):
  depth = []
  for parent in parents:
    depth.append(0 if parent < 0 else depth[parent] + 1)
  return Tree(
      tokens=jnp.zeros([2, len(parents)], jnp.int32), depth=np.array(depth, np.int32),
      parents=np.array(parents, np.int32), is_valid=None, max_depth=max(depth),
  )


def random_tokens(nodes):
  return jnp.asarray(np.random.default_rng(nodes).integers(2, 40, [2, nodes]))


@functools.cache
def noise_states(per_node):
  return lambda x: jnp.sin(jnp.arange(x.size * per_node, dtype=x.dtype)).reshape(
      x.shape[:2] + (per_node, x.shape[2])
  )


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("enter_layer", [0, 1, 2])
@pytest.mark.parametrize("per_node, visibility", [(1, "causal"), (3, "causal"), (2, "own")])
def test_real_columns_never_see_probes(call, shape, enter_layer, per_node, visibility):
  tree, tokens = make_tree(TREES[shape]), random_tokens(len(TREES[shape]))
  spec = ProbeSpec(enter_layer, per_node, noise_states(per_node), visibility)
  hidden, keys, values, none = call(tokens, tree)
  with_probes = call(tokens, tree, spec)
  assert none is None and with_probes[3].shape == (2, tokens.shape[1], per_node, 16)
  for one, other in zip((hidden, *keys, *values), (with_probes[0], *with_probes[1],
                                                   *with_probes[2])):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", TREES)
def test_token_probe_is_a_child_with_that_token(call, shape):
  """At layer 0 a probe of a token's embedding says what a node of that token says."""
  parents = TREES[shape]
  tree, tokens, token = make_tree(parents), random_tokens(len(parents)), 7
  states = lambda x: jnp.broadcast_to(call.embedding[token], x.shape[:2] + (2, 16))
  _, _, _, probes = call(tokens, tree, ProbeSpec(0, 2, states))
  for node in range(len(parents)):
    # Two more nodes, one after the other, in the place of the node's probes.
    longer = make_tree([*parents, node, len(parents)])
    more = jnp.concatenate([tokens, jnp.full([2, 2], token)], axis=1)
    hidden = call(more, longer)[0]
    np.testing.assert_allclose(probes[:, node], hidden[:, -2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("visibility, seen", [("causal", [0, 1]), ("own", [1])])
def test_probe_sees_what_its_visibility_says(call, visibility, seen):
  tree, tokens = make_tree(TREES["branches"]), random_tokens(6)

  def second_probe_of_node_3(shift):
    states = lambda x: noise_states(2)(x) + shift
    spec = ProbeSpec(1, 2, states, visibility)
    return call(tokens, tree, spec)[3][0, 3, 1].sum()

  pull = jax.grad(second_probe_of_node_3)(jnp.zeros([2, 6, 2, 16], jnp.float64))
  where = {tuple(x) for x in np.argwhere(np.abs(pull).sum(-1) > 0)}
  assert where == {(0, 3, probe) for probe in seen}


def test_probe_sees_its_ancestors_and_the_committed_prefix(call):
  parents = TREES["branches"]
  tree, tokens = make_tree(parents), random_tokens(len(parents))
  spec = ProbeSpec(1, 1, noise_states(1))

  def probe_of_node_3(past):
    return call(tokens, tree, spec, past)[3][1, 3, 0].sum()

  pull = jax.grad(probe_of_node_3)(call.cache)
  # A layer below the probe's entrance reaches it through its ancestors.
  slots = np.abs(pull[2][0]).sum((1, 2)) > 0
  assert slots[1].tolist() == [slot < LENGTHS[1] for slot in range(SLOTS)] and not slots[0].any()
  before = call(tokens, tree, spec)[3]
  for node in range(len(parents)):
    changed = call(tokens.at[:, node].set((tokens[:, node] + 1) % 40), tree, spec)[3]
    moved = np.abs(changed - before).max((0, 2, 3)) > 1e-9
    assert moved.tolist() == trees.ancestors(tree)[:, node].tolist()


def test_mask_of_the_docstring():
  found = column_mask(np.tril(np.ones([1, 2, 2], bool)), 2, "causal")[0].astype(int)
  assert found.tolist() == [
      [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0],
      [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1],
  ]


@pytest.mark.parametrize(
    "spec, field",
    [((3, 1), "enter_layer"), ((-1, 1), "enter_layer"), ((0, 0), "per_node"),
     ((0, 1, "all"), "visibility")],
)
def test_spec_names_the_field_that_is_wrong(call, spec, field):
  enter_layer, per_node, *rest = spec
  tree = make_tree([-1, 0])
  with pytest.raises(InputError, match=f"ProbeSpec.{field}"):
    call(random_tokens(2), tree, ProbeSpec(enter_layer, per_node, noise_states(1), *rest))
