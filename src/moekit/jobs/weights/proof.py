"""What a pruned model costs, told before it is written: held-out text, layer by layer, against baselines.

Legend: E experts.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from moekit._files import read_bytes
from moekit._progress import Progress
from moekit.checkpoint import Checkpoint, atomic_write
from moekit.data import TokenizedDocument
from moekit.evaluation.changes import Variant
from moekit.evaluation.comparison import Comparison, Evaluation, compare
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.variants import VariantResult, compare_variants

UNCHANGED = "unchanged"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VariantCost(_Frozen):
    """What one way to prune costs.

    Attributes:
        name: of the method.
        experts: decoder layer -> experts that stay.
        text: likelihood of held-out text against the unchanged model, paired by document.
        reconstruction: decoder layer -> ||Z' - Z|| / ||Z|| of the block's outputs on the unchanged model's inputs.
        lost_tokens: decoder layer -> share of tokens that had chosen an expert which is gone.
        lost_choices: decoder layer -> share of choices of such experts.
    """

    name: str
    experts: dict[int, int]
    text: Comparison
    reconstruction: dict[int, float]
    lost_tokens: dict[int, float]
    lost_choices: dict[int, float]


class Spread(_Frozen):
    """Perplexity of several random choices of the same budget.

    Attributes:
        seeds: how many.
        mean: mean perplexity.
        deviation: sample standard deviation.
        least: smallest.
        most: largest.
    """

    seeds: int
    mean: float
    deviation: float
    least: float
    most: float


class Proof(_Frozen):
    """What pruning costs on held-out text.

    Attributes:
        source: the text.
        documents: documents with a scored token.
        tokens: scored tokens.
        window: longest context, in tokens.
        method: what was asked for.
        baselines: others of the same budget.
        against: the method against each baseline, paired by document; below zero is better.
        random: spread of random choices; None with fewer than two seeds.
    """

    source: str
    documents: int
    tokens: int
    window: int
    method: VariantCost
    baselines: tuple[VariantCost, ...]
    against: tuple[Comparison, ...]
    random: Spread | None = None

    def short(self) -> dict[str, Any]:
        """The few figures that a record keeps."""
        return {
            "text": self.source,
            "documents": self.documents,
            "tokens": self.tokens,
            "perplexity": {c.name: _perplexities(c.text) for c in (self.method, *self.baselines)},
            "reconstruction": {c.name: _mean(c.reconstruction) for c in (self.method, *self.baselines)},
            "lost_choices": {c.name: _mean(c.lost_choices) for c in (self.method, *self.baselines)},
        }


def _mean(values: Mapping[int, float]) -> float:
    return statistics.fmean(values.values()) if values else 0.0


def _perplexities(text: Comparison) -> dict[str, Any]:
    """Domain -> perplexity before and after, and their ratio with its interval."""
    told = {}
    for part in filter(None, (text.overall, *text.domains)):
        gap = part.difference
        ratio = None if gap is None else [gap.ratio, gap.ratio_low, gap.ratio_high]
        told[part.domain] = {"before": part.a.perplexity, "after": part.b.perplexity, "ratio": ratio}
    return told


@dataclass(frozen=True)
class HeldOut:
    """Text that nothing was decided on.

    Attributes:
        source: where it came from.
        documents: tokenized, at least one of two tokens.
        window: longest context, in tokens.
    """

    source: str
    documents: Sequence[TokenizedDocument]
    window: int

    @property
    def digest(self) -> str:
        """sha256 of what is measured on."""
        told = [self.window, [[document.domain, list(document.ids)] for document in self.documents]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def prove(
    checkpoint: Checkpoint,
    heldout: HeldOut,
    method: Variant,
    baselines: Sequence[Variant],
    *,
    key: str,
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Proof:
    """Measure a way to prune and its baselines side by side, each layer read from disk once.

    Args:
        checkpoint: what is to be pruned.
        heldout: text to measure on.
        method: what was asked for.
        baselines: what it is compared with; those called "random..." are random choices.
        key: what tells this method and these baselines from others.
        folder: where states go, and the finished proof, so that an interrupted run does not measure twice.
        seed: of intervals and tests.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
        progress: told layer by layer.

    Raises:
        BadData: no document has two tokens.
    """
    known = folder / f"proof-{key[:16]}-{heldout.digest[:16]}.json"
    if known.is_file():
        try:
            return Proof.model_validate_json(read_bytes(known))
        except ValidationError:
            known.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    plain, results = compare_variants(
        checkpoint,
        heldout.documents,
        [method, *baselines],
        window=heldout.window,
        folder=folder,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    proof = proof_of(heldout, plain, results, seed)
    atomic_write(known, proof.model_dump_json())
    return proof


def proof_of(heldout: HeldOut, plain: PerplexityResult, results: Sequence[VariantResult], seed: int) -> Proof:
    """What was measured, put side by side.

    Args:
        heldout: the text.
        plain: of the unchanged model.
        results: of the method, then of what it is compared with.
        seed: of intervals and tests.
    """
    unchanged = Evaluation(name=UNCHANGED, perplexity=plain)
    measured = [Evaluation(name=result.name, perplexity=result.perplexity) for result in results]
    costs = [_cost(r, compare(unchanged, e, seed)) for r, e in zip(results, measured, strict=True)]
    return Proof(
        source=heldout.source,
        documents=plain.overall.documents,
        tokens=plain.overall.tokens,
        window=heldout.window,
        method=costs[0],
        baselines=tuple(costs[1:]),
        against=tuple(compare(other, measured[0], seed) for other in measured[1:]),
        random=_spread([r for r in results[1:] if r.name.startswith("random")]),
    )


def _cost(result: VariantResult, text: Comparison) -> VariantCost:
    return VariantCost(
        name=result.name,
        experts=result.experts,
        text=text,
        reconstruction=result.reconstruction,
        lost_tokens=result.lost_tokens,
        lost_choices=result.lost_choices,
    )


def _spread(results: Sequence[VariantResult]) -> Spread | None:
    found = [result.perplexity.overall.perplexity for result in results]
    if len(found) < 2:
        return None
    return Spread(
        seeds=len(found),
        mean=statistics.fmean(found),
        deviation=statistics.stdev(found),
        least=min(found),
        most=max(found),
    )
