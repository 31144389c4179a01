"""The training step: its loss against a plain one, frozen bases, accumulation, packing, devices."""

import dataclasses
import functools
import json
import subprocess
import sys

from devices import device_flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bpd_jax.addons.heads import Heads, HeadsReader
from bpd_jax.data.batches import assemble
from bpd_jax.decoding.types import Params
from bpd_jax.errors import InputError
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import EncoderDecoder, init_params
from bpd_jax.partitioning import make_partitioning, single_device
from bpd_jax.training.loss import (
    cross_entropy,
    head_losses,
    head_targets,
    Loss,
    repetitions,
    unlikelihood,
)
from bpd_jax.training.objective import decoder_states, TEXTS
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.step import place_batch, Step

CONFIG = ModelConfig(
    vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_encoder_layers=2,
    num_decoder_layers=2,
)
HEADS = Heads(3, 12)
PLAIN = Optimizer("adamw", 1e-2, "constant", 0)
JOINT = Loss(trains_base=True)


def random_params(config, heads=HEADS, seed=0):
  """Base and heads that aren't copies of head 1."""
  base = init_params(config, single_device(), jax.random.key(seed))
  own = heads.begin(config, single_device(), jax.random.key(seed))
  if own:
    shape = own["w2"].shape
    own["w2"] = 0.3 * jax.random.normal(jax.random.key(1), shape, config.param_dtype)
  return {"base": base, "own": own}


def random_batch(rows, lengths=(9, 7), seed=0, segments=1, vocab_size=40):
  """Rows of examples of random lengths."""
  rng = np.random.default_rng(seed)

  def tokens(most):
    drawn = rng.integers(2, vocab_size, rng.integers(1, most))
    return np.append(drawn, 1).astype(np.int32)

  def example():
    return [tokens(length // segments) for length in lengths]

  return assemble([[example() for _ in range(segments)] for _ in range(rows)], *lengths)


@functools.partial(jax.jit, static_argnums=0)
def plain_states(config, base, batch):
  """[batch, length, d_model], by the model's public methods."""
  apply = functools.partial(EncoderDecoder(config, single_device()).apply, {"params": base})
  mask = batch["encoder_segment_ids"] > 0
  encoded = apply(batch["encoder_input_tokens"], mask, method="encode")
  return apply(encoded, mask, batch["decoder_input_tokens"], method="decode")


def plain_loss(config, params, batch, loss, heads=HEADS):
  """The loss by what decodes and Python loops over unpacked rows."""
  model = EncoderDecoder(config, single_device())
  hidden = plain_states(config, params["base"], batch)
  states = hidden[:, :, None]
  if heads.block_size > 1:
    view = Params((), heads.view(params["own"]))
    others = HeadsReader(model).head_states(view, hidden, heads.block_size - 1)
    states = jnp.concatenate([states, others], axis=2)
  logits = model.apply({"params": params["base"]}, states, method="logits")
  log_probs = jax.nn.log_softmax(logits)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  vocab, label_smoothing = config.vocab_size, loss.label_smoothing
  # What each head should say, nothing where no token is, and what head 1 shouldn't.
  wanted, unwanted = np.zeros(logits.shape), np.zeros(logits.shape)
  lengths = (batch["decoder_segment_ids"] > 0).sum(axis=1)
  for i in range(heads.block_size):
    for row, length in enumerate(lengths):
      targets = batch["decoder_target_tokens"][row].tolist()
      for t in range(length - i):
        wanted[row, t, i] = label_smoothing / (vocab - 1)
        wanted[row, t, i, targets[t + i]] = 1 - label_smoothing
        if i == 0:
          unwanted[row, t, i, list({*targets[:t]} - {targets[t]})] = 1
  losses = -wanted * log_probs + wanted * np.log(np.where(wanted > 0, wanted, 1))
  losses -= loss.unlikelihood * unwanted * jnp.log1p(-jnp.exp(log_probs))
  is_counted = wanted.any(axis=-1)
  values = jnp.sum(losses, axis=-1) + loss.z_loss * is_counted * log_z**2
  means = jnp.sum(values, axis=(0, 1)) / is_counted.sum(axis=(0, 1))
  return jnp.sum(np.array(loss.weights(heads.block_size)) * means)


@functools.cache
def compiled(config, loss=JOINT, heads=HEADS, num_microbatches=1):
  """A step, and its jitted gradients."""
  step = Step(config, single_device(), PLAIN, loss, heads, num_microbatches=num_microbatches)
  return step, jax.jit(step.gradients)


def gradients(config, params, batch, key=jax.random.key(0), base=None, **options):
  return compiled(config, **options)[1](params, batch, key, base)


def largest_difference(a, b):
  return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("fields, heads, loss", [
    ({}, HEADS, JOINT),
    ({"is_tied": True, "is_gated": False, "activation": "relu"}, HEADS,
     Loss(True, head_weights=(1.0, 0.5, 0.0), label_smoothing=0.1, z_loss=1e-2)),
    ({}, Heads(1), Loss(True, unlikelihood=0.7)),
])
def test_loss_and_gradients_are_the_plain_ones(fields, heads, loss):
  config = CONFIG.replace(**fields).with_dtype("float64")
  params, batch = random_params(config, heads), random_batch(4, vocab_size=6)
  grads, metrics = gradients(config, params, batch, loss=loss, heads=heads)
  value, expected = jax.jit(
      jax.value_and_grad(lambda params: plain_loss(config, params, batch, loss, heads))
  )(params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
  assert largest_difference(grads, expected) < 1e-12


def test_head_targets_stay_in_their_segment():
  targets, masks = head_targets(
      jnp.array([[5, 6, 7, 8, 0]]), jnp.array([[1, 1, 2, 2, 0]]), 3
  )
  assert masks[:, 0].astype(int).tolist() == [[1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [0] * 5]
  assert targets[:, 0].tolist() == [[5, 6, 7, 8, 0], [6, 7, 8, 0, 0], [7, 8, 0, 0, 0]]
  # More heads than tokens.
  _, masks = head_targets(jnp.array([[5]]), jnp.array([[1]]), 3)
  assert masks[:, 0, 0].tolist() == [True, False, False]


def test_only_earlier_tokens_of_the_text_are_repetitions():
  targets, segments = jnp.array([[1, 2, 1, 3, 3, 1, 0]]), jnp.array([[1, 1, 1, 1, 2, 2, 0]])
  found = np.array(repetitions(targets, segments))[0]
  tokens = [np.array(targets)[0, row].tolist() for row in found]
  assert tokens == [[], [1], [2], [1, 2], [], [3], []]


def test_in_own_outputs_only_ends_of_repeated_3_grams_are_repetitions():
  # A text; an output with 1 2 3 and 2 3 4 twice, and one with a run; its first tokens end
  # no 3-gram of the output before.
  targets = [1, 2, 1] + [1, 2, 3, 4, 2, 1, 2, 3, 4, 3] + [4, 3, 5, 5, 5, 5]
  segments = [1] * 3 + [2] * 10 + [3] * 6
  found = np.array(repetitions(
      jnp.array([targets]), jnp.array([segments]), jnp.array([segments]) > 1
  ))[0]
  for t in range(3, len(targets)):
    first = segments.index(segments[t])
    grams = {tuple(targets[i - 2 : i + 1]) for i in range(first + 2, t)}
    is_repeated = t >= first + 2 and tuple(targets[t - 2 : t + 1]) in grams
    assert np.flatnonzero(found[t]).tolist() == [t] * is_repeated, t
  assert found[3:].sum() == 3
  assert [np.flatnonzero(row).tolist() for row in found[:3]] == [[], [0], [1]]


def test_of_own_outputs_only_repetitions_count():
  config = CONFIG.with_dtype("float64")
  params, loss = random_params(config), Loss(True, unlikelihood=0.7)
  batch = random_batch(4, vocab_size=4, lengths=(9, 30))
  is_output = np.arange(4)[:, None] > 1
  mixed = {**batch, "decoder_output_mask": np.broadcast_to(is_output, (4, 30))}
  grads, metrics = gradients(config, params, mixed, loss=loss)
  texts = {name: rows[:2] for name, rows in batch.items()}

  def plain(params):
    model, rest = EncoderDecoder(config, single_device()), slice(2, None)
    base, outputs = params["base"], {name: rows[rest] for name, rows in batch.items()}
    hidden = plain_states(config, base, outputs)
    log_probs = jax.nn.log_softmax(model.apply({"params": base}, hidden, method="logits"))
    ends = np.zeros(log_probs.shape)
    for row, tokens in enumerate(batch["decoder_target_tokens"][rest].tolist()):
      for t in range(2, (batch["decoder_segment_ids"][2 + row] > 0).sum()):
        gram = tokens[t - 2 : t + 1]
        if any(tokens[s - 2 : s + 1] == gram for s in range(2, t)):
          ends[row, t, tokens[t]] = 1
    assert ends.sum() > 2
    total = -jnp.sum(ends * jnp.log1p(-jnp.exp(log_probs)))
    count = (texts["decoder_segment_ids"] > 0).sum()
    return plain_loss(config, params, texts, loss) + loss.unlikelihood * total / count

  value, expected = jax.jit(jax.value_and_grad(plain))(params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
  assert largest_difference(grads, expected) < 1e-12
  assert metrics["count"][0] == (texts["decoder_segment_ids"] > 0).sum()


def test_unlikelihood_of_a_certain_repetition_is_finite():
  targets, segments = jnp.array([[1, 2]]), jnp.array([[1, 1]])
  value_and_grad = jax.value_and_grad(
      lambda logits: unlikelihood(logits, targets, repetitions(targets, segments))
  )
  # Token 1 again, as surely as the type can say.
  value, grad = value_and_grad(jnp.full([1, 2, 4], -1e4).at[:, :, 1].set(1e4))
  assert 30 < value < 40 and jnp.isfinite(grad).all()
  # Nearly: the gradient of a logit is p itself.
  _, grad = value_and_grad(jnp.zeros([1, 2, 4]).at[:, :, 1].set(20.0))
  np.testing.assert_allclose(grad[0, 1, 1], 1, atol=1e-6)


def test_label_smoothing_is_least_at_its_own_distribution():
  q = jnp.full([5], 0.1 / 4).at[2].set(0.9)
  loss, nll = cross_entropy(jnp.log(q)[None], jnp.array([2]), 0.1, 0.0)
  np.testing.assert_allclose(loss, 0, atol=1e-12)
  np.testing.assert_allclose(nll, -np.log(0.9), rtol=1e-12)


def test_packed_rows_give_what_their_examples_give_apart():
  config = CONFIG.with_dtype("float64")
  params = random_params(config)
  packed = random_batch(3, (30, 24), segments=3, vocab_size=6)
  examples = []
  for row in range(3):
    for segment in (1, 2, 3):
      pick = lambda side, name: packed[name][row][packed[f"{side}_segment_ids"][row] == segment]
      examples.append([(
          pick("encoder", "encoder_input_tokens"), pick("decoder", "decoder_target_tokens")
      )])
  apart = assemble(examples, 30, 24)
  loss = Loss(True, unlikelihood=1.0)
  grads, metrics = gradients(config, params, packed, loss=loss)
  expected, expected_metrics = gradients(config, params, apart, loss=loss)
  assert largest_difference(metrics, expected_metrics) < 1e-11
  assert largest_difference(grads, expected) < 1e-12
  # Without the segments they would differ.
  joined = {**packed, "encoder_segment_ids": (packed["encoder_segment_ids"] > 0).astype(np.int32)}
  assert largest_difference(gradients(config, params, joined, loss=loss)[0], expected) > 1e-4


def test_accumulation_is_one_batch():
  config = CONFIG.with_dtype("float64")
  params, batch = random_params(config), random_batch(4)
  # Microbatches of different weight, one of them without any target.
  batch["decoder_segment_ids"][1] = 0
  batch["decoder_segment_ids"][0, 3:] = 0
  one, many = (gradients(config, params, batch, num_microbatches=n) for n in (1, 4))
  assert largest_difference(one, many) < 1e-12


def test_metrics_count_what_heads_get_right():
  config = CONFIG.with_dtype("float64")
  params, batch = random_params(config), random_batch(4)
  logits = jax.jit(EncoderDecoder(config, single_device()).apply)(
      {"params": params["base"]}, batch["encoder_input_tokens"],
      batch["encoder_segment_ids"] > 0, batch["decoder_input_tokens"],
  )
  # What the model says, in two rows.
  batch["decoder_target_tokens"][:2] = np.argmax(logits[:2], axis=-1)
  _, metrics = gradients(config, params, batch)
  sums = compiled(config)[0].measure(params, batch)
  for name in ("nll", "correct", "count"):
    np.testing.assert_allclose(metrics[name], sums[name], rtol=1e-12)
  lengths = (batch["decoder_segment_ids"] > 0).sum(axis=1)
  assert sums["count"].tolist() == [np.maximum(lengths - i, 0).sum() for i in range(3)]
  is_real = batch["decoder_segment_ids"] > 0
  correct = (np.argmax(logits, axis=-1) == batch["decoder_target_tokens"]) & is_real
  assert lengths[:2].sum() <= sums["correct"][0] == correct.sum() < lengths.sum()
  named = head_losses(jax.device_get(sums))
  assert named["accuracy_head_1"] == sums["correct"][0] / sums["count"][0]
  np.testing.assert_allclose(
      sum(named[f"loss_head_{i}"] for i in (1, 2, 3)), metrics["loss"], rtol=1e-12
  )


def train(step, params, batch, num_steps, base=None):
  state = step.init(params)
  for _ in range(num_steps):
    state, metrics = step(state, batch, jax.random.key(0), base)
  return state, metrics


@pytest.mark.parametrize("texts", TEXTS)
def test_a_frozen_base_stays_bit_for_bit(texts):
  config = CONFIG.replace(dropout_rate=0.5)
  optimizer = Optimizer("adamw", 1e-2, "constant", 0, weight_decay=0.1)
  with jax.enable_x64(False):
    params = random_params(config)
    before, base = jax.tree.map(np.array, params), params.pop("base")
    step = Step(config, single_device(), optimizer, Loss(texts=texts), HEADS)
    state, _ = train(step, params, random_batch(4), 3, base)
  same = lambda x, y: jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), x, y))
  assert all(same(base, before["base"]))
  assert set(state.params) == {"own"} and not any(same(state.params["own"], before["own"]))


def test_heads_learn_the_same_from_cached_states():
  config = CONFIG.with_dtype("float64")
  params, batch = random_params(config), random_batch(4)
  base = params.pop("base")
  hidden = decoder_states(EncoderDecoder(config, single_device()), base, batch)
  different = jnp.abs(hidden - plain_states(config, base, batch))
  assert different[batch["decoder_segment_ids"] > 0].max() < 1e-12
  states = {name: x for name, x in batch.items() if not name.startswith("encoder")}
  grads, _ = gradients(config, params, batch, base=base, loss=Loss())
  cached, _ = gradients(config, params, {**states, "hidden": hidden}, base=base, loss=Loss())
  assert set(grads) == {"own"}
  assert largest_difference(grads, cached) < 1e-13


def test_heads_behind_a_frozen_base_learn_as_with_one_that_learns():
  config = CONFIG.with_dtype("float64")
  params, batch = random_params(config), random_batch(4)
  joint, metrics = gradients(config, params, batch)
  base = params.pop("base")
  grads, frozen = gradients(config, params, batch, base=base, loss=Loss())
  assert largest_difference(grads, {"own": joint["own"]}) < 1e-13
  assert largest_difference(metrics, frozen) < 1e-12
  measured = compiled(config, loss=Loss())[0].measure(params, batch, base)
  assert largest_difference(
      measured, compiled(config)[0].measure({"base": base, **params}, batch)
  ) < 1e-12
  # Dropout is the base's own, and a head that weighs nothing is measured too.
  config, loss = config.replace(dropout_rate=0.5), Loss(head_weights=(1.0, 1.0, 0.0))
  dropped, _ = gradients(config, params, batch, base=base, loss=Loss())
  assert largest_difference(grads, dropped) < 1e-13
  step = compiled(config, loss=loss)[0]
  assert largest_difference(measured, step.measure(params, batch, base)) < 1e-12


def test_one_random_head_has_the_gradient_of_all_on_average():
  config = CONFIG.with_dtype("float64")
  params, batch = random_params(config), random_batch(4)
  weights = (1.0, 0.7, 0.3)
  loss = Loss(True, head_weights=weights, one_random_head=True)
  everything, _ = gradients(
      config, params, batch, loss=dataclasses.replace(loss, one_random_head=False)
  )
  by_head = {}
  for seed in range(40):
    grads, metrics = gradients(config, params, batch, jax.random.key(seed), loss=loss)
    (head,) = np.flatnonzero(metrics["count"])
    by_head[int(head)] = grads
  assert sorted(by_head) == [0, 1, 2]
  mean = jax.tree.map(lambda *parts: sum(parts) / 3, *by_head.values())
  assert largest_difference(mean, everything) < 1e-12


def test_parallel_heads_learn_on_positions_that_are_drawn():
  config = CONFIG.with_dtype("float64")
  params, batch = random_params(config), random_batch(4)
  weights, stride = (1.0, 0.7, 0.3), 3
  loss, by_offset = Loss(True, head_weights=weights, draft_stride=stride), {}
  _, everything = gradients(
      config, params, batch, loss=dataclasses.replace(loss, draft_stride=1)
  )
  for seed in range(8):
    grads, metrics = gradients(config, params, batch, jax.random.key(seed), loss=loss)
    halves, _ = gradients(
        config, params, batch, jax.random.key(seed), loss=loss, num_microbatches=2
    )
    assert largest_difference(grads, halves) < 1e-12
    expected = np.sum(np.array(weights) * metrics["nll"] / metrics["count"])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)
    by_offset[float(metrics["nll"][1])] = metrics
  assert len(by_offset) == stride
  for name in ("nll", "count"):
    total = sum(metrics[name] for metrics in by_offset.values())
    np.testing.assert_allclose(total, everything[name] * np.array([stride, 1, 1]), rtol=1e-12)
  # A model without parallel heads has nothing to thin out.
  alone = {"heads": Heads(1)}
  params = random_params(config, **alone)
  thinned, _ = gradients(config, params, batch, loss=Loss(True, draft_stride=stride), **alone)
  assert largest_difference(thinned, gradients(config, params, batch, **alone)[0]) == 0


def test_dropout_is_drawn_from_the_key():
  config = CONFIG.replace(dropout_rate=0.3).with_dtype("float64")
  params, batch = random_params(config), random_batch(4)
  first, again, other = (
      gradients(config, params, batch, jax.random.key(seed)) for seed in (0, 0, 1)
  )
  assert largest_difference(first, again) == 0 < largest_difference(first[0], other[0])


def test_the_average_follows_the_parameters():
  config = CONFIG.with_dtype("float64")
  step = Step(config, single_device(), PLAIN, JOINT, HEADS, average_decay=0.9)
  params = random_params(config)
  start = jax.tree.map(np.array, params)
  state, batch = step.init(params), random_batch(4)
  expected = start
  for _ in range(3):
    state, _ = step(state, batch, jax.random.key(0))
    expected = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, expected, state.params)
  assert largest_difference(state.average, expected) < 1e-12
  assert largest_difference(step.averaged(state), expected) < 1e-12


@pytest.mark.parametrize("optimizer", [
    Optimizer(warmup_steps=5, weight_decay=0.1), Optimizer("adamw", 1e-2, "constant", 0),
    Optimizer("muon", 0.02, "constant", 5),
])
def test_a_batch_is_learned_by_heart(optimizer):
  with jax.enable_x64(False):
    step = Step(CONFIG, single_device(), optimizer, JOINT, HEADS)
    state, metrics = train(step, random_params(CONFIG), random_batch(4), 150)
  assert int(state.step) == 150
  assert (metrics["correct"] / metrics["count"] > 0.9).all()


def test_schedules():
  rate = Optimizer("adafactor", 1.0, "rsqrt", 100).rate()
  np.testing.assert_allclose([rate(s) for s in (0, 49, 100, 400)], [0.01, 0.5, 1, 0.5])
  rate = Optimizer("adamw", 2.0, "cosine", 10, 110, 0.1).rate()
  np.testing.assert_allclose([rate(s) for s in (9, 10, 60, 110, 200)], [2, 2, 1.1, 0.2, 0.2])
  rate = Optimizer("adamw", 2.0, "linear", 0, 100).rate()
  np.testing.assert_allclose([rate(s) for s in (0, 50, 100)], [2, 1, 0])


def test_adafactor_decays_by_the_learning_rate():
  optimizer = Optimizer("adafactor", 0.1, "constant", 0, weight_decay=0.5).make()
  params = {"w": jnp.array([2.0])}
  updates, _ = optimizer.update({"w": jnp.zeros(1)}, optimizer.init(params), params)
  np.testing.assert_allclose(updates["w"], [-0.5 * 0.1 * 2.0])
  assert isinstance(optax.apply_updates(params, updates), dict)


def test_muon_moves_everything_by_its_share_and_kernels_in_all_directions():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
  params = {"kernel": 3 * draw(2, 16, 24), "embedding": 0.2 * draw(40, 16)}
  # Gradients that point into few directions.
  grads = {
      "kernel": draw(2, 16, 1) @ draw(2, 1, 24) + 0.05 * draw(2, 16, 24),
      "embedding": draw(40, 1) @ draw(1, 16),
  }
  optimizer = Optimizer("muon", 0.01, "constant", 0, b1=0.95).make()
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
  # Adam's first step, with Nesterov momentum, is 1.5 everywhere.
  for name, share in (("kernel", 1.0), ("embedding", 1.5)):
    assert abs(rms(updates[name]) / rms(params[name]) / 0.01 / share - 1) < 0.3, name
  given, taken = (np.linalg.svd(x["kernel"][1], compute_uv=False) for x in (grads, updates))
  assert given[0] / given[-1] > 30 and taken[0] / taken[-1] < 3


@pytest.mark.parametrize("make, message", [
    (lambda: Optimizer("sgd"), "Optimizer.name"),
    (lambda: Optimizer(schedule="cosine"), "Optimizer.decay_steps"),
    (lambda: Optimizer(schedule="step"), "Optimizer.schedule"),
    (lambda: Optimizer(learning_rate=0), "Optimizer.learning_rate"),
    (lambda: Optimizer(warmup_steps=0), "Optimizer.warmup_steps"),
    (lambda: Loss(label_smoothing=1), "Loss.label_smoothing"),
    (lambda: Loss(unlikelihood=-1), "Loss.unlikelihood"),
    (lambda: Loss(unlikelihood=1, one_random_head=True), "Loss.unlikelihood"),
    (lambda: Loss(texts="both"), r"Loss\.texts = 'both': allowed is one of \('references', 'outp"),
    (lambda: Loss(True, "outputs"), r"Loss\.texts = 'outputs': allowed is references where"),
    (lambda: make_step(loss=Loss(head_weights=(1.0,))), "Loss.head_weights"),
    (lambda: make_step(Heads(1), Loss(texts="outputs")),
     r"Heads\.block_size = 1: allowed is 2 or more behind a frozen base"),
    (lambda: make_step(CONFIG), "objective = 'Loss': allowed is one that trains ModelConfig"),
    (lambda: make_step(average_decay=1), "average_decay"),
    (lambda: make_step(num_microbatches=0), "num_microbatches"),
])
def test_bad_arguments_are_named(make, message):
  with pytest.raises(InputError, match=message):
    make()


def make_step(heads=HEADS, loss=JOINT, **options):
  return Step(CONFIG, single_device(), PLAIN, loss, heads, **options)


SHARDED = ModelConfig(
    vocab_size=512, d_model=256, d_ff=256, d_kv=32, num_heads=8, num_encoder_layers=2,
    num_decoder_layers=2,
)
SHARDED_HEADS = Heads(3, 256)
OPTIMIZERS = {
    "adafactor": Optimizer(warmup_steps=1, weight_decay=0.01),
    "adamw": Optimizer("adamw", 1e-2, "cosine", 1, 10, weight_decay=0.01),
}


def sharded_report():
  """Run in a process with 8 devices: differences from one device, and shardings."""
  jax.config.update("jax_enable_x64", True)
  # What the compiler made is read.
  jax.config.update("jax_enable_compilation_cache", False)
  config = SHARDED.with_dtype("float64")
  places = {"one": single_device(), "mesh": make_partitioning(2, 2, 2)}
  report = {"devices": len(jax.devices()), "differences": {}, "places": {}}
  results = {}
  for where, place in places.items():
    batch = place_batch(place, random_batch(8))
    for name, optimizer in OPTIMIZERS.items():
      step = Step(
          config, place, optimizer, JOINT, SHARDED_HEADS, num_microbatches=2, average_decay=0.9
      )
      shardings = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state)
      params = jax.device_put(random_params(config, SHARDED_HEADS), shardings.params)
      if (where, "gradients") not in results:
        program = jax.jit(step.gradients).lower(params, batch, jax.random.key(0)).compile()
        results[where, "gradients"] = jax.device_get(program(params, batch, jax.random.key(0)))
      state, metrics = step(step.init(params), batch, jax.random.key(0))
      results[where, name] = jax.device_get((state.params, state.average, metrics))
      alike = jax.tree.map(
          lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim),
          state, shardings,
      )
      split = [
          leaf.size // leaf.addressable_shards[0].data.size
          for leaf in jax.tree.leaves((state.params, state.average, state.opt_state))
          if leaf.size >= 1 << 16
      ]
      report["places"][f"{where} {name}"] = [all(jax.tree.leaves(alike)), len(split), min(split)]
  for name in ("gradients", *OPTIMIZERS):
    report["differences"][name] = largest_difference(results["one", name], results["mesh", name])
  # Logits of one head and one microbatch: 4 rows over data and fsdp, vocabulary over model.
  text = program.as_text()
  report["has_split_logits"] = "f64[1,7,256]" in text
  report["has_whole_logits"] = "f64[4,7,512]" in text
  print(json.dumps(report))


@pytest.fixture(scope="module")
def report():
  code = "import test_step; test_step.sharded_report()"
  done = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=False,
      cwd=__file__.rpartition("/")[0],
      env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": device_flags(8),
           "PATH": ""},
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # Compiles for eight devices in a process of its own.
def test_eight_devices_give_one_devices_gradients_and_parameters(report):
  assert report["devices"] == 8
  assert set(report["differences"]) == {"gradients", "adafactor", "adamw"}
  assert all(difference < 1e-8 for difference in report["differences"].values()), report


@pytest.mark.slow  # The same processes.
def test_parameters_moments_and_logits_are_split(report):
  for name, (is_placed, num_large, least_split) in report["places"].items():
    assert is_placed, name
    # AdamW has two moments of each.
    assert num_large > (60 if "adamw" in name else 30), name
    assert least_split >= (4 if "mesh" in name else 1), name
  assert report["has_split_logits"] and not report["has_whole_logits"]
