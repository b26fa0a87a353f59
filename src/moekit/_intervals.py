"""Intervals of a ratio of sums over independent units (documents, questions), one rule for all that is compared.

For units i with a total t_i and a size s_i the figure is sum_i t_i / sum_i s_i. Units are resampled whole, numerator
and denominator together: BCa bootstrap. Of few units it covers too little (a 95 % interval of two units some 54 %, of
eight 88 %), so below `FEW` units each end is the wider one of BCa and of Student's t-interval,
``figure -+ t_{N-1} * standard_error``, where the standard error is that of a ratio.

Legend: N units.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from scipy import stats

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 9999
# Below so many units a bootstrap is not trusted alone.
FEW = 20


def ratio_standard_error(total_N: Array, size_N: Array) -> float | None:
    """Standard error of sum(total) / sum(size) over independent units, by linearisation; None for one unit."""
    n = len(total_N)
    if n < 2:
        return None
    residual_N = total_N - total_N.sum() / size_N.sum() * size_N
    return float(math.sqrt(n / (n - 1) * float(residual_N @ residual_N)) / size_N.sum())


def ratio_interval(
    total_N: Array, size_N: Array, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Interval of sum(total) / sum(size) over at least two units.

    Args:
        total_N: numerator of each unit.
        size_N: its denominator, above zero.
        level: confidence level.
        resamples: bootstrap resamples.
        seed: of the resampling.
    """
    figure = float(total_N.sum() / size_N.sum())
    low, high = _bootstrap(total_N, size_N, level, resamples, seed)
    error = ratio_standard_error(total_N, size_N) or 0.0
    return widened((low, high), figure, error, len(total_N), level)


def widened(
    interval: tuple[float, float], figure: float, error: float, n: int, level: float = 0.95
) -> tuple[float, float]:
    """The wider one, at each end, of a bootstrap interval and Student's; of many units the bootstrap alone."""
    if n >= FEW:
        return interval
    margin = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return min(interval[0], figure - margin), max(interval[1], figure + margin)


def _bootstrap(total_N: Array, size_N: Array, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """BCa bootstrap of sum(total) / sum(size) over units."""
    figure = float(total_N.sum() / size_N.sum())
    if np.ptp(total_N / size_N) == 0:
        return figure, figure
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (total_N, size_N),
            lambda total, size, axis=-1: total.sum(axis=axis) / size.sum(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, 2**22 // len(total_N)),
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    if not (math.isfinite(low) and math.isfinite(high)):
        # Two or three units can leave the correction undefined; plain percentiles always are.
        tail = (1 - level) / 2
        low, high = (float(q) for q in np.quantile(result.bootstrap_distribution, (tail, 1 - tail)))
    return min(low, figure), max(high, figure)
