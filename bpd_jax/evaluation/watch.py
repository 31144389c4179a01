"""A decoding as a person would watch it: every call's lattice, choice, and outcome.

Reads the trace of a decoding and looks up again what the heads and the scorers said at
each call: the candidates of each step, what each scorer added along the path that was
chosen, and which nodes were accepted.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.lattice import top_k_lattice
from bpd_jax.decoding.loop import empty_step
from bpd_jax.decoding.rescoring import RescorerParams, Scoring
from bpd_jax.decoding.types import Prompt
from bpd_jax.evaluation.analysis import first_path
from bpd_jax.evaluation.replay import Recording, replay
from bpd_jax.generation import Call, Generator, NotFinite


@dataclasses.dataclass(frozen=True)
class WatchedStep:
  """One step of a lattice, given the chosen path before it.

  Attributes:
    tokens: candidates, best of the head first.
    heads: log-probabilities of the head.
    scorers: for each scorer, what it adds to each candidate, weight included.
    chosen: index of the first path's candidate; None where the path ends before.
  """

  tokens: list[int]
  heads: list[float]
  scorers: list[list[float]]
  chosen: int | None


@dataclasses.dataclass(frozen=True)
class WatchedCall:
  """One decoder call.

  Attributes:
    root: the newest certain token.
    steps: of the lattice; empty in the first call.
    call: the tree and what came of it.
  """

  root: int
  steps: list[WatchedStep]
  call: Call


def watch(
    generator: Generator, recording: Recording, row: int, *,
    scoring: Sequence[Scoring] = (), **options: Any,
) -> list[WatchedCall]:
  """Replays a row and looks closely.

  Args:
    generator: the recorded model.
    recording: of its greedy output.
    row: of the recording.
    scoring: as of `Generator.generate`.
    **options: as of `replay`.

  Raises:
    NotFinite: naming the row, as `replay` does.
  """
  one = recording.rows([row])
  try:
    decoded = replay(generator, one, scoring=scoring, batch_size=1, **options)
  except NotFinite as error:
    raise error.of(row) from error
  settings = generator.settings(
      **{"method": "blockwise", "max_length": one.tokens.shape[1]} | options, scoring=scoring
  )
  params = generator.rescorer_params(scoring, settings.depth)
  prompt = Prompt(one.prompts, one.prompt_lengths, one.tokens)
  state = _start(settings, params, prompt)
  tokens, watched, done = decoded.tokens[0], [], 0
  for call in decoded.traces[0]:
    root = int(tokens[done - 1]) if done else generator.config.start_id
    steps = []
    if done and settings.depth:
      path = first_path(root, call)[1:]
      padded = (path + [0] * settings.depth)[: settings.depth]
      found = jax.device_get(_look(
          generator.model, settings, generator.view, one.hidden[:, done - 1], params, state,
          np.array([padded], np.int32),
      ))
      for i in range(settings.depth):
        candidates = found["tokens"][0, i].tolist()
        is_there = i < len(path) and path[i] in candidates
        steps.append(WatchedStep(
            candidates, found["heads"][0, i].tolist(),
            [part[0, i].tolist() for part in found["scorers"]],
            candidates.index(path[i]) if is_there else None,
        ))
    watched.append(WatchedCall(root, steps, call))
    block = np.zeros([1, settings.depth + 1], np.int32)
    block[0, : len(call.emitted)] = call.emitted
    state = _advance(settings, params, state, block, np.array([len(call.emitted)], np.int32))
    done += len(call.emitted)
  return watched


@functools.partial(jax.jit, static_argnums=0)
def _start(settings, params, prompt):
  return settings.rescorer.init(params, prompt)


@functools.partial(jax.jit, static_argnums=0)
def _advance(settings, params, state, block, num_tokens):
  step = empty_step(jnp.zeros([1, 1]), settings.depth)
  return settings.rescorer.start(
      params, state, step.replace(tokens=block, num_tokens=num_tokens)
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(model, settings, view, hidden, params, state, path):
  """The lattice, and what each scorer adds after the chosen path, weight included."""
  depth = settings.depth
  logits = model.apply({"params": view}, hidden, depth, method="head_logits")
  lattice = top_k_lattice(logits, settings.top_k, jnp.full([1], depth))
  rescorer, parts = settings.rescorer, []
  for number in range(len(rescorer.scorers)):
    # A scorer by itself: its share is what is left when the heads' is taken away.
    alone = dataclasses.replace(rescorer, scorers=rescorer.scorers[number : number + 1])
    weights = jax.tree.map(lambda x, n=number: x[n : n + 1], params.weights)
    own = RescorerParams(weights, params.scorers[number : number + 1])
    score = alone.path_score(own, state[number : number + 1], lattice)
    trails, added = score.begin(1), []
    for i in range(depth):
      added.append(score.addends(trails, i)[:, 0] - lattice.scores[:, i])
      if i + 1 < depth:
        trails = score.extend(trails, jnp.zeros_like(path[:, :1]), path[:, i : i + 1], i)
    parts.append(jnp.stack(added, axis=1))
  return {"tokens": lattice.tokens, "heads": lattice.scores, "scorers": parts}
