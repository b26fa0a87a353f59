"""What healing brought, on held-out text: parent, compressed model and healed model, paired by document."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from moekit.evaluation.closeness import Closeness, Closer, closer
from moekit.evaluation.comparison import Comparison, Evaluation, compare
from moekit.evaluation.pairs import PairedDifference

PARENT, STUDENT, HEALED = "parent", "compressed", "healed"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFigures(_Frozen):
    """One model on held-out text.

    Attributes:
        name: parent, compressed or healed.
        nll: nats a token.
        perplexity: exp of it.
        divergence: KL divergence from the parent, nats a token.
        agreement: share of tokens after which it finds the parent's likeliest next token likeliest.
    """

    name: str
    nll: float
    perplexity: float
    divergence: float
    agreement: float


class HealingProof(_Frozen):
    """What healing brought on held-out text.

    Attributes:
        source: the text.
        documents: documents with a scored token.
        tokens: scored tokens.
        window: longest context, in tokens.
        models: parent, compressed and healed.
        lost: the compressed model against the parent.
        gained: the healed model against the compressed one; below zero is better.
        left: the healed model against the parent.
        closer: divergence and agreement of the healed model against those of the compressed one.
        recovered: share of the parent's lead in likelihood that healing gave back; None where there was none to lose.
        control: the parent, trained on the same steps, against the parent as it was: what the text alone brings.
    """

    source: str
    documents: int
    tokens: int
    window: int
    models: tuple[ModelFigures, ...]
    lost: Comparison
    gained: Comparison
    left: Comparison
    closer: Closer
    recovered: float | None
    control: Comparison | None = None


def prove(
    source: str,
    window: int,
    parent: Closeness,
    student: Closeness,
    healed: Closeness,
    *,
    control: Closeness | None = None,
    seed: int = 0,
) -> HealingProof:
    """Compare what was measured of each model.

    Args:
        source: of the text.
        window: longest context, in tokens.
        parent: of the model that the student was made from.
        student: of the compressed model.
        healed: of what became of it.
        control: of the parent, trained on the same steps.
        seed: of intervals and tests.
    """
    named = {PARENT: parent, STUDENT: student, HEALED: healed}
    told = {name: Evaluation(name=name, perplexity=found.text) for name, found in named.items()}
    lost = compare(told[PARENT], told[STUDENT], seed)
    after = None if control is None else Evaluation(name="parent, trained", perplexity=control.text)
    return HealingProof(
        source=source,
        documents=parent.text.overall.documents,
        tokens=parent.text.overall.tokens,
        window=window,
        models=tuple(_figures(name, found) for name, found in named.items()),
        lost=lost,
        gained=compare(told[STUDENT], told[HEALED], seed),
        left=compare(told[PARENT], told[HEALED], seed),
        closer=closer(student, healed, seed),
        recovered=_recovered(parent, student, healed, None if lost.overall is None else lost.overall.difference),
        control=None if after is None else compare(told[PARENT], after, seed),
    )


def _figures(name: str, found: Closeness) -> ModelFigures:
    whole = found.text.overall
    return ModelFigures(
        name=name,
        nll=whole.nll,
        perplexity=whole.perplexity,
        divergence=found.mean_divergence,
        agreement=found.agreement,
    )


def _recovered(parent: Closeness, student: Closeness, healed: Closeness, lost: PairedDifference | None) -> float | None:
    """A share of a loss that may be none says nothing: its interval must lie above zero."""
    if lost is None or lost.low <= 0:
        return None
    before, after, whole = (found.text.overall.nll for found in (student, healed, parent))
    return (before - after) / (before - whole)
