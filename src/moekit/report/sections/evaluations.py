"""Tables of one model against others, and continuations side by side."""

from __future__ import annotations

from collections.abc import Sequence

from moekit.evaluation.comparison import Comparison, DomainComparison, TaskComparison
from moekit.evaluation.documents import DomainPerplexity
from moekit.evaluation.generation import SideBySide
from moekit.evaluation.pairs import PairedDifference
from moekit.report.data import TableSection
from moekit.report.markup import number
from moekit.report.parts import Cell, Column, Interval, Table


def relative(difference: PairedDifference | None) -> Interval | None:
    """A paired difference of log likelihoods as a relative change of perplexity."""
    if difference is None or difference.ratio is None:
        return None
    assert difference.ratio_low is not None
    assert difference.ratio_high is not None
    return Interval(mean=difference.ratio - 1, low=difference.ratio_low - 1, high=difference.ratio_high - 1)


def interval(difference: PairedDifference | None) -> Interval | None:
    """A paired difference with its interval."""
    if difference is None:
        return None
    return Interval(mean=difference.mean, low=difference.low, high=difference.high)


def comparison_section(
    comparisons: Sequence[Comparison], *, title: str = "Quality, against the baseline", lead: str = "", note: str = ""
) -> TableSection:
    """For each comparison a table of perplexities by domain and one of tasks.

    Args:
        comparisons: from `moekit.evaluation.compare`.
        title: heading.
        lead: what to see.
        note: how it was measured; what the intervals mean is said anyway.
    """
    tables = []
    for c in comparisons:
        if c.overall is not None:
            tables.append(_domains(c))
        if c.tasks:
            tables.append(_tasks(c))
    meaning = (
        "Intervals are 95 % bootstrap intervals over documents or questions, of fewer than 20 no narrower than "
        "Student's, differences paired; they tell what other text would give, not what another training seed would. "
        "Rows are not corrected for their number."
    )
    return TableSection(title=title, lead=lead, note=f"{note} {meaning}".strip(), tables=tuple(tables))


def _domains(c: Comparison) -> Table:
    columns = (
        Column(name="text"),
        Column(name="documents"),
        Column(name="tokens"),
        Column(name=f"perplexity, {c.a}", digits=2),
        Column(name=f"perplexity, {c.b}", digits=2),
        Column(name="difference, paired", unit="%", digits=2, signed=True, better="low"),
        Column(name="p", unit="p"),
    )
    found = [*c.domains, *([c.overall] if c.overall is not None and len(c.domains) != 1 else [])]
    return Table(columns=columns, rows=tuple(map(_domain_row, found)), caption=f"Perplexity: {c.b} against {c.a}")


def _domain_row(d: DomainComparison) -> tuple[Cell, ...]:
    p = None if d.difference is None else d.difference.p_value
    return (d.domain, d.a.documents, d.a.tokens, _of(d.a), _of(d.b), relative(d.difference), p)


def _of(d: DomainPerplexity) -> Cell:
    if d.low is None or d.high is None:
        return d.perplexity
    return Interval(mean=d.perplexity, low=d.low, high=d.high)


def _tasks(c: Comparison) -> Table:
    columns = (
        Column(name="task"),
        Column(name="metric"),
        Column(name="questions"),
        Column(name=c.a, unit="%", digits=1),
        Column(name=c.b, unit="%", digits=1),
        Column(name="difference, points, paired", unit="%", digits=1, signed=True, better="high"),
        Column(name="only one right", note=f"how many questions only {c.a} and only {c.b} answered rightly"),
        Column(name="McNemar p", unit="p"),
    )
    rows: list[tuple[Cell, ...]] = [_task_row(t) for t in c.tasks]
    if len(c.tasks) > 1:
        n = sum(t.n for t in c.tasks)
        a, b = (sum(values) / len(c.tasks) for values in ([t.a for t in c.tasks], [t.b for t in c.tasks]))
        rows.append(("mean of tasks", "", n, a, b, interval(c.tasks_mean), None, None))
    return Table(columns=columns, rows=tuple(rows), caption=f"Multiple choice (lm-eval): {c.b} against {c.a}")


def _task_row(t: TaskComparison) -> tuple[Cell, ...]:
    alone, p = (f"{t.test.only_a} : {t.test.only_b}", t.test.p_value) if t.test is not None else (None, None)
    return (t.task, t.metric, t.n, t.a, t.b, interval(t.difference), alone, p)


def generation_section(
    result: SideBySide, *, title: str = "The same prompts, side by side", lead: str = "", note: str = ""
) -> TableSection:
    """Continuations of two models.

    Args:
        result: from `moekit.evaluation.side_by_side`.
        title: heading.
        lead: what to see; by default how far they agree.
        note: how it was made.
    """
    columns = (
        Column(name="prompt"),
        Column(name=result.a),
        Column(name=result.b),
        Column(name="first difference at token"),
    )
    words = f"{number(result.identical, 0, '%')} of the continuations are identical; "
    words += f"{number(result.common_share, 0, '%')} of the tokens come "
    words += "before the first difference."
    if result.agreement is not None:
        words += f" Given {result.a}'s text, {result.b} would have chosen the same next token at "
        words += f"{number(result.agreement, 1, '%')} of the positions."
    rows: tuple[tuple[Cell, ...], ...] = tuple((p.prompt, p.a, p.b, p.first_difference) for p in result.pairs)
    return TableSection(title=title, lead=lead or words, note=note, tables=(Table(columns=columns, rows=rows),))
