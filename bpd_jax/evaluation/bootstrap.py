"""Intervals of what is measured on rows: the rows are drawn again, with a fixed seed."""

import numpy as np

NUM_RESAMPLES = 1000


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float]:
  """Bootstrap 95 % interval of a ratio of sums over rows.

  Args:
    numerators: [rows], tokens for a block efficiency.
    denominators: [rows], decoder calls for a block efficiency.

  Returns:
    The 2.5 % and 97.5 % quantiles.
  """
  rng = np.random.default_rng(0)
  rows = rng.integers(0, len(numerators), [NUM_RESAMPLES, len(numerators)])
  ratios = numerators[rows].sum(1) / denominators[rows].sum(1)
  return [float(x) for x in np.quantile(ratios, [0.025, 0.975])]


def mean_interval(values: np.ndarray) -> list[float]:
  """Bootstrap 95 % interval of the mean of [rows] values."""
  return ratio_interval(values, np.ones(len(values)))
