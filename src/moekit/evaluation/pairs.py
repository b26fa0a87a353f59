"""Paired differences: two models on the same documents or questions.

Differences within a pair vary far less than the documents do, so they show effects that two separate error bars hide.
All are b - a: with a the baseline, a positive difference is what b adds.

For units i of size w_i (tokens of a document; 1 for a question) with means a_i and b_i::

    difference = sum_i w_i (b_i - a_i) / sum_i w_i

Intervals are those of `moekit._intervals`: BCa bootstraps over units, and Student's where units are few.

Legend: N units, R sign flips.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from moekit._intervals import FEW, RESAMPLES, Array, ratio_interval, ratio_standard_error
from moekit.errors import BadConfig, BadData, NumericFault
from moekit.evaluation.documents import PerplexityResult, bounded_exp


class PairedDifference(BaseModel):
    """How much b differs from a, over pairs.

    Attributes:
        mean: b - a, weighted by size.
        standard_error: of the mean, over units.
        low: lower end of the interval: the bias-corrected and accelerated bootstrap's, or with fewer than `FEW` units
            the t-interval's if that is lower.
        high: upper end, likewise.
        n: units.
        p_value: two-sided sign-flip test of "a and b may be exchanged within each pair"; with fewer than `FEW` units
            the paired t-test's if that is larger.
        level: confidence level of the interval.
        ratio: exp(mean); for a difference of log likelihoods this is perplexity b / perplexity a. Else None.
        ratio_low: exp(low).
        ratio_high: exp(high).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    standard_error: float
    low: float
    high: float
    n: int
    p_value: float
    level: float = 0.95
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero."""
        return self.low > 0 or self.high < 0


class McNemar(BaseModel):
    """Exact McNemar test on questions that one model answers and the other does not.

    Attributes:
        only_a: questions that only a answers rightly.
        only_b: questions that only b answers rightly.
        p_value: two-sided.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    only_a: int
    only_b: int
    p_value: float


def paired(
    a: PerplexityResult | Sequence[float] | Array,
    b: PerplexityResult | Sequence[float] | Array,
    seed: int = 0,
    *,
    weights: Sequence[float] | Array | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """Compare b with a over the units they share.

    Args:
        a: the baseline: a perplexity result, or one number per unit.
        b: what is compared with it, on the same units.
        seed: of the bootstrap and of the sign flips.
        weights: size of each unit, for plain numbers only; equal by default.
        level: confidence level.
        resamples: bootstrap resamples, and sign flips where there are too many to try all.

    Returns:
        b - a. Between perplexity results it is in nats per token and `ratio` is the ratio of perplexities.

    Raises:
        BadData: fewer than two pairs, or not the same units.
        NumericFault: NaN or infinity.
        BadConfig: a level outside (0, 1), or results of different text.
    """
    if not 0 < level < 1:
        raise BadConfig(f"a confidence level of {level} is none", hint="choose one between 0 and 1, such as 0.95")
    logs = isinstance(a, PerplexityResult)
    if isinstance(a, PerplexityResult) and isinstance(b, PerplexityResult):
        a_N, b_N, size_N = _of_results(a, b)
    elif isinstance(a, PerplexityResult) or isinstance(b, PerplexityResult):
        raise BadData("a perplexity result can only be compared with another one")
    else:
        a_N, b_N = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        size_N = np.ones_like(a_N) if weights is None else np.asarray(weights, dtype=np.float64)
    _check(a_N, b_N, size_N)
    total_N = (b_N - a_N) * size_N
    mean = float(total_N.sum() / size_N.sum())
    error = ratio_standard_error(total_N, size_N) or 0.0
    low, high = ratio_interval(total_N, size_N, level=level, resamples=resamples, seed=seed)
    return PairedDifference(
        mean=mean,
        standard_error=error,
        low=low,
        high=high,
        n=len(total_N),
        p_value=max(sign_flip(total_N, resamples, seed), _student(mean, error, len(total_N))),
        level=level,
        ratio=bounded_exp(mean) if logs else None,
        ratio_low=bounded_exp(low) if logs else None,
        ratio_high=bounded_exp(high) if logs else None,
    )


def _student(mean: float, error: float, n: int) -> float:
    """Two-sided p-value of the paired t-test; 0 where there are units enough to do without, or no spread."""
    return float(2 * stats.t.sf(abs(mean) / error, n - 1)) if n < FEW and error > 0 else 0.0


def sign_flip(total_N: Array, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of sum(total) when each unit's sign is a coin toss; exact where 2^N flips are few enough."""
    if not total_N.any():
        return 1.0
    n, observed = len(total_N), abs(total_N.sum()) * (1 - 1e-12)
    exact = n < 31 and 2**n <= resamples
    rng, hits, done = np.random.default_rng(seed), 0, 0
    runs = 2**n if exact else resamples
    while done < runs:
        some = min(runs - done, max(1, 2**22 // n))
        if exact:
            flipped_RN = (np.arange(done, done + some)[:, None] >> np.arange(n)) & 1
        else:
            flipped_RN = rng.integers(0, 2, (some, n), dtype=np.uint8)
        hits += int((np.abs(total_N.sum() - 2 * (flipped_RN @ total_N)) >= observed).sum())
        done += some
    # The data as they are count as one of the random flips, so that p is never zero.
    return hits / runs if exact else (hits + 1) / (runs + 1)


def mcnemar(correct_a: Sequence[float], correct_b: Sequence[float]) -> McNemar:
    """Test whether two models answer equally many of the same questions rightly.

    Args:
        correct_a: 1 where a is right, 0 where it is wrong.
        correct_b: the same for b.

    Raises:
        BadData: other questions, or values that are neither 0 nor 1.
    """
    a_N, b_N = np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64)
    _check_units(a_N, b_N)
    if not (np.isin(a_N, (0, 1)).all() and np.isin(b_N, (0, 1)).all()):
        raise BadData("McNemar's test takes answers that are right (1) or wrong (0)")
    only_a, only_b = int(((a_N == 1) & (b_N == 0)).sum()), int(((a_N == 0) & (b_N == 1)).sum())
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a=only_a, only_b=only_b, p_value=p_value)


def check_same_text(a: PerplexityResult, b: PerplexityResult) -> None:
    """Refuse to pair results of different text.

    Raises:
        BadConfig: the documents differ in number, domain, tokens or ids, or one result does not tell its text.
    """
    if a.domains != b.domains or a.tokens != b.tokens:
        raise BadConfig(
            f"the two models were measured on different text: {len(a.domains)} documents with {sum(a.tokens)} tokens "
            f"against {len(b.domains)} with {sum(b.tokens)}",
            hint="evaluate both with the same data, limits and tokenizer",
        )
    if bool(a.digests) != bool(b.digests):
        raise BadConfig("one of the two results does not say which text it is of", hint="evaluate both again")
    if a.digests != b.digests:
        number = next(i for i, (x, y) in enumerate(zip(a.digests, b.digests, strict=True)) if x != y)
        raise BadConfig(
            f"the two models were measured on different text: document {number} of domain {a.domains[number]} differs, "
            "though there are as many tokens",
            hint="evaluate both with the same data, limits and tokenizer",
        )


def _of_results(a: PerplexityResult, b: PerplexityResult) -> tuple[Array, Array, Array]:
    check_same_text(a, b)
    size_N = np.array(a.tokens, dtype=np.float64)
    keep = size_N > 0
    return np.array(a.nll)[keep] / size_N[keep], np.array(b.nll)[keep] / size_N[keep], size_N[keep]


def _check_units(a_N: Array, b_N: Array) -> None:
    if a_N.ndim != 1 or a_N.shape != b_N.shape:
        raise BadData(f"a has {a_N.size} units and b has {b_N.size}: no pairs", hint="evaluate both on the same data")


def _check(a_N: Array, b_N: Array, size_N: Array) -> None:
    _check_units(a_N, b_N)
    if size_N.shape != a_N.shape or not (size_N > 0).all():
        raise BadData("every unit needs a weight above zero")
    if len(a_N) < 2:
        raise BadData(f"{len(a_N)} pair gives no interval", hint="evaluate on at least two documents or questions")
    if not (np.isfinite(a_N).all() and np.isfinite(b_N).all()):
        raise NumericFault("a paired difference of NaN or infinity", hint="run `moekit check` on both checkpoints")
