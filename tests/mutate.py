"""Breaks the code in known ways, one at a time, and shows which test notices.

  make mutate
  .venv/bin/python tests/mutate.py search replay    # only those

Each mutation replaces one text that stands exactly once, in a copy of the
package, and runs the tests that ought to fail. A mutation that survives, or no
longer applies, ends the command with status 1.
"""

from collections.abc import Sequence
import dataclasses
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutation:
  """One way to be wrong: `old` becomes `new` in `file`; `tests` should notice."""

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]


GOODPUT = ("tests/test_goodput.py",)
COSTS = ("tests/test_call_costs.py", "-k", "replay or remembers or timed or another_table or once")
LOOP = ("tests/test_accept.py", "tests/test_loop.py")
MODEL = ("tests/test_exactness.py", "-k", "float64 and t5_1_1")
QUALITY = ("tests/test_quality.py",)
STEP = ("tests/test_step.py", "-k", "not eight and not split")
BATCHES = ("tests/test_batches.py",)
FOLDERS = ("tests/test_folders.py",)
TRAINING = ("tests/test_loop_training.py",)
MODES = ("tests/test_train_modes.py", "-k", "base or distillation")
INPUT = ("tests/test_train_input.py",)
EVALUATE = ("tests/test_evaluate.py", "-k", "table or quality or last_task")
SMOOTHING = ("tests/test_ngram_smoothing.py",)
ARRAYS = ("tests/test_ngram_arrays.py", "-k", "dictionarys or another")
ARPA = ("tests/test_ngram_arpa.py",)
NGRAM = ("tests/test_ngram.py",)
SEARCH = ("tests/test_search.py",)
FINITE = ("tests/test_finite.py", "-k", "where_greedy_would")
RESCORED = ("tests/test_rescored_model.py", "-k", "neural_scorer or perfectly or oracle")
SCORING = ("tests/test_scoring.py", "-k", "judges or source_lies")
REPLAY = ("tests/test_replay.py",)
TUNING = ("tests/test_tuning.py", "-k", "wins or chosen")
ANALYSIS = ("tests/test_analysis.py",)
MUTATIONS = (
    Mutation("prefixes kept without their completions", "decoding/search.py",
             "total if completions is None else total + completions[i][:, None]", "total", SEARCH),
    Mutation("a beam that proves everything", "decoding/search.py",
             "if is_small else left.max(0)", "if True else left.max(0)", SEARCH),
    Mutation("bounds from the first step on", "decoding/search.py",
             "addends = at_step(trails, i)", "addends = at_step(trails, 0)", SEARCH),
    Mutation("paths followed without their parents", "decoding/search.py",
             "return pick(level.parents), pick(level.choices)", "return place, pick(level.choices)",
             SEARCH),
    Mutation("one node too many", "decoding/search.py",
             "is_valid = node <= number[:, -1:]", "is_valid = node <= number[:, -1:] + 1", SEARCH),
    Mutation("prefixes of equal tokens merged at different depths", "decoding/search.py",
             "is_shared = jnp.cumprod(same, axis=-1).astype(bool)", "is_shared = same", SEARCH),
    Mutation("weights of all steps are the first's", "decoding/rescoring.py",
             "params.weights.by_step[:, None, :depth] * factor",
             "params.weights.by_step[:, None, :1] * factor", SEARCH),
    Mutation("a scorer's model sees all paths", "decoding/scorers/neural.py",
             "np.eye(num_paths, dtype=bool)", "np.ones([num_paths, num_paths], bool)", RESCORED),
    Mutation("a scorer's model forgets the draft", "decoding/scorers/neural.py",
             "is_own=is_own | ", "is_own=", RESCORED),
    Mutation("a scorer's model goes on from another path", "decoding/scorers/neural.py",
             "jnp.take_along_axis(trails.is_own, parents[..., None], axis=1)", "trails.is_own",
             RESCORED),
    Mutation("windows of another path", "decoding/scorers/window.py",
             "jnp.take_along_axis(windows, parents[..., None], axis=1)", "windows",
             ("tests/test_rescoring.py", "-k", "cache_ngrams")),
    Mutation("2-grams judged by the bounds of more", "decoding/scorers/ngram.py",
             "params.arrays if self.context <= 1 else params.bounds", "params.bounds",
             ("tests/test_watch.py",)),
    Mutation("a scorer's model forgets the root", "decoding/scorers/neural.py",
             "last = jnp.maximum(num_tokens - 1, 0)", "last = jnp.maximum(num_tokens - 2, 0)",
             RESCORED),
    Mutation("cache n-grams don't see the root", "decoding/scorers/cache_ngram.py",
             "jnp.arange(-self.context, 0)", "jnp.arange(-self.context, 0) - 1",
             ("tests/test_rescoring.py", "-k", "cache_ngrams")),
    Mutation("a recording says what follows any node", "evaluation/replay.py",
             "is_on_path = ~off.any(-1)", "is_on_path = is_right", REPLAY),
    Mutation("a recording answers a place late", "evaluation/replay.py",
             "hidden=jnp.take_along_axis(hidden, here[..., None], axis=1)",
             "hidden=jnp.take_along_axis(hidden, here[..., None] - 1, axis=1)", REPLAY),
    Mutation("the weight with the most calls", "evaluation/tuning.py",
             "scoring[number] = max(options", "scoring[number] = min(options", TUNING),
    Mutation("a lattice judged a token early", "evaluation/analysis.py",
             "at = 1 + jnp.arange(length - 1)", "at = jnp.arange(length - 1)", ANALYSIS),
    Mutation("the first of nodes that say the same", "evaluation/analysis.py",
             "best = max(best, ways[node], key=len)", "best = best or ways[node]", ANALYSIS),
    Mutation("accepted nodes beyond a row's limit", "decoding/loop.py",
             "accepted=jnp.where(is_new & is_emitted,", "accepted=jnp.where(is_new,", LOOP),
    Mutation("the root is a candidate's", "decoding/loop.py",
             "(tokens == tree.tokens[..., None]) & (depth > 0)",
             "(tokens == tree.tokens[..., None])", LOOP),
    Mutation("rows draft that don't want to", "decoding/loop.py",
             "num_steps=jnp.minimum(lattice.num_steps, wants)", "num_steps=lattice.num_steps",
             LOOP),
    Mutation("a draft verified that was trimmed", "decoding/loop.py",
             "return lattice.replace(num_steps=jnp.clip(steps, 0, lattice.num_steps))",
             "return lattice", LOOP),
    Mutation("rows that ended draft on", "decoding/loop.py",
             "jnp.where(state.is_done, 0, jnp.clip(wants, 0, self.drafter.depth))",
             "jnp.clip(wants, 0, self.drafter.depth)", LOOP),
    Mutation("calls a size too wide", "decoding/loop.py",
             "(width > least) & (width <= most)", "(width >= least) & (width < most)", LOOP),
    Mutation("a policy that isn't told of its pauses", "decoding/loop.py",
             "policy=self.policy.rested(self.policy_params, state.policy, state.call - began)",
             "policy=state.policy", LOOP),
    Mutation("what a row's end cut off counts as wrong", "decoding/policies/goodput.py",
             "is_tried = is_live[:, None] & (", "is_tried = (", GOODPUT),
    Mutation("rows that ended choose the width", "decoding/policies/goodput.py",
             "counts = is_live | ~is_live.any()", "counts = is_live | True", GOODPUT),
    Mutation("pauses that don't grow", "decoding/policies/goodput.py",
             "* 2.0 ** jnp", "* 1.0 ** jnp", GOODPUT),
    Mutation("old failures never forgotten", "decoding/policies/goodput.py",
             "FORGET, FORGET_PAUSED, FORGET_ROW, ROW_WEIGHT = 0.99, 0.5,",
             "FORGET, FORGET_PAUSED, FORGET_ROW, ROW_WEIGHT = 0.99, 1.0,", GOODPUT),
    Mutation("a policy forgets from batch to batch", "generation.py",
             "params = params.replace(policy=memory)", "pass", COSTS),
    Mutation("a policy replayed in other batches", "evaluation/replay.py",
             "lengths = recording.lengths if policing is None else recording.prompt_lengths",
             "lengths = recording.lengths", COSTS),
    Mutation("a table of another batch size", "call_costs.py",
             "if self.of.get(name) != wanted:", "if False:", COSTS),
    Mutation("the first call counted as a block", "call_costs.py",
             "np.searchsorted(widths, calls[1:])", "np.searchsorted(widths, calls)", COSTS),
    Mutation("a batch's own time counted as a block's", "call_costs.py",
             "solve_times(whole - np.median(once), num_calls)", "solve_times(whole, num_calls)",
             COSTS),
    Mutation("smaller calls' time counted as a block's", "call_costs.py",
             "rest = whole[i] - calls", "rest = whole[i] - 0 * calls", COSTS),
    Mutation("too few calls are a table", "call_costs.py",
             "if calls[i] >= FEWEST_CALLS:", "if calls[i] > 0:", COSTS),
    Mutation("keys of the batch's place", "programs.py",
             "jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)",
             "jax.random.split(jax.random.key(seed), len(rows))",
             ("tests/test_generation.py", "-k", "keys")),
    Mutation("a small model split over a mesh", "evaluation/scoring.py",
             "generator.partitioning.replicated()", "generator.partitioning", SCORING),
    Mutation("heads judged a token early", "evaluation/analysis.py",
             "at = jnp.arange(length)[:, None] + jnp.arange(heads)",
             "at = jnp.arange(length)[:, None] + jnp.arange(heads) - 1", ANALYSIS),
    Mutation("bounds without longer contexts' gains", "ngram_lm/bounds.py",
             "values.append(model.log_probs[n - 1] + gains[n][before])",
             "values.append(model.log_probs[n - 1])", ("tests/test_ngram_bounds.py",)),
    Mutation("depth bias off by one", "model/decoder.py",
             "position = lengths[:, None] + depth", "position = lengths[:, None] + depth + 1",
             MODEL),
    Mutation("accept index + 1", "decoding/accept.py",
             "jnp.where(ends | ~is_finite, 0, 1)",
             "jnp.where(ends | ~is_finite, 1, 2)", LOOP),
    Mutation("accept index - 1", "decoding/accept.py",
             "path = trees.path_to(tree, last)",
             "last = jnp.maximum(last - 1, 0)\n  path = trees.path_to(tree, last)", LOOP),
    Mutation("infinity is a choice", "decoding/verify.py",
             "is_finite=jnp.isfinite(largest)", "is_finite=~jnp.isnan(largest)",
             ("tests/test_finite.py", "-k", "one_number")),
    Mutation("child of no choice accepted", "decoding/accept.py",
             "may_go_on &= verified.is_finite", "pass", FINITE),
    Mutation("a row that only pads fails", "decoding/loop.py",
             "failure = jnp.where(state.is_done, state.failure, failure.astype(jnp.int32))",
             "failure = failure.astype(jnp.int32)", FINITE),
    Mutation("no slack in the buffer", "decoding/cache.py",
             "return max_length + max_depth + 1", "return max_length", LOOP),
    Mutation("child of an accepted EOS accepted", "decoding/accept.py",
             "may_go_on = ~is_eos", "may_go_on = jnp.ones_like(is_eos)", LOOP),
    Mutation("invalid node accepted", "decoding/accept.py",
             "passes = is_root | (passes & tree.is_valid)", "passes = is_root | passes", LOOP),
    Mutation("probe visible to a real node", "model/probes.py",
             "unseen = jnp.zeros(", "unseen = jnp.ones(", ("tests/test_probes.py",)),
    Mutation("heads fed from the last column", "decoding/accept.py",
             "hidden=trees.gather_nodes(verified.hidden, last[:, None])[:, 0]",
             "hidden=verified.hidden[:, -1]", LOOP),
    Mutation("last of equally deep nodes wins", "decoding/accept.py",
             "last = jnp.argmax(reached, axis=-1)",
             "last = num_nodes - 1 - jnp.argmax(reached[:, ::-1], axis=-1)", LOOP),
    Mutation("finished row goes on", "decoding/loop.py",
             "budget = jnp.where(state.is_done, 0, state.limits - state.num_tokens)",
             "budget = state.limits - state.num_tokens", LOOP),
    Mutation("call of a finished row counted", "decoding/loop.py",
             "num_calls=state.num_calls + ~state.is_done", "num_calls=state.num_calls + 1", LOOP),
    Mutation("cache grows by every node", "decoding/cache.py",
             "lengths=cache.lengths + step.num_tokens",
             "lengths=cache.lengths + step.path.shape[1]", LOOP),
    Mutation("keys of the nodes in tree order", "decoding/cache.py",
             "path = jnp.expand_dims(step.path, sorted({1, 2, 3} - {axis}))",
             "path = jnp.expand_dims(0 * step.path + jnp.arange(step.path.shape[1]), "
             "sorted({1, 2, 3} - {axis}))", LOOP),
    Mutation("siblings visible", "decoding/tree.py",
             "(node[:, None] == node)", "(node[:, None] >= node)", LOOP),
    Mutation("limit of a row ignored", "decoding/loop.py",
             "num_tokens=jnp.minimum(step.num_tokens, budget)",
             "num_tokens=jnp.where(budget > 0, step.num_tokens, 0)", LOOP),
    Mutation("no relative bias among the nodes", "model/decoder.py",
             "      own_bias = mask_bias(self.relpos_bias(position, position),",
             "      own_bias = mask_bias(0 * self.relpos_bias(position, position),", MODEL),
    Mutation("uncommitted slots visible", "model/decoder.py",
             "(slot < lengths[:, None])", "(slot <= lengths[:, None])", MODEL),
    Mutation("padding of the input visible", "model/decoder.py",
             "encoder_mask[:, None, None, :]", "jnp.ones_like(encoder_mask)[:, None, None, :]",
             MODEL),
    Mutation("probes one position late", "model/probes.py",
             "position[:, :, None] + 1 +", "position[:, :, None] + 2 +",
             ("tests/test_probes.py",)),
    Mutation("any difference a near tie", "evaluation/exactness.py",
             "margin <= tolerance)", "True)", ("tests/test_exactness.py", "-k", "wrong_token")),
    Mutation("a row's own reference as its floor", "evaluation/quality.py",
             "references[half:] + references[:half]", "list(references)", QUALITY),
    Mutation("instruction left in a floor", "evaluation/quality.py",
             'content = re.sub(f"\\\\A(?:{instruction})", "", row["inputs"])',
             'content = row["inputs"]', QUALITY),
    Mutation("learned by the interval's upper end", "evaluation/quality.py",
             "mean_interval(scores - floor)[0] > 0", "mean_interval(scores - floor)[1] > 0",
             QUALITY),
    Mutation("learned by one floor", "evaluation/quality.py",
             "is_above = all(", "is_above = any(", QUALITY),
    Mutation("learned by the means alone", "evaluation/quality.py",
             "mean_interval(scores - floor)[0] > 0", "(scores - floor).mean() > 0", QUALITY),
    Mutation("loops don't matter", "evaluation/quality.py",
             "return is_above and looping_rows <= reference_looping_rows + MAX_LOOPING",
             "return is_above", QUALITY),
    Mutation("references' loops don't matter", "evaluation/quality.py",
             "looping_rows <= reference_looping_rows + MAX_LOOPING",
             "looping_rows <= MAX_LOOPING", QUALITY),
    Mutation("no insertions in an edit distance", "evaluation/quality.py",
             "row = np.minimum.accumulate(row - places) + places", "row = row + 0", QUALITY),
    Mutation("a ratio's interval from rows' ratios", "evaluation/bootstrap.py",
             "drawn = statistic(*(column[rows].sum(1) for column in values))",
             "drawn = statistic(*(column[rows] for column in values)).mean(1)", QUALITY),
    Mutation("means over every task", "evaluation/table.py",
             'for name, task in tasks.items() if task["learned"]',
             "for name, task in tasks.items()", EVALUATE),
    Mutation("*not learned* not said", "evaluation/table.py",
             'if task["learned"] else', "if True else", EVALUATE),
    Mutation("quality of another row", "evaluation/quality.py",
             "_scores(name, references, generation.texts)",
             "_scores(name, references, generation.texts[::-1])", EVALUATE),
    Mutation("rows that don't fit left out unasked", "evaluate.py",
             "name: read_rows(model, name, own, chosen[name], unfit_rows)",
             'name: read_rows(model, name, own, chosen[name], "leave_out")', EVALUATE),
    Mutation("an evaluation goes on with another n-gram file", "evaluation/scoring.py",
             'fields["arpa"] = contents_fingerprint(source.arpa, "NgramSource.arpa")', "pass",
             ("tests/test_evaluate.py", "-k", "same_contents")),
    Mutation("rejected tokens shown as accepted", "decode.py",
             "(REJECTED, rejected)]", "(ACCEPTED, rejected)]",
             ("tests/test_decode.py",)),
    Mutation("the base model's token shown as drafted", "decode.py",
             "(BASE, call.emitted[accepted:])", "(ACCEPTED, call.emitted[accepted:])",
             ("tests/test_decode.py",)),
    Mutation("write doesn't wait for the call", "decoding/cache.py",
             "starts = jnp.where(step.tokens[:, 0] >= 0, cache.lengths, 0)",
             "starts = cache.lengths", ("tests/test_compiled.py", "-k", "copies")),
    Mutation("heads a token too far", "training/loss.py",
             "for ahead in range(block_size):", "for ahead in range(1, block_size + 1):", STEP),
    Mutation("targets of the next example", "training/loss.py",
             "(jnp.pad(segments[:, ahead:], pad) == segments) & (segments > 0)",
             "jnp.pad(segments[:, ahead:], pad) > 0", STEP),
    Mutation("loss divided by a microbatch's targets", "training/loss.py",
             'counts = shared["counts"].astype(config.accum_dtype)',
             "counts = masks.sum(axis=(1, 2)).astype(config.accum_dtype)", STEP),
    Mutation("every step draws the same", "training/step.py",
             "key = jax.random.fold_in(key, state.step)", "pass", TRAINING),
    Mutation("heads that weigh nothing aren't measured", "training/loss.py",
             "(1.0,) * block_size if key is None else self.weights(block_size)",
             "self.weights(block_size)", STEP),
    Mutation("dropout behind a frozen base", "training/loss.py",
             "decoder_states(model, base, batch, key if self.trains_base else None)",
             "decoder_states(model, base, batch, key)", STEP),
    Mutation("heads of another base", "addons/folder.py",
             "if needed != base.fingerprint:", "if False:",
             ("tests/test_checkpoints.py", "tests/test_addon.py")),
    Mutation("heads begun anew behind a checkpoint that has some", "train.py",
             "if not jax.tree.leaves(own):", "if True:",
             ("tests/test_addon.py", "-k", "goes_on")),
    Mutation("an add-on of other sizes gone on with", "train.py",
             "leaf_shapes(wanted) != leaf_shapes(own)", "False",
             ("tests/test_addon.py", "-k", "goes_on")),
    Mutation("heads of before left out", "addons/folder.py",
             "if old is None:", "if True:",
             ("tests/test_checkpoints.py",)),
    Mutation("average left out", "training/step.py",
             "return state.params if state.average is None else",
             "return state.params if True else", STEP),
    Mutation("order of every seed", "data/batches.py",
             "default_rng([seed, which, epoch])", "default_rng([0, which, epoch])", BATCHES),
    Mutation("order of every epoch", "data/batches.py",
             "default_rng([seed, which, epoch])", "default_rng([seed, which, 0])", BATCHES),
    Mutation("rows of the first process", "data/batches.py",
             "range(process_index * local, (process_index + 1) * local)", "range(local)", BATCHES),
    Mutation("inputs cut without EOS", "data/batches.py",
             "return np.append(inputs[: input_length - 1], eos_id)",
             "return inputs[:input_length]", BATCHES),
    Mutation("every window holds the first one's examples", "data/batches.py",
             "range(window * count, (window + 1) * count)", "range(count)", BATCHES),
    Mutation("a window begins with its fullest rows", "data/batches.py",
             "np.random.default_rng([self._seed, 1 << 21, window]).permutation(WINDOW)",
             "np.arange(WINDOW)", BATCHES),
    Mutation("muon moves small parameters as far as large ones", "training/optimizer.py",
             "optax.scale_by_param_block_rms(),", "optax.identity(),",
             ("tests/test_step.py", "-k", "muon")),
    Mutation("a token costs as much as a call", "evaluation/cost.py",
             "return cost / block_efficiency", "return cost", ("tests/test_cost.py",)),
    Mutation("rows from the first on when resumed", "training/loop.py",
             "batches.batch(step))", "batches.batch(step - done))", TRAINING),
    Mutation("evaluation not done again", "training/loop.py",
             "if done and is_evaluated(done) and done not in evaluated:", "if False:", TRAINING),
    Mutation("evaluated before it is saved", "training/loop.py",
             """        save(step)
        if is_evaluated(step):
          measure(step)
""", """        if is_evaluated(step):
          measure(step)
        save(step)
""", TRAINING),
    Mutation("parameters of NaN saved", "training/loop.py",
             "if not all_finite(state):", "if False:", TRAINING),
    Mutation("loss of NaN passed over", "training/loop.py",
             'if not math.isfinite(figures["loss"]) or', "if", TRAINING),
    Mutation("last state not saved", "training/loop.py",
             "    if step > done:\n      save(step)\n", "", TRAINING),
    Mutation("folder shared by two processes", "folders.py",
             "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", TRAINING),
    Mutation("folder of another run taken", "folders.py",
             "if found.get(name) != wanted.get(name):", "if False:", TRAINING),
    Mutation("contents compared by their time", "folders.py",
             'own = hashlib.file_digest(opened, "sha256").hexdigest()',
             "own = file.stat().st_mtime_ns", FOLDERS),
    Mutation("a path elsewhere is a local folder", "folders.py",
             "if _SCHEME.match(os.fspath(path)):", "if False:", FOLDERS),
    Mutation("a path that Orbax can't read back", "folders.py",
             "if _PATTERN.search(str(absolute)):", "if False:", FOLDERS),
    Mutation("a model isn't read back", "checkpoints.py",
             'read_back(folder, traverse_util.unflatten_dict({name: leaf}, sep="/"))', "pass",
             FOLDERS),
    Mutation("a folder claimed before shapes are divided", "training/step.py",
             "partitioning.check_params(params)", "pass", ("tests/test_train_input.py",)),
    Mutation("first of equals is the best", "training/checkpointing.py",
             "(sign * self.figures[step], step)", "(sign * self.figures[step], -step)", TRAINING),
    Mutation("best state deleted", "training/checkpointing.py",
             "return {max(steps, default=None), self.best_of(steps)}",
             "return {max(steps, default=None)}", TRAINING),
    Mutation("figures of later steps stay", "training/metrics.py",
             'if last_step is None or line["step"] <= last_step]', "]", TRAINING),
    Mutation("states of another example", "training/states.py",
             "hidden[place, : lengths[i]]", "hidden[place - 1, : lengths[i]]", MODES),
    Mutation("outputs of another example", "distillation.py",
             "row.tolist() for row in out.tokens", "row.tolist() for row in out.tokens[::-1]",
             MODES),
    Mutation("distilled again from the first part", "distillation.py",
             "if path.is_dir():", "if False:", MODES),
    Mutation("figures lost on a full disk", "training/metrics.py",
             """      with new_file(self._path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
""", """      self._path.write_text("".join(lines), encoding="utf-8")
""", TRAINING),
    Mutation("folder claimed before rows are read", "train.py",
             "    if not has_begun:\n      # All",
             "    claim_run(workdir, identity)\n    if not has_begun:\n      # All", INPUT),
    Mutation("any vocabulary for a checkpoint", "train.py",
             "if words.fingerprint != expected:", "if False:", INPUT),
    Mutation("a sign typed in capitals", "data/typing_errors.py",
             "core[0].isupper() and core[1].isalpha() and", "core[0].isupper() and",
             ("tests/test_typing_errors.py", "-k", "what_can_happen")),
    Mutation("ids beyond the embedding table", "data/datasets.py",
             "if cache.vocab_size > vocab_size:", "if False:",
             ("tests/test_train_input.py", "-k", "embedding_table")),
    Mutation("n-grams of another EOS", "ngram.py",
             "if cache.eos_id != eos_id:", "if False:", NGRAM),
    Mutation("an example of validation goes by its prompt", "evaluation/validation.py",
             'f"{dataset.name} example {i}"', 'f"prompts[{i}]"',
             ("tests/test_finite.py", "-k", "validation_names")),
    Mutation("a report's rows go by their prompts", "evaluation/task.py",
             "    with naming_prompts(own.places):\n      analysis", "    if True:\n      analysis",
             ("tests/test_finite.py", "-k", "report_names")),
    Mutation("a watched row goes by its place alone", "evaluation/watch.py",
             "check_finite(generator.config, found, [row])",
             "check_finite(generator.config, found, [0])",
             ("tests/test_finite.py", "-k", "replay_says")),
    Mutation("n-grams over a start counted", "ngram_lm/counts.py",
             "goes_on[goes_on] = tokens[places[goes_on] + 1] != start_id", "pass", SMOOTHING),
    Mutation("counts of what a start begins by kinds", "ngram_lm/smoothing.py",
             "adjusted = np.where(is_first, adjusted, kinds)", "adjusted = kinds", SMOOTHING),
    Mutation("mass of what is cut off lost", "ngram_lm/smoothing.py",
             "freed = np.where(keep[n], amounts, adjusted)", "freed = amounts", SMOOTHING),
    Mutation("amounts from what is kept", "ngram_lm/smoothing.py",
             "kneser_ney_amounts(adjusted))", "kneser_ney_amounts(adjusted[keep[n]]))", SMOOTHING),
    Mutation("uniform distribution over the start as well", "ngram_lm/smoothing.py",
             "probs = seen + weight / (counts.vocab_size - 1)",
             "probs = seen + weight / counts.vocab_size", SMOOTHING),
    Mutation("Katz leaves nothing after large counts", "ngram_lm/smoothing.py",
             "total = np.maximum(total + ~has_left, 1)", "total = np.maximum(total, 1)", SMOOTHING),
    Mutation("Katz' weight from all that is left", "ngram_lm/smoothing.py",
             "left / np.where(left > 0, 1 - known, 1)", "left", SMOOTHING),
    Mutation("Good-Turing's large counts not kept", "ngram_lm/smoothing.py",
             "(1 - common)", "1", SMOOTHING),
    Mutation("pruned without new weights", "ngram_lm/pruning.py",
             "np.where(has_gone, np.log(weight), model.back_offs[n - 1])",
             "model.back_offs[n - 1]", SMOOTHING),
    Mutation("suffixes pruned away", "ngram_lm/pruning.py",
             "np.maximum.at(changes[n - 1], grams.suffix[has_suffix], changes[n][has_suffix])",
             "pass", SMOOTHING),
    Mutation("context's probability left out of pruning", "ngram_lm/pruning.py",
             "-np.exp(context_prob[context]) * change", "-change", SMOOTHING),
    Mutation("back-off weight of the token alone", "ngram_lm/arrays.py",
             "scores + back_offs[i, ..., None]", "scores + back_offs[0, ..., None]", ARRAYS),
    Mutation("any bucket's answer taken", "ngram_lm/arrays.py",
             "is_there = _get(arrays.slots, place) == bucket",
             "is_there = _get(arrays.slots, place) >= 0", ARRAYS),
    Mutation("any bucket's context taken", "ngram_lm/arrays.py",
             "jnp.where(_get(arrays.slots, 2 * place) == bucket,",
             "jnp.where(_get(arrays.slots, 2 * place) >= 0,", ARRAYS),
    Mutation("token that isn't there taken for the first id", "ngram_lm/arrays.py",
             "jnp.where(is_token, history, nowhere)", "jnp.where(is_token, history, 0)", ARRAYS),
    Mutation("places given twice", "ngram_lm/arrays.py",
             "is_taken = (owner[wanted] == rows[:, None]).all(1)",
             "is_taken = (owner[wanted] == rows[:, None]).any(1)", ARRAYS),
    Mutation("ids that aren't listed impossible", "ngram_lm/arpa.py",
             "default = unknown[0] if len(unknown) else", "default =", ARPA),
    Mutation("any vocabulary for n-grams", "ngram_lm/arpa.py",
             "known is not None and known != vocabulary", "False", NGRAM),
    Mutation("n-grams listed twice taken", "ngram_lm/arpa.py",
             "is_twice = np.diff(grams.keys) == 0", "is_twice = np.diff(grams.keys) < 0", ARPA),
    Mutation("half a gzip file taken", "ngram_lm/arpa.py",
             "    for _ in self._file:\n", "    for _ in ():\n", ARPA),
    Mutation("sources of two vocabularies", "ngram.py",
             "if fingerprint not in (None, source.vocabulary):", "if False:", NGRAM),
)


def run_tests(copy: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
  """Runs tests on a copy: whether they pass, and what failed first."""
  environment = os.environ | {"PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
  where = "import bpd_jax; print(bpd_jax.__file__)"
  found = subprocess.run(
      [sys.executable, "-c", where], cwd=copy, env=environment, capture_output=True, text=True,
      check=True,
  )
  assert Path(found.stdout.strip()).is_relative_to(copy), found.stdout
  done = subprocess.run(
      [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
      cwd=copy, env=environment, capture_output=True, text=True, check=False,
  )
  failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.MULTILINE)
  if done.returncode and not failed:
    raise SystemExit(f"error: pytest {' '.join(tests)} ended otherwise:\n{done.stdout[-2000:]}")
  return done.returncode == 0, failed.group(1) if failed else ""


def main(words: Sequence[str]) -> int:
  """Runs the mutations whose name or file has one of the words, or all; the exit status."""
  mutations = [
      mutation for mutation in MUTATIONS
      if not words or any(word in f"{mutation.name} {mutation.file}" for word in words)
  ]
  table = Table("mutation", "file", "noticed by", "seconds")
  survived = 0
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder).resolve()
    for name in ("bpd_jax", "tests", "gin", "experiments"):
      shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pytest.ini", copy)
    for tests in sorted({mutation.tests for mutation in mutations}):
      passes, failed = run_tests(copy, tests)
      if not passes:
        print(f"error: {failed} fails without any mutation", file=sys.stderr)
        return 1
    for mutation in track(mutations, description="mutate"):
      path = copy / "bpd_jax" / mutation.file
      text = path.read_text()
      if text.count(mutation.old) != 1:
        table.add_row(mutation.name, mutation.file, "[red]no longer applies", "")
        survived += 1
        continue
      path.write_text(text.replace(mutation.old, mutation.new))
      began = time.perf_counter()
      passes, failed = run_tests(copy, mutation.tests)
      path.write_text(text)
      survived += passes
      noticed = "[red]nothing: it survives" if passes else failed.replace("[", r"\[")
      table.add_row(mutation.name, mutation.file, noticed, f"{time.perf_counter() - began:.0f}")
  console = Console()
  console.width = max(console.width, 130)
  console.print(table)
  console.print(f"{len(mutations) - survived} of {len(mutations)} mutations noticed")
  return 1 if survived else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
