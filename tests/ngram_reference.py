"""Slow n-gram models: dictionaries and the formulas as they stand in the papers."""

from collections import Counter, defaultdict

import numpy as np

START, EOS = 0, 1


def random_sequences(seed, vocab_size, num, length=12):
  """Sequences in which few tokens are frequent, each leaning on the one before it."""
  random = np.random.default_rng(seed)
  weights = 1 / np.arange(1, vocab_size - 1) ** 1.3
  weights /= weights.sum()
  sequences = []
  for _ in range(num):
    sequence = list(random.choice(vocab_size - 2, random.integers(0, length), p=weights) + 2)
    for i in range(1, len(sequence)):
      if random.random() < 0.5:
        sequence[i] = 2 + (7 * sequence[i - 1] + random.integers(2)) % (vocab_size - 2)
    sequences.append(np.asarray(sequence, np.int32))
  return sequences


def count(sequences, order):
  """n-gram -> count, for every order."""
  counts = [Counter() for _ in range(order)]
  for sequence in sequences:
    closed = (START, *map(int, sequence), EOS)
    for n in range(1, order + 1):
      for i in range(len(closed) - n + 1):
        counts[n - 1][closed[i : i + n]] += 1
  return counts


def children(grams):
  """context -> the tokens after it."""
  after = defaultdict(list)
  for gram in grams:
    after[gram[:-1]].append(gram[-1])
  return after


class KneserNey:
  """Chen & Goodman 1998, eq. 24-27, with what is cut off counted as discounted."""

  def __init__(self, sequences, order, vocab_size, cutoffs):
    self.raw = count(sequences, order)
    self.cutoffs, self.vocab_size = cutoffs, vocab_size
    self.adjusted = []
    for n in range(1, order):
      kinds = Counter(gram[1:] for gram in self.raw[n])
      self.adjusted.append({
          gram: self.raw[n - 1][gram] if gram[0] == START else kinds[gram]
          for gram in self.raw[n - 1]
      })
    self.adjusted.append(dict(self.raw[-1]))
    del self.adjusted[0][(START,)]
    self.children = [children(grams) for grams in self.adjusted]
    self.amounts = [self._amounts(grams.values()) for grams in self.adjusted]

  @staticmethod
  def _amounts(counts):
    n1, n2, n3, n4 = (sum(count == r for count in counts) for r in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:
      return 0.5, 1, 1.5
    y = n1 / (n1 + 2 * n2)
    amounts = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    return amounts if all(0 < x <= i for i, x in enumerate(amounts, 1)) else (0.5, 1, 1.5)

  def prob(self, history, token):
    n = len(history)
    lower = self.prob(history[1:], token) if n else 1 / (self.vocab_size - 1)
    counts = {w: self.adjusted[n][*history, w] for w in self.children[n][history]}
    total = sum(counts.values())
    if not total:
      return lower
    kept = {w for w in counts if self.raw[n][*history, w] >= self.cutoffs[n]}
    amount = lambda w: self.amounts[n][min(counts[w], 3) - 1]
    left = sum(amount(w) if w in kept else counts[w] for w in counts)
    own = counts[token] - amount(token) if token in kept else 0
    return own / total + left / total * lower


class Katz:
  """Katz 1987, eq. 8-12; see `smoothing.katz` for what isn't in the paper."""

  def __init__(self, sequences, order, vocab_size, cutoffs):
    self.raw = count(sequences, order)
    self.cutoffs, self.vocab_size = cutoffs, vocab_size
    del self.raw[0][(START,)]
    self.children = [children(grams) for grams in self.raw]
    self.factors = [self._factors(grams.values()) for grams in self.raw]
    self.memory = {}

  @staticmethod
  def _factors(counts):
    n = [0, *(sum(count == r for count in counts) for r in range(1, 7))]
    for k in (5, 4, 3, 2):
      if min(n[1 : k + 2]) == 0 or (k + 1) * n[k + 1] >= n[1]:
        continue
      common = (k + 1) * n[k + 1] / n[1]
      factors = [
          ((r + 1) * n[r + 1] / n[r] / r - common) / (1 - common) for r in range(1, k + 1)
      ]
      if all(0 < factor < 1 for factor in factors):
        return factors
    return None

  def discounted(self, n, count):
    factors = self.factors[n]
    if factors is None:
      return count - 0.5
    return count * factors[count - 1] if count <= len(factors) else count

  def distribution(self, history):
    """token -> probability, of all but the start."""
    if history not in self.memory:
      self.memory[history] = self._distribution(history)
    return self.memory[history]

  def _distribution(self, history):
    n = len(history)
    others = [w for w in range(self.vocab_size) if w != START]
    if n:
      lower = self.distribution(history[1:])
    else:
      lower = dict.fromkeys(others, 1 / len(others))
    counts = {w: self.raw[n][*history, w] for w in self.children[n][history]}
    kept = {w: self.discounted(n, c) for w, c in counts.items() if c >= self.cutoffs[n]}
    if not kept:
      return lower
    total = sum(counts.values())
    if sum(kept.values()) == total:
      total += 1
    probs = {w: c / total for w, c in kept.items()}
    if len(probs) == len(others):
      return {w: p / sum(probs.values()) for w, p in probs.items()}
    rest = [w for w in others if w not in probs]
    scale = (1 - sum(probs.values())) / sum(lower[w] for w in rest)
    return probs | {w: scale * lower[w] for w in rest}


class Dictionary:
  """A back-off model as a dictionary of its n-grams."""

  def __init__(self, model):
    from bpd_jax.ngram_lm.backoff import gram_tokens

    self.order, self.vocab_size = model.order, model.vocab_size
    self.grams = {}
    for n in range(1, model.order + 1):
      values = zip(model.log_probs[n - 1].tolist(), model.back_offs[n - 1].tolist())
      grams = map(tuple, gram_tokens(model.orders, n).T.tolist())
      self.grams.update(zip(grams, values))

  def log_prob(self, history, token):
    """Of a token after a tuple of any length."""
    history = history[max(len(history) - self.order + 1, 0) :]
    if (*history, token) in self.grams:
      return self.grams[*history, token][0]
    return self.grams.get(history, (0, 0))[1] + self.log_prob(history[1:], token)

  def probs(self, history):
    """[vocab] of all tokens."""
    return np.exp([self.log_prob(history, w) for w in range(self.vocab_size)])
