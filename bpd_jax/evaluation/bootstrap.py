"""Intervals of what is measured on rows: the rows are drawn again, with a fixed seed."""

from collections.abc import Callable

import numpy as np

NUM_RESAMPLES = 1000


def bootstrap_interval(statistic: Callable[..., np.ndarray], *values: np.ndarray) -> list[float]:
  """Bootstrap 95 % interval of what is computed from sums over rows.

  Args:
    statistic: of the sums of `values`, in order; gets an array [resamples] of each. Where
      it is nan, a resample isn't counted.
    *values: [rows] each, paired: a resample draws the same rows of all of them.

  Returns:
    The 2.5 % and 97.5 % quantiles.
  """
  rng = np.random.default_rng(0)
  rows = rng.integers(0, len(values[0]), [NUM_RESAMPLES, len(values[0])])
  drawn = statistic(*(column[rows].sum(1) for column in values))
  return [float(x) for x in np.nanquantile(drawn, [0.025, 0.975])]


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float]:
  """Bootstrap 95 % interval of a ratio of sums over rows.

  Args:
    numerators: [rows], tokens for a block efficiency.
    denominators: [rows], decoder calls for a block efficiency.

  Returns:
    The 2.5 % and 97.5 % quantiles.
  """
  return bootstrap_interval(np.divide, numerators, denominators)


def mean_interval(values: np.ndarray) -> list[float]:
  """Bootstrap 95 % interval of the mean of [rows] values."""
  return ratio_interval(values, np.ones(len(values)))
