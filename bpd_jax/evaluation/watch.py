"""A decoding as a person would watch it: every call's lattice, choice, and outcome.

Replays a row call by call, and looks up what the scorers said at each: the candidates of
each step, what each scorer added along the path that was chosen, and which nodes were
accepted.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpd_jax.decoding.rescoring import RescorerParams, Scoring
from bpd_jax.decoding.types import Drafting
from bpd_jax.evaluation.analysis import first_path
from bpd_jax.evaluation.replay import recorded_loop, recorded_rows, Recording
from bpd_jax.generation import Call, check_finite, fetch_state, Generator, read_row


@dataclasses.dataclass(frozen=True)
class WatchedStep:
  """One step of a lattice, given the chosen path before it.

  Attributes:
    tokens: candidates, the drafter's best first.
    scores: the drafter's log-probabilities.
    scorers: for each scorer, what it adds to each candidate, weight included.
    chosen: index of the first path's candidate; None where the path ends before.
  """

  tokens: list[int]
  scores: list[float]
  scorers: list[list[float]]
  chosen: int | None


@dataclasses.dataclass(frozen=True)
class WatchedCall:
  """One decoder call.

  Attributes:
    root: the newest certain token.
    steps: of the lattice; empty where nothing was drafted.
    call: the tree and what came of it.
  """

  root: int
  steps: list[WatchedStep]
  call: Call


def watch(
    generator: Generator, recording: Recording, row: int, method: str | Drafting = "blockwise",
    *, scoring: Sequence[Scoring] = (), **options: Any,
) -> list[WatchedCall]:
  """Replays a row and looks closely.

  Args:
    generator: the recorded model.
    recording: of its greedy output.
    row: of the recording.
    method: as of `Generator.generate`.
    scoring: likewise.
    **options: as of `replay`.

  Raises:
    NotFinite: naming the row, as `replay` does.
  """
  settings = generator.settings(method, scoring=scoring, **options)
  params = generator.decode_params(method, scoring)
  call_number = functools.partial(
      _call_number, generator.model, settings, params, recorded_rows(recording, [row], 1)
  )
  found = fetch_state(call_number(recording.tokens.shape[1])[0])
  check_finite(generator.config, found, [row])
  _, _, trace = read_row(found, 0)
  watched, root = [], generator.config.start_id
  for number, call in enumerate(trace):
    # What scorers know at each call may be large: one is there at a time.
    _, called = call_number(number)
    watched.append(WatchedCall(root, _steps(settings, params, called, root, call), call))
    root = call.emitted[-1]
  return watched


def _steps(settings, params, called, root: int, call: Call) -> list[WatchedStep]:
  """The steps of a call's lattice that hold a draft."""
  lattice = jax.device_get(called.lattice)
  path, depth = first_path(root, call)[1:], settings.drafter.depth
  padded = (path + [0] * depth)[:depth]
  added = jax.device_get(_added(settings, params.rescorer, called, np.array([padded], np.int32)))
  steps = []
  for i in range(int(lattice.num_steps[0])):
    candidates = lattice.tokens[0, i].tolist()
    is_there = i < len(path) and path[i] in candidates
    steps.append(WatchedStep(
        candidates, lattice.scores[0, i].tolist(), [part[0, i].tolist() for part in added],
        candidates.index(path[i]) if is_there else None,
    ))
  return steps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call_number(model, settings, params, rows, number):
  """The state before a call, the last one at most, and the call."""
  loop, state = recorded_loop(model, settings, params, rows)
  state = jax.lax.while_loop(
      lambda state: (state.call < number) & ~state.is_done.all(),
      lambda state: loop.call(state)[0], state,
  )
  return state, loop.call(state)[1]


@functools.partial(jax.jit, static_argnums=0)
def _added(settings, params, called, path):
  """What each scorer adds after the chosen path, weight included: [1, depth, k] each."""
  lattice, rescorer, parts = called.lattice, settings.rescorer, []
  for number in range(len(rescorer.scorers)):
    # A scorer by itself: its share is what is left when the drafter's is taken away.
    alone = dataclasses.replace(rescorer, scorers=rescorer.scorers[number : number + 1])
    weights = jax.tree.map(lambda x, n=number: x[n : n + 1], params.weights)
    own = RescorerParams(weights, params.scorers[number : number + 1])
    score = alone.path_score(own, called.rescorer[number : number + 1], lattice)
    trails, added = score.begin(1), []
    depth = settings.drafter.depth
    for i in range(depth):
      added.append(score.addends(trails, i)[:, 0] - lattice.scores[:, i])
      if i + 1 < depth:
        trails = score.extend(trails, jnp.zeros_like(path[:, :1]), path[:, i : i + 1], i)
    parts.append(jnp.stack(added, axis=1))
  return parts
