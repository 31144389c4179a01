"""Rescored drafts with real models in float64: greedy's tokens, and scorers that are right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpd_jax.addons.heads import Heads
from bpd_jax.decoding.loop import empty_step
from bpd_jax.decoding.rescoring import Scoring
from bpd_jax.decoding.scorers.cache_ngram import CacheNgramScorer
from bpd_jax.decoding.scorers.neural import NeuralScorer
from bpd_jax.decoding.scorers.ngram import ngram_params, NgramScorer
from bpd_jax.decoding.scorers.no_repeat import NoRepeatScorer
from bpd_jax.decoding.scorers.reference import ReferenceScorer
from bpd_jax.decoding.search import SearchSettings
from bpd_jax.decoding.types import Prompt
from bpd_jax.errors import InputError
from bpd_jax.generation import Generator
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import EncoderDecoder, init_params
from bpd_jax.ngram_lm.backoff import join_sequences
from bpd_jax.ngram_lm.counts import count_grams
from bpd_jax.ngram_lm.smoothing import kneser_ney
from bpd_jax.partitioning import single_device
from bpd_jax.reader import ModelReader

VOCAB, H, MAX_LENGTH = 24, 5, 20
CONFIG = ModelConfig(
    vocab_size=VOCAB, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=2, dtype="float64", param_dtype="float64", accum_dtype="float64",
)
HEADS = Heads(H, 16)
SMALL = dataclasses.replace(CONFIG, d_model=8, num_decoder_layers=1)
OPTIONS = {"max_length": MAX_LENGTH, "batch_size": 8, "buckets": (16,)}


def random_generator(config, seed, heads=Heads(1)):
  params = init_params(config, single_device(), jax.random.key(seed))
  own = heads.begin(config, single_device(), jax.random.key(seed))
  # Fresh heads repeat head 1; these have opinions.
  if heads.block_size > 1:
    w2 = own["w2"]
    own["w2"] = 0.5 * jax.random.normal(jax.random.key(seed + 1), w2.shape, w2.dtype)
  params["logits_kernel"] = 3 * params["logits_kernel"]
  return Generator(config, params, own_heads=(heads, own))


@pytest.fixture(scope="module")
def base():
  with jax.enable_x64(True):
    yield random_generator(CONFIG, 0, HEADS)


@pytest.fixture(scope="module")
def small():
  with jax.enable_x64(True):
    yield random_generator(SMALL, 7)


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(2, VOCAB, n).tolist() for n in rng.integers(1, 16, 24)]


@pytest.fixture(scope="module")
def greedy(base, prompts):
  with jax.enable_x64(True):
    return base.generate(prompts, "greedy", **OPTIONS)


@pytest.fixture(scope="module")
def arrays(greedy):
  """4-grams of the base model's own output."""
  rows = [np.where(row == 0, 2, row) for row in greedy.tokens]
  return ngram_params(kneser_ney(count_grams(join_sequences(rows, VOCAB), 4, VOCAB), (1,) * 4))


def all_scoring(base, small, arrays):
  cache = CacheNgramScorer(VOCAB)
  return {
      "none": [],
      "2-gram": [Scoring(NgramScorer(2), arrays, 0.5)],
      "4-gram": [Scoring(NgramScorer(4), arrays, (0.5, 1.0, 2.0, 1.5), 0.5)],
      "neural": [small.scoring(0.7)],
      "neural and n-gram": [
          small.scoring(0.7, sees_input=False),
          Scoring(NgramScorer(2), arrays, 0.3), Scoring(NoRepeatScorer(), (), 9.0),
          Scoring(cache),
      ],
  }


SEARCHES = {
    "chain": (3, SearchSettings()),
    "all of the vocabulary": (VOCAB, SearchSettings()),
    "6-best": (4, SearchSettings("p_best", num_paths=6, num_nodes=16, beam_width=8)),
    "best first": (4, SearchSettings("best_first", num_nodes=9)),
}


# Each pair is a loop to compile. A third of them are always run, every scorer and every
# search among them; the others are slow.
NAMES = ("none", "2-gram", "4-gram", "neural", "neural and n-gram")
PAIRS = [
    pytest.param(name, search, marks=[pytest.mark.slow] if (i + j) % 3 else [])
    for i, name in enumerate(NAMES) for j, search in enumerate(SEARCHES)
]


@pytest.mark.parametrize("name,search", PAIRS)
def test_tokens_are_greedys(base, small, arrays, prompts, greedy, name, search):
  top_k, search = SEARCHES[search]
  with jax.enable_x64(True):
    found = base.generate(
        prompts, base.heads(top_k=top_k), search=search,
        scoring=all_scoring(base, small, arrays)[name], **OPTIONS,
    )
  for row, expected in zip(found.tokens, greedy.tokens, strict=True):
    assert row.tolist() == expected.tolist()
  for tokens, calls, trace in zip(found.tokens, found.calls, found.traces, strict=True):
    assert [t for call in trace for t in call.emitted] == tokens.tolist()
    assert all(len(call.emitted) - call.num_accepted in (0, 1) for call in trace)
    assert len(trace) == calls
  if name == "4-gram" and search.name != "chain":
    # The n-grams have seen these very outputs.
    plain = base.generate(prompts, "blockwise", **OPTIONS)
    assert sum(found.calls) < sum(plain.calls)


@pytest.mark.parametrize("weight", [(1e6,) * (H - 1), 1e6])
def test_the_base_model_as_its_own_scorer_drafts_perfectly(base, prompts, greedy, weight):
  with jax.enable_x64(True):
    found = base.generate(
        prompts, base.heads(top_k=VOCAB), scoring=[base.scoring(weight)], **OPTIONS
    )
  lengths = [len(row) for row in greedy.tokens]
  assert found.calls == [1 + -(-(n - 1) // H) for n in lengths]
  assert len(set(lengths)) > 1


def test_the_oracle_is_above_every_search(base, small, arrays, prompts, greedy):
  oracle = [Scoring(ReferenceScorer(), (), 1.0)]
  with jax.enable_x64(True):
    best = base.generate(
        prompts, base.heads(top_k=4), scoring=oracle,
        references=[row.tolist() for row in greedy.tokens], **OPTIONS,
    )
    for name in ("none", "4-gram"):
      found = base.generate(
          prompts, base.heads(top_k=4), search=SearchSettings("p_best", num_paths=6),
          scoring=all_scoring(base, small, arrays)[name], **OPTIONS,
      )
      # Not row by row: a shorter step may end where the heads see further.
      assert sum(best.calls) < sum(found.calls), name
      assert sum(a <= b for a, b in zip(best.calls, found.calls)) > 0.9 * len(prompts)


@pytest.mark.parametrize("sees_input", [True, False])
def test_a_neural_scorer_scores_as_its_model_does(small, prompts, sees_input):
  """Against teacher forcing: another program over whole outputs, without a cache."""
  rng = np.random.default_rng(1)
  rows = 6
  with jax.enable_x64(True):
    tokens = np.zeros([rows, 16], np.int32)
    lengths = np.array([len(p) for p in prompts[:rows]], np.int32)
    for row, prompt in enumerate(prompts[:rows]):
      tokens[row, : len(prompt)] = prompt
    scorer = NeuralScorer(ModelReader(small.model, sees_input))
    prompt = Prompt(jnp.array(tokens), jnp.array(lengths), MAX_LENGTH)
    state = jax.jit(scorer.init)(small.view, prompt, None)
    start, score, extend = jax.jit(scorer.start), jax.jit(scorer.score), jax.jit(scorer.extend)
    plain = EncoderDecoder(SMALL, single_device())
    if not sees_input:
      tokens, lengths = np.full([rows, 1], 1, np.int32), np.ones([rows], np.int32)
    mask = np.arange(tokens.shape[1]) < lengths[:, None]

    @jax.jit
    def teacher_forced(inputs):
      """[rows, n] decoder inputs -> log-probabilities [rows, n, vocab]."""
      apply = lambda *args, method: plain.apply({"params": small.params}, *args, method=method)
      encoded = apply(tokens, mask, method="encode")
      hidden = apply(encoded, mask, inputs, method="decode")
      return jax.nn.log_softmax(apply(hidden, method="logits"), axis=-1)

    certain = [[] for _ in range(rows)]
    for _ in range(4):
      block = rng.integers(2, VOCAB, [rows, 4]).astype(np.int32)
      num_tokens = rng.integers(0, 5, rows).astype(np.int32)
      step = empty_step(jnp.zeros([rows, 1]), 3).replace(
          tokens=jnp.array(block), num_tokens=jnp.array(num_tokens)
      )
      state = start(small.view, state, step, None)
      for row in range(rows):
        certain[row] += block[row, : num_tokens[row]].tolist()
      history = np.zeros([rows, 3, 0], np.int32)
      trails = scorer.begin(small.view, state, 3, 4)
      for i in range(4):
        candidates = np.argsort(rng.random([rows, VOCAB]), -1)[:, :5].astype(np.int32)
        found = score(small.view, state, trails, jnp.array(candidates), i)
        for path in range(3):
          inputs = np.zeros([rows, MAX_LENGTH], np.int32)
          for row in range(rows):
            both = [0, *certain[row], *history[row, path]]
            inputs[row, : len(both)] = both
          logs = np.asarray(teacher_forced(inputs))
          for row in range(rows):
            expected = logs[row, len(certain[row]) + i, candidates[row]]
            np.testing.assert_allclose(found[row, path], expected, atol=1e-9)
        if i < 3:
          # Paths go on from any of the three.
          parents = rng.integers(0, 3, [rows, 3]).astype(np.int32)
          more = rng.integers(2, VOCAB, [rows, 3]).astype(np.int32)
          trails = extend(
              small.view, state, trails, jnp.array(parents), jnp.array(more), jnp.int32(i)
          )
          history = np.take_along_axis(history, parents[..., None], axis=1)
          history = np.concatenate([history, more[..., None]], axis=2)


@pytest.mark.parametrize(
    "weight,message",
    [
        (float("nan"), "scoring\\[0\\].weight = nan: allowed is finite and at least 0"),
        (-1.0, "scoring\\[0\\].weight = -1.0"), ((1.0, 2.0), "one, or 4, one a step"),
    ],
)
def test_weights_that_are_none(base, prompts, weight, message):
  with pytest.raises(InputError, match=message):
    base.generate(prompts, "blockwise", scoring=[Scoring(NoRepeatScorer(), (), weight)], **OPTIONS)


def test_lattices_that_are_none(base, prompts):
  with pytest.raises(InputError, match="top_k = 25: allowed is 1 … 24, the vocabulary"):
    base.heads(top_k=25)
  with pytest.raises(InputError, match=r"num_paths = 300: allowed is at most 4\^4"):
    base.generate(
        prompts, base.heads(top_k=4), search=SearchSettings("p_best", num_paths=300), **OPTIONS
    )
