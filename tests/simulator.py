"""Blockwise decoding on paper: counts calls from the tokens alone, in plain Python."""


def count_calls(greedy, draft_after, width, limit, eos_id):
  """Replays one row.

  Args:
    greedy: list of ints, the base model's greedy tokens, at least `limit` long.
    draft_after: draft_after(n) -> list of drafted tokens when n are certain,
      for n >= 1; the first call has no draft.
    width: nodes a call verifies, root included.
    limit: most tokens of the row.
    eos_id: the id that ends the row.

  Returns:
    (tokens, emitted): the row's tokens and how many each call emitted.
  """
  tokens, emitted = [], []
  while len(tokens) < limit and eos_id not in tokens:
    n = len(tokens)
    draft = draft_after(n)[: width - 1] if n else []
    fresh = []
    for token in draft:
      if token != greedy[n + len(fresh)] or eos_id in fresh:
        break
      fresh.append(token)
    if eos_id not in fresh:
      fresh.append(greedy[n + len(fresh)])
    fresh = fresh[: limit - n]
    tokens += fresh
    emitted.append(len(fresh))
  return tokens, emitted
