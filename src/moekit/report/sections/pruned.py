"""Models that the run made smaller: by which method, how many experts and bytes are left, and what the proof says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.evaluation import Comparison
from moekit.report.data import TableSection
from moekit.report.parts import Cell, Column, Table
from moekit.report.results import StepResult
from moekit.report.sections.evaluations import relative


def pruned_section(finished: Sequence[StepResult]) -> TableSection | None:
    """A row for each model that lost experts; None without any.

    Args:
        finished: steps of the run.
    """
    made = [done for done in finished if _is_pruned(done.results)]
    if not made:
        return None
    columns = (
        Column(name="model"),
        Column(name="method"),
        Column(name="experts"),
        Column(name="of"),
        Column(name="weights", unit="B"),
        Column(name="of", unit="B"),
        Column(name="perplexity", digits=2, note="on text that nothing was decided on"),
        Column(name="unchanged", digits=2),
        Column(name="rise", unit="%", digits=1, signed=True, better="low", note="paired over documents, 95 %"),
        Column(name="random", digits=2, note="mean perplexity of random choices of as many experts"),
    )
    return TableSection(
        title="Models with fewer experts",
        lead="What was dropped, what is left to load, and what it costs on held-out text. A row without a perplexity "
        "was written without a proof.",
        tables=(Table(columns=columns, rows=tuple(_row(done) for done in made)),),
    )


def _is_pruned(results: Mapping[str, Any]) -> bool:
    parts = (results.get("experts"), results.get("bytes"))
    return "method" in results and all(isinstance(part, Mapping) and {"before", "after"} <= set(part) for part in parts)


def _row(done: StepResult) -> tuple[Cell, ...]:
    told = done.results
    settings = ", ".join(f"{key}={value}" for key, value in (told.get("settings") or {}).items())
    method = f"{told['method']} ({settings})" if settings else str(told["method"])
    sizes = tuple(told[kind][when] for kind in ("experts", "bytes") for when in ("after", "before"))
    return (done.id, method, *sizes, *_proof(told.get("proof")))


def _proof(proof: Mapping[str, Any] | None) -> tuple[Cell, Cell, Cell, Cell]:
    if not proof:
        return None, None, None, None
    overall = Comparison.model_validate(proof["method"]["text"]).overall
    random = (proof.get("random") or {}).get("mean")
    if overall is None:
        return None, None, None, random
    return overall.b.perplexity, overall.a.perplexity, relative(overall.difference), random
