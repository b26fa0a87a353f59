"""Measure a checkpoint without some of its experts, several sets of them side by side, each layer read once.

A token that chooses a skipped expert gets nothing from it: to the bit what zeroing its down projection gives, but no
weight is copied, so that memory is that of one layer however many sets there are, and shared experts can be skipped as
well (`moekit.diagnose.super_experts.ablation`).

Legend: B rows, S positions, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moekit._progress import Progress
from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.diagnose.super_experts.ablation import Pair, by_layer, skipped
from moekit.errors import BadConfig
from moekit.evaluation.changes import Variant
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.variants import SideBySideWalk
from moekit.evaluation.windows import Corpus, TokenizedLike, from_documents
from moekit.streaming.passes import Passes

UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Ablation:
    """Experts to skip.

    Attributes:
        name: what to call it.
        pairs: (decoder layer, expert), -1 for the shared experts of the layer.
    """

    name: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class AblationResult:
    """What became of the text.

    Attributes:
        perplexity: likelihood of each document.
        largest: decoder layer -> largest |value| of the residual stream after it, dense layers too.
    """

    perplexity: PerplexityResult
    largest: Mapping[int, float]


class _SkippingWalk(SideBySideWalk):
    """Walks a corpus through the unchanged model, and through it without some experts.

    Args:
        checkpoint: opened and verified.
        corpus: windows of the text.
        ablations: what to skip.
        folder: see `SideBySideWalk`, also for the next two.
        dtype: see there.
        device: see there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        corpus: Corpus,
        ablations: Sequence[Ablation],
        *,
        folder: Path | None,
        dtype: torch.dtype | None,
        device: str,
    ) -> None:
        empty = empty_model(checkpoint)
        self.gone = {a.name: {moe.index: experts for moe, experts in by_layer(empty, a.pairs)} for a in ablations}
        every = {moe.index: tuple(range(moe.geometry.experts)) for moe in find_moe_layers(empty)}
        # All experts stay; the layers named are those from which on a variant goes its own way.
        variants = [
            Variant(name, {layer: LayerOutcome(keep=every[layer]) for layer in layers})
            for name, layers in self.gone.items()
        ]
        super().__init__(checkpoint, corpus, variants, folder=folder, dtype=dtype, device=device)
        self.largest: dict[str, dict[int, float]] = {name: {} for name in (UNCHANGED, *self.gone)}

    def _layer(self, index: int) -> None:
        moe = self.walk.moe(index)
        self._part(index)
        self._go(index, UNCHANGED, self.plain)
        for track in self.tracks:
            name = track.variant.name
            if track.passes is None:
                self.largest[name][index] = self.largest[UNCHANGED][index]
                continue
            with contextlib.nullcontext() if moe is None else skipped(moe, self.gone[name].get(index, ())):
                self._go(index, name, track.passes)

    def _go(self, index: int, name: str, passes: Passes) -> None:
        """All batches through a layer, and the largest value that comes out of it at any token."""
        largest = 0.0
        for number, batch in enumerate(self.walk.batches):
            made_BSH = passes.run(index, number)
            passes.go_on(index, number)
            at_tokens = batch.attention_mask.bool().to(made_BSH.device)
            largest = max(largest, float(made_BSH[at_tokens].abs().max()))
        self.largest[name][index] = largest

    def measured(self) -> dict[str, AblationResult]:
        """What became of the text, unchanged and without each set of experts."""
        named = {UNCHANGED: self.plain}
        named |= {t.variant.name: t.passes or self.plain for t in self.tracks}
        return {
            name: AblationResult(self._perplexity(passes, name), self.largest[name]) for name, passes in named.items()
        }


def compare_without(
    checkpoint: Checkpoint,
    documents: Sequence[TokenizedLike],
    ablations: Sequence[Ablation],
    *,
    window: int = 512,
    folder: Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, AblationResult]:
    """Measure a checkpoint on held-out text as it is and without some experts, in the memory of a few layers.

    Args:
        checkpoint: opened and verified.
        documents: tokenized held-out documents.
        ablations: what to skip, by names of their own.
        window: longest piece in tokens; pieces overlap by half.
        folder: where states go; None for memory, then a temporary file.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
        progress: told layer by layer.

    Returns:
        Name -> what became of the text; the unchanged model's is `UNCHANGED`.

    Raises:
        BadData: no document has two tokens.
        BadConfig: no such layer or expert, or two ablations have one name.
        UnsupportedModel: quantized in a way that is not read here, or layers cannot be run one by one.
    """
    if len({ablation.name for ablation in ablations} | {UNCHANGED}) <= len(ablations):
        raise BadConfig("two ablations have one name", hint=f"give each its own, none of them {UNCHANGED!r}")
    corpus = from_documents(documents, window, None)
    walk = _SkippingWalk(checkpoint, corpus, ablations, folder=folder, dtype=dtype, device=device)
    try:
        walk.run(progress)
        return walk.measured()
    finally:
        walk.close()
