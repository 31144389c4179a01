"""Numbers that aren't: NaN and infinity end a decoding, and what isn't read disturbs nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_loop
from test_loop import make_rows, MAX_LENGTH, MODEL, NoisyDrafter

from bpd_jax import decode
from bpd_jax.addons.addon import make_addon
from bpd_jax.addons.folder import save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import save_model
from bpd_jax.data.datasets import open_task
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.decoding import accept, loop
from bpd_jax.decoding.drafters.reference import ReferenceDrafter
from bpd_jax.decoding.lattice import BLOCK, first_max, top_k_lattice
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.scorers.no_repeat import NoRepeatScorer
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Params, Prompt
from bpd_jax.evaluate import evaluate
from bpd_jax.evaluation.replay import record, replay
from bpd_jax.evaluation.run import Method
from bpd_jax.evaluation.validation import Evaluation, Validation
from bpd_jax.evaluation.watch import watch
from bpd_jax.generation import Generator, NotFinite
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device
from bpd_jax.training.loss import Loss
from bpd_jax.training.optimizer import Optimizer
from bpd_jax.training.step import Step
from bpd_jax.vocabulary import open_vocabulary

NAN, INF = float("nan"), float("inf")
# What 0 × inf gives on x86; a sort puts it below all numbers.
NEGATIVE_NAN = np.copysign(np.float32(NAN), np.float32(-1))
CONFIG = ModelConfig(
    vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=2,
)
HEADS = Heads(4, 24)
BYTES = CONFIG.replace(vocab_size=384)
OPTIONS = {"max_length": 12, "batch_size": 4, "buckets": (16,)}
# Longer and shorter ones, so that slots of a batch aren't prompts in order.
PROMPTS = [[20] * 9, [21], [22] * 12, [23] * 4, [24] * 7]


@pytest.fixture(scope="module")
def params():
  return jax.device_get(init_params(CONFIG, single_device(), jax.random.key(2)))


@pytest.fixture(scope="module")
def own():
  """The heads' parameters."""
  own = jax.device_get(HEADS.begin(CONFIG, single_device(), jax.random.key(5)))
  own["w2"] = np.random.default_rng(0).standard_normal(own["w2"].shape, np.float32) / 4
  return own


def changed(params, path, place, value):
  """A copy of the parameters with one number changed."""
  path = path.split("/")
  leaf = params
  for name in path:
    leaf = leaf[name]
  leaf = np.array(leaf)
  leaf[place] = value
  for i in range(len(path) - 1, -1, -1):
    inside = params
    for name in path[:i]:
      inside = inside[name]
    leaf = {**inside, path[i]: leaf}
  return leaf


@pytest.mark.parametrize("n", [7, BLOCK * 40 + 3])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("values, is_finite", [
    ({}, True), ({1: NAN}, False), ({1: NEGATIVE_NAN}, False), ({0: NAN, 5: INF}, False),
    ({3: INF}, False), ({3: -INF}, True), ({3: NAN, 4: -INF}, False), ("none", False),
])
def test_a_largest_logit_that_is_no_number_is_seen(n, k, values, is_finite):
  logits = np.random.default_rng(0).standard_normal([2, 3, n]).astype(np.float32)
  if values == "none":
    logits[1, 1] = -INF
  else:
    for place, value in values.items():
      logits[1, 1, place] = value
  largest, index = jax.jit(first_max)(logits)
  expected = np.ones([2, 3], bool)
  expected[1, 1] = is_finite
  np.testing.assert_array_equal(np.isfinite(largest), expected)
  assert (index >= 0).all() and (index < n).all()
  for num_steps, seen in ((3, is_finite), (2, is_finite), (1, True), (0, True)):
    lattice = jax.jit(top_k_lattice, static_argnums=1)(
        logits, k, np.array([3, num_steps], np.int32)
    )
    assert lattice.is_finite.tolist() == [True, seen]


def forgetful(seed, eos_position, bad_position):
  """The table model, whose logits after `bad_position` tokens are no numbers: [batch] each."""
  verify = MODEL.verify(seed, eos_position)

  def run(cache, tree):
    position = cache.lengths[:, None] + tree.depth
    is_bad = position == bad_position[:, None]
    verified = verify(cache, tree)
    logits = jnp.where(is_bad[..., None], NAN, verified.logits)
    # A choice that many a rule would take for one.
    choice = jnp.where(is_bad, 0, verified.choice)
    return dataclasses.replace(verified, logits=logits, choice=choice, is_finite=~is_bad)

  return run


@functools.partial(jax.jit, static_argnames=("drafter", "rule"))
def decode_forgetful(drafter, rule, table, seed, eos_position, limits, bad_position):
  depth = drafter.depth
  parts = loop.Loop(
      forgetful(seed, eos_position, bad_position), drafter, Params((), table),
      SearchSettings(), MODEL.eos_id, rule=rule,
  )
  return test_loop.decode(
      parts, Prompt(table, limits, MAX_LENGTH), seed, limits, depth + 1
  )


@pytest.mark.parametrize("hit_rate", [0, 0.8, 1])
@pytest.mark.parametrize("rule", [
    accept.ExactMatch(), accept.ApproximateTopK(2), accept.ApproximateDistance(1),
    accept.ApproximateMinimumBlock(3),
], ids=lambda rule: type(rule).__name__)
def test_a_row_fails_where_greedy_would_and_nowhere_else(rule, hit_rate):
  """Limits, EOS and dead rows at every place, and the place where the model has no choice."""
  rng = np.random.default_rng(4)
  seed, eos_position, limits, greedy = make_rows(rng, 256)
  table = test_loop.draft_table(rng, greedy, 4, hit_rate)
  bad_position = rng.integers(0, MAX_LENGTH + 4, 256).astype(np.int32)
  state = jax.device_get(decode_forgetful(
      NoisyDrafter(4), rule, table, seed, eos_position, limits, bad_position
  ))
  failed = state.failure == 1
  assert not (state.failure > 1).any() and state.is_done.all()
  # Nothing stands behind the place, whatever a rule lets pass.
  assert (state.num_tokens <= bad_position)[failed].all()
  assert (state.num_tokens[failed] == bad_position[failed]).all()
  if rule == accept.ExactMatch():
    # The tokens before it are greedy's, and a row that needs no choice there is whole.
    lengths = np.minimum(limits, eos_position + 1)
    np.testing.assert_array_equal(failed, lengths > bad_position)
    np.testing.assert_array_equal(state.num_tokens, np.minimum(lengths, bad_position))
    for row in range(256):
      n = state.num_tokens[row]
      assert state.tokens[row, :n].tolist() == greedy[row, :n].tolist()
      assert state.trace.num_emitted[row].sum() == n
  assert failed.any() and not failed.all() and (limits == 0).any()


def test_rows_of_other_failures_are_named_apart():
  """Of a drafter that isn't finite from its second draft on, and of the model before it."""

  class Broken(NoisyDrafter):

    def propose(self, params, state, noise, past):
      lattice = super().propose(params, state, noise, past)
      return lattice.replace(is_finite=state[1] < 2)

  rng = np.random.default_rng(0)
  seed, _, _, greedy = make_rows(rng, 3)
  eos_position, limits = np.array([9, 9, 1], np.int32), np.full([3], 12, np.int32)
  bad_position = np.array([99, 0, 99], np.int32)
  table = test_loop.draft_table(rng, greedy, 2, 0)
  state = decode_forgetful(
      Broken(2), accept.ExactMatch(), table, seed, eos_position, limits, bad_position
  )
  # The third row has ended when the drafter breaks.
  assert [loop.FAILURES[i] for i in state.failure] == [
      "a head's largest logit", "the base model's largest logit", None
  ]
  assert state.num_calls.tolist() == [3, 1, 2]


@pytest.mark.parametrize("method", ["greedy", "blockwise", ReferenceDrafter(3)], ids=str)
@pytest.mark.parametrize("path, place, value", [
    ("decoder/layers/mlp/wo", (1, 3, 5), NAN), ("embedding", (0, 0), NAN),
    ("encoder/norm/scale", (2,), INF), ("logits_kernel", (4, 9), NAN),
    ("logits_kernel", (4, 9), INF), ("decoder/norm/scale", (0,), -INF),
])
def test_one_number_that_is_none_ends_every_method(params, own, path, place, value, method):
  model = Generator(CONFIG, changed(params, path, place, value), own_heads=(HEADS, own))
  references = [[5] * 12] * 5 if isinstance(method, ReferenceDrafter) else None
  with pytest.raises(NotFinite) as caught:
    model.generate(PROMPTS, method, references=references, **OPTIONS)
  # The first of the batch of the shortest prompts, which is decoded first.
  assert str(caught.value) == (
      "prompts[0], call 1: the base model's largest logit = 'not finite': allowed is a finite "
      "number; parameters may hold NaN or infinity"
  )


def test_the_row_is_the_prompts_and_the_call_its_own(params, own):
  whole = Generator(CONFIG, params)
  for row, token in ((2, 22), (3, 23)):
    changed_params = changed(params, "embedding", (token, 3), NAN)
    model = Generator(CONFIG, changed_params, own_heads=(HEADS, own))
    with pytest.raises(NotFinite, match=rf"^prompts\[{row}\], call 1: the base model's"):
      model.generate(PROMPTS, "blockwise", **OPTIONS)
    others = [prompt for prompt in PROMPTS if token not in prompt]
    found, expected = (x.generate(others, "greedy", **OPTIONS) for x in (model, whole))
    for one, other in zip(found.tokens, expected.tokens):
      if token not in one:
        assert one.tolist() == other.tolist()
  # A token that one row alone writes: the call that reads it has no choice.
  greedy = whole.generate(PROMPTS, "greedy", **OPTIONS)
  rows = [row.tolist() for row in greedy.tokens]
  row, token = next(
      (r, t) for r, tokens in enumerate(rows) for t in tokens[1:-1]
      if sum(t in other for other in rows) == 1 and not any(t in p for p in PROMPTS)
      and t != tokens[0] and t not in (0, 1)
  )
  model = Generator(CONFIG, changed(params, "embedding", (token, 3), NAN))
  with pytest.raises(NotFinite) as caught:
    model.generate(PROMPTS, "greedy", **OPTIONS)
  assert (caught.value.row, caught.value.call) == (row, rows[row].index(token) + 2)
  limits = [12] * len(rows)
  limits[row] = rows[row].index(token) + 1
  cut = model.generate(PROMPTS, "greedy", limits=limits, **OPTIONS)
  assert [x.tolist() for x in cut.tokens] == [x[:n] for x, n in zip(rows, limits)]


@pytest.mark.parametrize("options", [
    {}, {"top_k": 3}, {"top_k": 3, "search": SearchSettings("p_best", num_paths=2)},
], ids=["plain", "chain", "p_best"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_head_that_is_none_is_said_where_it_drafts(params, own, options, value):
  options = dict(options)
  whole = Generator(CONFIG, params, own_heads=(HEADS, own))
  model = Generator(CONFIG, params, own_heads=(HEADS, changed(own, "w2", (2, 0, 0), value)))
  with pytest.raises(NotFinite, match=r"^prompts\[0\], call 2: a head's largest logit"):
    heads = model.heads(top_k=options.pop("top_k", 1))
    model.generate(PROMPTS, heads, **options, **OPTIONS)
  if heads.drafter.num_candidates == 1:
    # Neither greedy nor two heads read head 4.
    for block_size in (1, 3):
      found, expected = (
          x.generate(PROMPTS, x.heads(block_size), **OPTIONS) for x in (model, whole)
      )
      assert [x.tolist() for x in found.tokens] == [x.tolist() for x in expected.tokens]
      assert found.calls == expected.calls


SEARCHES = {
    "chain": SearchSettings(), "p_best": SearchSettings("p_best", num_paths=3),
    "batched": SearchSettings("batched", num_paths=2),
    "best_first": SearchSettings("best_first", num_nodes=6),
}


@dataclasses.dataclass(frozen=True)
class Constant(NoRepeatScorer):
  """Says one thing of every candidate."""

  value: float = 0.0
  context: int = 1

  def bound(self, params, state, before, candidates, i):
    shape = (*before.shape, candidates.shape[1])
    return jnp.full(shape, self.value, jnp.float32)


@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_scorer_that_says_nan_is_told_and_one_that_rules_out_isnt(
    params, own, search, context
):
  model = Generator(CONFIG, params, own_heads=(HEADS, own))
  # So many that a CPU compares them in vectors.
  options = {"method": model.heads(top_k=40), "search": SEARCHES[search], **OPTIONS}
  with pytest.raises(NotFinite, match=r"^prompts\[0\], call 2: what a path is worth"):
    model.generate(PROMPTS, scoring=[Scoring(Constant(NAN, context))], **options)
  greedy = model.generate(PROMPTS, "greedy", **OPTIONS)
  for scoring in (Scoring(Constant(-INF, context)), Scoring(Constant(NAN, context), weight=0.0)):
    found = model.generate(PROMPTS, scoring=[scoring], **options)
    assert [x.tolist() for x in found.tokens] == [x.tolist() for x in greedy.tokens]


def test_a_small_model_that_is_none(params, own):
  small = CONFIG.replace(d_model=8, num_decoder_layers=1)
  bad = jax.device_get(init_params(small, single_device(), jax.random.key(5)))
  bad = changed(bad, "decoder/layers/mlp/wo", (0, 1, 1), NEGATIVE_NAN)
  scoring = [Generator(small, bad).scoring()]
  model = Generator(CONFIG, params, own_heads=(HEADS, own))
  for search in ("chain", "best_first"):
    with pytest.raises(NotFinite, match="what a path is worth"):
      model.generate(
          PROMPTS, model.heads(top_k=3), search=SEARCHES[search], scoring=scoring, **OPTIONS
      )


def test_replay_says_so_too(params, own):
  model = Generator(CONFIG, params, own_heads=(HEADS, own))
  greedy = model.generate(PROMPTS, "greedy", **OPTIONS)
  recording = record(model, PROMPTS, greedy, 12)
  broken = Generator(CONFIG, params, own_heads=(HEADS, changed(own, "w1", (0, 1, 1), NAN)))
  with pytest.raises(NotFinite, match=r"^prompts\[0\], call 2: a head's largest logit"):
    replay(broken, recording, batch_size=8)
  with pytest.raises(NotFinite, match=r"^prompts\[3\], call 2: a head's largest logit"):
    watch(broken, recording, 3)


def test_decode_names_the_prompts_line(params, own, bytes_vocabulary, tmp_path):
  params = {**params, "embedding": np.full([384, 16], NAN, np.float32),
            "logits_kernel": np.ones([16, 384], np.float32)}
  save_model_with(tmp_path / "model", BYTES, params, bytes_vocabulary, HEADS, own)
  (tmp_path / "p.txt").write_text("\na\n")
  with pytest.raises(NotFinite, match=r"p\.txt:2, call 1: the base model's largest logit"):
    decode.main(["--checkpoint", str(tmp_path / "model"), "--file", str(tmp_path / "p.txt"),
                 "--max-length", "4"])


@pytest.fixture
def bytes_vocabulary(tmp_path):
  """A file that makes texts bytes, whose ids are those plus 3."""
  path = tmp_path / "tokenizer_config.json"
  path.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
  return path


@pytest.fixture
def bad_tilde(params):
  """Parameters of `BYTES` that are NaN where a ~ is read, which they never write."""
  rng = np.random.default_rng(1)
  wide = lambda shape: rng.standard_normal(shape).astype(np.float32)
  params = {**params, "embedding": wide([384, 16]), "logits_kernel": wide([16, 384])}
  params = changed(params, "embedding", (ord("~") + 3, 0), NAN)
  params["logits_kernel"][:, ord("~") + 3] = 0
  return params


def test_evaluate_names_the_tasks_row(bad_tilde, bytes_vocabulary, tmp_path):
  save_model(tmp_path / "model", BYTES, bad_tilde, bytes_vocabulary)
  rows = tmp_path / "rows.jsonl"
  rows.write_text('{"inputs": "a text"}\n{"inputs": "b"}\n{"inputs": "a ~"}\n')
  with pytest.raises(NotFinite, match=r"rows\.jsonl:3, call 1: the base model's largest"):
    evaluate(
        str(tmp_path / "model"), [JsonlTask("mine", str(rows))], [], str(tmp_path / "out"),
        max_decode_length=8, batch_size=2, repeats=1,
    )
  assert not (tmp_path / "out").exists()


def test_a_report_names_the_row_whose_draft_decoding_passed_over(bytes_vocabulary, tmp_path):
  config = BYTES.replace(d_model=32, activation="relu")
  params = jax.device_get(init_params(config, single_device(), jax.random.key(2)))
  own = jax.device_get(HEADS.begin(config, single_device(), jax.random.key(3)))
  # It says its newest token again, as fresh heads do, so that drafts are taken whole.
  params["logits_kernel"] = params["embedding"].T / 4
  model = Generator(config, params)
  texts = ["a text", "b", "a ~"]
  prompts = [[byte + 3 for byte in text.encode()] + [1] for text in texts]
  greedy = model.generate(prompts, "greedy", max_length=6, batch_size=2)
  hidden = record(model, prompts, greedy, 6).hidden.reshape(-1, 32).astype(np.float64)
  # Head 2 has one unit that the third text's third state alone wakes, and that is too large.
  sign = np.full(len(hidden), -1.0)
  sign[2 * 6 + 2] = 1
  unit = np.linalg.lstsq(hidden, sign)[0]
  np.testing.assert_allclose(hidden @ unit, sign, atol=1e-6)
  own = changed(own, "w1", (0, slice(None), 0), unit * 1e30)
  own = changed(own, "w2", (0, 0), 1e20)
  save_model_with(tmp_path / "model", config, params, bytes_vocabulary, HEADS, own)
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(f'{{"inputs": "{text}"}}\n' for text in texts))
  decoding = functools.partial(
      evaluate, str(tmp_path / "model"), [JsonlTask("mine", str(rows))],
      [Method("blockwise")], max_decode_length=6, batch_size=2, repeats=1,
  )
  # Calls begin at the first, second and sixth token.
  found = decoding(str(tmp_path / "out"))
  assert found["tasks"]["mine"]["methods"]["blockwise"]["decoder_calls"] == 9
  with pytest.raises(NotFinite, match=r"rows\.jsonl:3, call 4: a head's largest logit"):
    decoding(str(tmp_path / "reported"), has_report=True)


def test_validation_names_task_and_example(bad_tilde, own, bytes_vocabulary, tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(
      f'{{"inputs": "{text}", "targets": "t"}}\n' for text in ("a text", "b", "a ~")
  ))
  task = JsonlTask("mine", str(rows), targets="targets", split="validation")
  vocabulary = open_vocabulary(bytes_vocabulary, 384)
  optimizer = Optimizer("adamw", 1e-2, "constant", 0)
  step = Step(BYTES, single_device(), optimizer, Loss(trains_base=True), HEADS)

  def decoder(params):
    model = Generator(BYTES, params["base"], vocabulary=vocabulary)
    return model, make_addon(HEADS, params["own"], model).drafting

  measure = lambda num_decoded: Evaluation(
      step, [open_task(task, vocabulary, tmp_path)], Validation([task], 2, num_decoded), 2,
      {"input_length": 8, "target_length": 4}, decoder,
  )({"base": bad_tilde, "own": own}, 1)
  assert measure(2)["mine.validation/block_efficiency"] >= 1
  with pytest.raises(NotFinite, match=r"^mine\.validation example 2, call 1: the base model's"):
    measure(3)
