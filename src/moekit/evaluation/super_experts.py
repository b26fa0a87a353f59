"""Does a model break without its super experts, and does it without as many others?

Perplexity on held-out text: unchanged, without the super experts, and without as many other experts drawn at random,
paired over documents.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moekit._files import read_bytes
from moekit.checkpoint.atomic import atomic_write
from moekit.diagnose.super_experts.ablation import Pair, random_control
from moekit.evaluation.comparison import Comparison, DomainComparison, Evaluation, compare
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.skipping import UNCHANGED, Ablation, AblationResult, compare_without

if TYPE_CHECKING:
    import torch

    from moekit._progress import Progress
    from moekit.anatomy.probe import Geometry
    from moekit.checkpoint.folder import Checkpoint
    from moekit.evaluation.windows import TokenizedLike

WITHOUT = "without super experts"
RANDOM = "without others"
# The whole 95 % interval of the ratio of perplexities must lie above this.
BREAKS = 1.5

Outcome = Literal["breaks", "suffers", "as others", "holds", "unknown"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Control(_Frozen):
    """As many other experts, drawn once.

    Attributes:
        seed: of the draw.
        pairs: (decoder layer, expert).
        text: without them against the unchanged model.
    """

    seed: int
    pairs: tuple[Pair, ...]
    text: Comparison


class SuperExpertCheck(_Frozen):
    """What skipping super experts costs on held-out text, against skipping as many others.

    Attributes:
        source: the text.
        window: longest context, in tokens.
        pairs: (decoder layer, expert) of the super experts, -1 for the shared ones.
        without: without them against the unchanged model; below, a ratio is perplexity over perplexity.
        controls: without as many others, a draw each.
        against: without them against without others, the others' likelihood of a document averaged over the draws.
        largest: name -> decoder layer -> largest |value| of the residual stream after it; of others the median draw.
        outcome: "breaks" where the interval of the ratio to the unchanged model lies above 1.5, "suffers" where above
            1, both only where the interval of the ratio to others lies above 1, too; "as others" where it does not;
            "holds" where no loss shows; "unknown" where one document gives no interval.
    """

    source: str
    window: int
    pairs: tuple[Pair, ...]
    without: Comparison
    controls: tuple[Control, ...] = Field(min_length=1)
    against: Comparison
    largest: dict[str, dict[int, float]]
    outcome: Outcome

    @property
    def documents(self) -> int:
        """Documents with a scored token."""
        return _text(self.without).a.documents

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return _text(self.without).a.tokens

    @property
    def verdict(self) -> str:
        """Whether the model breaks, in one or two sentences."""
        told, others = _text(self.without), _text(self.against)
        count = f"{len(self.pairs)} super expert{'s' if len(self.pairs) > 1 else ''}"
        figures = (
            f"perplexity {told.a.perplexity:.4g} becomes {told.b.perplexity:.4g}{_ratio(told)}; without as many others "
            f"it is {others.a.perplexity:.4g} ({_draws(len(self.controls))})"
        )
        heads = {
            "breaks": f"without its {count} the model breaks",
            "suffers": f"without its {count} the model suffers, but does not break",
            "as others": f"without its {count} the model loses no more than without others",
            "holds": f"without its {count} the model does not break: no loss shows",
            "unknown": f"one document gives no interval, so nothing can be said of the model without its {count}",
        }
        return f"{heads[self.outcome]}: {figures}".replace(": no loss shows:", ", no loss shows:")


def _text(comparison: Comparison) -> DomainComparison:
    assert comparison.overall is not None  # text is all that is measured here
    return comparison.overall


def _ratio(part: DomainComparison) -> str:
    gap = part.difference
    return "" if gap is None else f" (x {gap.ratio:.4g}, 95 % interval {gap.ratio_low:.4g} to {gap.ratio_high:.4g})"


def _draws(count: int) -> str:
    return "one draw" if count == 1 else f"mean of {count} draws"


def judge(without: Comparison, against: Comparison) -> Outcome:
    """What an ablation says.

    Args:
        without: without the super experts against the unchanged model.
        against: without the super experts against without as many others.
    """
    loss, more = _text(without).difference, _text(against).difference
    if loss is None or more is None or loss.ratio_low is None or more.ratio_low is None:
        return "unknown"
    if loss.ratio_low <= 1:
        return "holds"
    if more.ratio_low <= 1:
        return "as others"
    return "breaks" if loss.ratio_low > BREAKS else "suffers"


def check_super_experts(
    checkpoint: Checkpoint,
    documents: Sequence[TokenizedLike],
    pairs: Sequence[Pair],
    *,
    geometries: Mapping[int, Geometry],
    source: str = "",
    draws: int = 5,
    seed: int = 0,
    window: int = 512,
    folder: Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> SuperExpertCheck:
    """Skip super experts, and as many others, on held-out text; each layer is read from disk once.

    Args:
        checkpoint: opened and verified.
        documents: tokenized held-out documents.
        pairs: the super experts, at least one.
        geometries: decoder layer -> sizes of its MoE block.
        source: name of the text.
        draws: how often others are drawn.
        seed: of the first draw, and of intervals.
        window: longest context, in tokens.
        folder: where states go, and what was measured, so that it is not measured twice; None for neither.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
        progress: told layer by layer.

    Raises:
        BadConfig: there are not so many others, or no such experts.
        BadData: no document has two tokens.
        UnsupportedModel: quantized in a way that is not read here, or layers cannot be run one by one.
    """
    experts = {layer: geometry.experts for layer, geometry in geometries.items()}
    shared = [layer for layer, geometry in geometries.items() if geometry.shared_width]
    drawn = [random_control(experts, shared, pairs, seed=seed + number) for number in range(draws)]
    ablations = [Ablation(WITHOUT, tuple(pairs))]
    ablations += [Ablation(f"{RANDOM} {number}", tuple(others)) for number, others in enumerate(drawn)]
    key = [checkpoint.fingerprint, [list(d.ids) for d in documents], [d.domain for d in documents]]
    known = _Known(folder, [*key, [a.pairs for a in ablations], seed, window, str(dtype)])
    if (found := known.read()) is not None:
        return found
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"window": window, "folder": folder, "dtype": dtype, "device": device}
    measured = compare_without(checkpoint, documents, ablations, progress=progress, **options)
    check = _summed_up(measured, pairs, drawn, source=source, seed=seed, window=window)
    known.write(check)
    return check


def _summed_up(
    measured: Mapping[str, AblationResult],
    pairs: Sequence[Pair],
    drawn: Sequence[Sequence[Pair]],
    *,
    source: str,
    seed: int,
    window: int,
) -> SuperExpertCheck:
    named = {name: Evaluation(name=name, perplexity=told.perplexity) for name, told in measured.items()}
    names = [f"{RANDOM} {number}" for number in range(len(drawn))]
    of_others = _mean_of([measured[name].perplexity for name in names])
    without = compare(named[UNCHANGED], named[WITHOUT], seed)
    against = compare(Evaluation(name=RANDOM, perplexity=of_others), named[WITHOUT], seed)
    largest = {name: dict(measured[name].largest) for name in (UNCHANGED, WITHOUT)}
    largest[RANDOM] = {n: statistics.median(measured[name].largest[n] for name in names) for n in largest[UNCHANGED]}
    return SuperExpertCheck(
        source=source,
        window=window,
        pairs=tuple(pairs),
        without=without,
        controls=tuple(
            Control(seed=seed + number, pairs=tuple(others), text=compare(named[UNCHANGED], named[name], seed))
            for number, (name, others) in enumerate(zip(names, drawn, strict=True))
        ),
        against=against,
        largest=largest,
        outcome=judge(without, against),
    )


def _mean_of(results: Sequence[PerplexityResult]) -> PerplexityResult:
    """The likelihood of each document, averaged."""
    nll = tuple(statistics.fmean(each) for each in zip(*(result.nll for result in results), strict=True))
    return results[0].model_copy(update={"nll": nll, "model": RANDOM})


class _Known:
    """What an interrupted run of the same work had measured already."""

    def __init__(self, folder: Path | None, key: Any) -> None:
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self.file = None if folder is None else folder / f"check-{digest[:24]}.json"

    def read(self) -> SuperExpertCheck | None:
        if self.file is None or not self.file.is_file():
            return None
        try:
            return SuperExpertCheck.model_validate_json(read_bytes(self.file))
        except ValidationError:
            self.file.unlink()
            return None

    def write(self, check: SuperExpertCheck) -> None:
        if self.file is not None:
            atomic_write(self.file, check.model_dump_json())
