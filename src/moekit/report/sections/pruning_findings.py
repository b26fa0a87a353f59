"""What a bench of pruning methods says, in a few sentences: for the head of its page and for the terminal."""

from __future__ import annotations

import math
from typing import Literal

from moekit.bench.pruning.result import ALL, PruneBenchResult, Ranking
from moekit.bench.pruning.setting import RANDOM, Keep
from moekit.report.data import Finding, KeyFigure
from moekit.report.markup import number

Status = Literal["good", "neutral", "bad"]


def keep_name(keep: Keep) -> str:
    """A budget in words: "50 % of the experts"."""
    if isinstance(keep, str):
        return keep
    return f"{number(keep, 0, '%')} of the experts" if isinstance(keep, float) else f"{keep} experts a layer"


def whole(result: PruneBenchResult) -> list[Ranking]:
    """Rankings of the whole text, smallest size first."""
    found = [r for r in result.rankings if (r.calibration, r.text) == (ALL, ALL) and r.rows]
    return sorted(found, key=lambda r: r.rows[0].bytes)


def headline(result: PruneBenchResult) -> Finding:
    """The best method at the smallest size, against chance."""
    rankings = whole(result)
    if not rankings:
        return Finding(text="No method could be measured.", status="bad")
    smallest = rankings[0]
    best = smallest.rows[0]
    random = next((row for row in smallest.rows if row.method == RANDOM), None)
    if random is not None and random.rise is not None and random.rise.low <= 0:
        text = f"Dropping experts at random costs nothing that shows at {keep_name(smallest.keep)}."
        detail = "Where chance costs nothing no method can be told from it: keep fewer, or measure more text."
        return Finding(text=text, status=_status(result, "bad"), detail=detail)
    rise = best.nll - smallest.unchanged
    text = f"{best.name} loses least at {keep_name(smallest.keep)}: {rise:+.3f} nats a token"
    if best.removed is not None and rise > 0:
        text += f", {number(best.removed.mean, 0, '%')} less than random pruning loses"
    better = best.against_random is not None and best.against_random.high < 0
    detail = (
        f"perplexity {math.exp(min(best.nll, 690.0)):.2f}, unchanged {math.exp(min(smallest.unchanged, 690.0)):.2f}"
    )
    return Finding(text=f"{text}.", status=_status(result, "good" if better else "neutral"), detail=detail)


def _status(result: PruneBenchResult, found: Status) -> Status:
    """No verdict from intervals that a domain of a single document made narrow."""
    return "neutral" if any(cut.documents == 1 for cut in result.cuts) else found


def findings(result: PruneBenchResult) -> tuple[Finding, ...]:
    """The best at each other size, who is no better than chance, whose intervals mislead, and who took no part."""
    found = []
    for ranking in whole(result)[1:]:
        best = ranking.rows[0]
        rise = best.nll - ranking.unchanged
        found.append(Finding(text=f"{best.name} loses least at {keep_name(ranking.keep)}: {rise:+.3f} nats a token."))
    for ranking in whole(result):
        poor = [r.name for r in ranking.rows if r.against_random is not None and r.against_random.high >= 0]
        if poor:
            words = f"No better than random pruning at {keep_name(ranking.keep)}: {', '.join(poor)}."
            detail = "the interval of the paired difference reaches zero"
            found.append(Finding(text=words, status=_status(result, "bad"), detail=detail))
    for cut in result.cuts:
        words = f"{cut.domain}: {cut.words}: intervals are too narrow."
        found.append(Finding(text=words, detail="passages of one document resemble each other: measure on more"))
    if result.skipped:
        names = ", ".join(dict.fromkeys(s.name for s in result.skipped))
        found.append(Finding(text=f"Took no part: {names}.", status="bad", detail="the reasons are below"))
    return tuple(found)


def key_figures(result: PruneBenchResult) -> tuple[KeyFigure, ...]:
    """How much was compared."""
    names = {run.name for run in result.runs}
    tokens = sum(text.tokens for text in result.calibrations if text.name == ALL)
    return (
        KeyFigure(label="methods compared", value=str(len(names)), note=f"{len(result.runs)} pruned models"),
        KeyFigure(label="unchanged model", value=f"{result.unchanged.overall.perplexity:.2f}", note="perplexity"),
        KeyFigure(label="decided from", value=f"{tokens:,}", note="tokens, in one pass for all"),
        KeyFigure(label="measured on", value=f"{result.unchanged.overall.tokens:,}", note="held-out tokens"),
    )
