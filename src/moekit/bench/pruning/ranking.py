"""Which method is best at each budget, against chance, frequency and the unchanged model.

Legend: N documents, R resamples.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from moekit._intervals import ratio_standard_error, widened
from moekit.bench.pruning.result import ALL, PruneBenchResult, PruneRun, Ranking, RankRow, Share
from moekit.bench.pruning.setting import FREQUENCY, RANDOM, Keep, same_keep
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.pairs import PairedDifference, paired

RESAMPLES = 1999
NOT = "not "
Array = np.ndarray[Any, np.dtype[np.float64]]


def mean_over_seeds(runs: Sequence[PruneRun]) -> PerplexityResult:
    """Each document's likelihood, averaged over runs with several seeds."""
    first = runs[0].perplexity
    nll = np.mean([run.perplexity.nll for run in runs], axis=0)
    return first.model_copy(update={"nll": tuple(nll.tolist()), "model": runs[0].name})


def part(result: PerplexityResult, text: str) -> PerplexityResult:
    """Only the documents of a text: "all", a domain, or "not " and a domain."""
    if text == ALL:
        return result
    name, inside = (text.removeprefix(NOT), not text.startswith(NOT))
    return result.only([i for i, domain in enumerate(result.domains) if (domain == name) == inside])


def rank(result: PruneBenchResult, keep: Keep, calibration: str = ALL, text: str = ALL) -> Ranking | None:
    """Rank all methods at one budget.

    Args:
        result: the runs.
        keep: the budget.
        calibration: the text that methods decided from.
        text: the documents to look at; see `part`.

    Returns:
        The ranking; None if there are no such documents or runs.
    """
    unchanged = part(result.unchanged, text)
    grouped: dict[str, list[PruneRun]] = {}
    for run in result.runs:
        if same_keep(run.keep, keep) and run.calibration == calibration:
            grouped.setdefault(run.name, []).append(run)
    if not grouped or not any(unchanged.tokens):
        return None
    controls = {
        method: part(mean_over_seeds(runs), text)
        for method in (RANDOM, FREQUENCY)
        for runs in [next((r for r in grouped.values() if r[0].method == method), None)]
        if runs is not None
    }
    rows = [_row(runs, text, unchanged, controls, result.setting.seed) for runs in grouped.values()]
    return Ranking(
        keep=keep,
        calibration=calibration,
        text=text,
        unchanged=unchanged.overall.nll,
        documents=unchanged.overall.documents,
        rows=tuple(sorted(rows, key=lambda row: (row.nll, row.name))),
    )


def _row(
    runs: Sequence[PruneRun],
    text: str,
    unchanged: PerplexityResult,
    controls: dict[str, PerplexityResult],
    seed: int,
) -> RankRow:
    mean = part(mean_over_seeds(runs), text)
    each = [part(run.perplexity, text).overall.nll for run in runs]
    own = mean.overall
    margin = None if own.standard_error is None else _margin(own.documents) * own.standard_error
    against = {
        name: None if runs[0].method == name else _paired(control, mean, seed) for name, control in controls.items()
    }
    random = controls.get(RANDOM)
    return RankRow(
        name=runs[0].name,
        method=runs[0].method,
        seeds=len(runs),
        nll=own.nll,
        low=None if margin is None else own.nll - margin,
        high=None if margin is None else own.nll + margin,
        spread=statistics.stdev(each) if len(each) > 1 else None,
        least=min(each),
        most=max(each),
        rise=_paired(unchanged, mean, seed),
        against_random=against.get(RANDOM),
        against_frequency=against.get(FREQUENCY),
        removed=None if random is None or runs[0].method == RANDOM else removed(unchanged, random, mean, seed),
        reconstruction=statistics.fmean(run.mean_reconstruction for run in runs),
        lost_tokens=statistics.fmean(run.mean_lost_tokens for run in runs),
        seconds=statistics.fmean(run.decide_seconds + run.rewrite_seconds for run in runs),
        bytes=runs[0].bytes,
    )


def _margin(documents: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, documents - 1))


def _paired(a: PerplexityResult, b: PerplexityResult, seed: int) -> PairedDifference | None:
    if a.overall.documents < 2:
        return None
    size_N, a_N, b_N = _columns(a, b)
    # Through plain numbers, for fewer resamples: a bench makes hundreds of intervals.
    found = paired((a_N / size_N), (b_N / size_N), seed, weights=size_N, resamples=RESAMPLES)
    return found


def _columns(first: PerplexityResult, *others: PerplexityResult) -> tuple[Array, ...]:
    size_N = np.array(first.tokens, dtype=np.float64)
    keep = size_N > 0
    return (size_N[keep], *(np.array(r.nll, dtype=np.float64)[keep] for r in (first, *others)))


def removed(
    unchanged: PerplexityResult, random: PerplexityResult, method: PerplexityResult, seed: int = 0
) -> Share | None:
    """Share of random pruning's rise that a method does not have: 1 - (method - unchanged) / (random - unchanged).

    The interval is the percentile bootstrap over documents, and of few no narrower than Student's; see `pairs`.

    Returns:
        The share; None where random pruning raises nothing that shows: a share of noise says nothing.
    """
    chance = _paired(unchanged, random, seed)
    if chance is None or chance.low <= 0:
        return None
    _, base_N, random_N, own_N = _columns(unchanged, random, method)
    rise_N, own_rise_N = random_N - base_N, own_N - base_N
    mean = float(1 - own_rise_N.sum() / rise_N.sum())
    draws_RN = np.random.default_rng(seed).integers(0, len(rise_N), (RESAMPLES, len(rise_N)))
    below_R = rise_N[draws_RN].sum(1)
    above_R = own_rise_N[draws_RN].sum(1)
    if (below_R <= 0).any():
        return Share(mean=mean, low=None, high=None)
    low, high = (float(q) for q in np.quantile(1 - above_R / below_R, (0.025, 0.975)))
    error = ratio_standard_error(own_rise_N, rise_N) or 0.0
    low, high = widened((low, high), mean, error, len(rise_N))
    return Share(mean=mean, low=low, high=high)


def mean_nll(result: PruneBenchResult, name: str, keep: Keep, calibration: str = ALL, text: str = ALL) -> float | None:
    """Mean loss of one method on a text, nats a token, over its seeds; None if it took no part there."""
    runs = result.select(name, keep, calibration)
    found = part(mean_over_seeds(runs), text) if runs else None
    return None if found is None or not any(found.tokens) else found.overall.nll


def all_rankings(result: PruneBenchResult) -> tuple[Ranking, ...]:
    """The whole text decided from the whole text; for each task its domain, and the rest, from either."""
    wanted = [(ALL, ALL)]
    for domain in result.setting.domains:
        wanted += [(domain, domain), (domain, NOT + domain), (ALL, domain)]
    found = [rank(result, keep, calibration, text) for keep in result.setting.keep for calibration, text in wanted]
    return tuple(ranking for ranking in found if ranking is not None)
