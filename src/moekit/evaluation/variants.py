"""Measure several changes of one checkpoint side by side, each layer read from disk once.

All variants walk the same held-out text: a decoder layer is loaded, run as it is and with each variant's experts, and
leaves memory. So a model larger than memory is compared with its pruned versions before any of them is written.

Legend: B rows, S positions, T positions of a batch, M scored positions of a window, H hidden, K choices, E experts, V
vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moekit._progress import Progress, track
from moekit.anatomy.swap import replaced
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.dense_cuts import masked
from moekit.compress.engine.resize import read_block
from moekit.data.forcing import decoder_inputs
from moekit.errors import BadConfig
from moekit.evaluation.changes import ChangedLayer, Variant, as_written, changed_layer, compare_layer, watched
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.likelihood import Scorer, Scores, mean_divergence, pad
from moekit.evaluation.windows import Corpus, TokenizedLike, Window, by_length, from_documents
from moekit.streaming.loader import LayerLoader
from moekit.streaming.passes import Passes
from moekit.streaming.states import MEMORY_BYTES
from moekit.streaming.walk import Inputs, Walk


class VariantResult(BaseModel):
    """What a variant costs.

    Attributes:
        name: of the variant.
        perplexity: likelihood of each held-out document.
        reconstruction: decoder layer -> ||Z' - Z|| / ||Z||, the block's output against the unchanged one on the
            unchanged model's inputs.
        lost_tokens: decoder layer -> share of tokens that had chosen an expert which is gone.
        lost_choices: decoder layer -> share of choices of such experts.
        experts: decoder layer -> experts that stay.
        divergences: KL(unchanged || variant) summed over each document's scored positions, nats; None where it was not
            asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    perplexity: PerplexityResult
    reconstruction: dict[int, float]
    lost_tokens: dict[int, float]
    lost_choices: dict[int, float]
    experts: dict[int, int]
    divergences: tuple[float, ...] | None = None

    @property
    def divergence(self) -> float | None:
        """Mean over scored positions of KL(unchanged || variant), nats; None where it was not asked for."""
        return None if self.divergences is None else sum(self.divergences) / sum(self.perplexity.tokens)

    def only(self, chosen: Sequence[int]) -> VariantResult:
        """The same on some of the documents, by number; figures of layers are those of all."""
        far = None if self.divergences is None else tuple(self.divergences[i] for i in chosen)
        return self.model_copy(update={"perplexity": self.perplexity.only(chosen), "divergences": far})


@dataclass(eq=False)
class _Track:
    """One variant on its way."""

    variant: Variant
    passes: Passes | None = None  # the unchanged model's as long as nothing is changed
    layers: dict[int, ChangedLayer] = field(default_factory=dict)
    reconstruction: dict[int, float] = field(default_factory=dict)
    lost_tokens: dict[int, float] = field(default_factory=dict)
    lost_choices: dict[int, float] = field(default_factory=dict)


class SideBySideWalk:
    """Walks a corpus through the unchanged model and its variants.

    Args:
        checkpoint: opened and verified.
        corpus: windows of the held-out text.
        variants: what to compare.
        batch_tokens: rows times longest row of a batch.
        folder: where states go; None for memory up to `limit`, then a temporary file.
        limit: bytes of states kept in memory.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        corpus: Corpus,
        variants: Sequence[Variant],
        *,
        batch_tokens: int = 4096,
        folder: Path | None = None,
        limit: int = MEMORY_BYTES,
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> None:
        if len({variant.name for variant in variants}) < len(variants):
            raise BadConfig("two variants have one name", hint="give each its own")
        self.corpus = corpus
        self.groups = list(by_length(corpus.windows, batch_tokens))
        self.loader = LayerLoader(checkpoint, dtype=dtype, device=device)
        inputs = [Inputs(*pad(group, torch.device("cpu"))) for group in self.groups]
        share = limit // (len(variants) + 1)
        self.walk = Walk(self.loader, inputs, folder=folder, limit=share)
        self.plain = self.walk.passes("plain")
        self.tracks = [_Track(variant) for variant in variants]

    @torch.no_grad()
    def run(self, progress: Progress | None = None) -> None:
        """Walk all layers."""
        self.loader.load_rest()
        self.plain.begin()
        for index in track(range(self.loader.layers), "comparing", progress):
            with self.loader.loaded(index):
                self._layer(index)

    def _layer(self, index: int) -> None:
        moe = self.walk.moe(index)
        changed = [t for t in self.tracks if moe is not None and index in t.variant.outcomes]
        if moe is not None and changed:
            weights = read_block(moe, self.loader.model.config)
            for track_ in changed:
                variant = as_written(track_.variant, self.loader.stored)
                track_.layers[index] = changed_layer(variant, moe, weights, self.loader.model.config)
        self._part(index)
        norm = 0.0
        tokens = choices = 0
        for number, batch in enumerate(self.walk.batches):
            mask_T = batch.attention_mask.bool().flatten()
            with watched(moe, self.loader.device) as seen:
                self.plain.run(index, number)
            self._part(index, also=not self.plain.only_answers)
            self.plain.go_on(index, number)
            if moe is not None and changed:
                output_TH = seen.output_TH[mask_T]
                norm += float(output_TH.double().square().sum())
                index_TK = seen.index_TK[mask_T]
                tokens, choices = tokens + len(index_TK), choices + index_TK.numel()
                for track_ in changed:
                    compare_layer(track_.layers[index], seen, output_TH, index_TK, mask_T)
        for track_ in changed:
            layer = track_.layers[index]
            track_.reconstruction[index] = (layer.difference / norm) ** 0.5 if norm else 0.0
            track_.lost_tokens[index] = layer.lost_tokens / max(tokens, 1)
            track_.lost_choices[index] = layer.lost_choices / max(choices, 1)
        for track_ in self.tracks:
            block = track_.layers.pop(index).block if track_ in changed else None
            inside = "" if moe is None else f"{moe.name}."
            cuts = {n: c for n, c in track_.variant.cuts_at(index).items() if not (inside and n.startswith(inside))}
            place = replaced(self.loader.model, moe.name, block) if moe is not None else contextlib.nullcontext()
            with place, masked(self.loader.model, cuts):
                for number in range(len(self.walk.batches) if track_.passes is not None else 0):
                    assert track_.passes is not None
                    track_.passes.run(index, number)
                    track_.passes.go_on(index, number)

    def _part(self, index: int, *, also: bool = False) -> None:
        """Variants go the unchanged model's way up to the first layer that they change.

        Args:
            index: the layer before which all passes stand.
            also: also those that do not change this one: it hands on what no later pass could be given.
        """
        # Where a decoder begins, it has yet to be given what the encoder made of the text: no later pass could be.
        parting = self.loader.begins[1:]
        for number, track_ in enumerate(self.tracks):
            if track_.passes is None and (also or index in parting or self._changes(track_.variant, index)):
                track_.passes = self.plain.parted(f"variant-{number}")

    @staticmethod
    def _changes(variant: Variant, index: int) -> bool:
        return index in variant.outcomes or bool(variant.cuts_at(index))

    def results(self, *, divergence: bool = False) -> tuple[PerplexityResult, list[VariantResult]]:
        """Likelihoods of the unchanged model and of each variant, with what each layer lost.

        Args:
            divergence: also how far each variant's predictions are from the unchanged model's.
        """
        far = self._divergences() if divergence else [None] * len(self.tracks)
        plain = self._perplexity(self.plain, "unchanged")
        found = [
            VariantResult(
                name=t.variant.name,
                perplexity=self._perplexity(t.passes or self.plain, t.variant.name),
                reconstruction=t.reconstruction,
                lost_tokens=t.lost_tokens,
                lost_choices=t.lost_choices,
                experts={layer: len(d.keep) for layer, d in t.variant.outcomes.items()},
                divergences=apart,
            )
            for t, apart in zip(self.tracks, far, strict=True)
        ]
        return plain, found

    def _divergences(self) -> list[tuple[float, ...]]:
        passes = [self.plain, *(t.passes or self.plain for t in self.tracks)]
        totals = [[0.0] * len(self.corpus.domains) for _ in self.tracks]
        for number, group in enumerate(self.groups):
            for row, window in enumerate(group):
                made = (self._logits(window, p, number, row) for p in passes)
                plain_MV = next(made).float().log_softmax(-1)
                for total, logits_MV in zip(totals, made, strict=True):
                    total[window.document] += mean_divergence(plain_MV, logits_MV) * len(plain_MV)
        return [tuple(total) for total in totals]

    @torch.inference_mode()
    def _logits(self, window: Window, passes: Passes, number: int, row: int) -> Tensor:
        """Logits at a window's scored positions, [M, V]; only final norm and head run."""
        ids_BS, mask_BS = pad([window], self.loader.device)
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "use_cache": False}
        inputs |= decoder_inputs(self.loader.model, ids_BS, mask_BS)
        with self.walk.finished_with(lambda: passes.rows([(number, row)], len(window.inputs))):
            logits_SV: Tensor = self.loader.model(**inputs).logits[0]
        return logits_SV[torch.tensor(list(window.positions), device=logits_SV.device)]

    def _perplexity(self, passes: Passes, name: str) -> PerplexityResult:
        scorer = _StreamedScorer(self.walk, self.groups, passes)
        tokens, nll = [0] * len(self.corpus.domains), [0.0] * len(self.corpus.domains)
        for group in self.groups:
            for window, scores in zip(group, scorer(group), strict=True):
                tokens[window.document] += len(window.targets)
                nll[window.document] += float(scores.nll_M.sum())
        corpus = self.corpus
        return PerplexityResult(
            domains=corpus.domains, tokens=tuple(tokens), nll=tuple(nll), model=name, digests=corpus.digests
        )

    def close(self) -> None:
        """Give files back."""
        self.plain.close()
        for track_ in self.tracks:
            if track_.passes is not None:
                track_.passes.close()
        self.loader.close()


class _StreamedScorer(Scorer):
    """Scores windows whose last hidden states are known already: only final norm and head run."""

    def __init__(self, walk: Walk, groups: Sequence[Sequence[Window]], passes: Passes) -> None:
        super().__init__(walk.loader.model)
        self._walk = walk
        self._passes = passes
        self._place = {id(window): (g, row) for g, group in enumerate(groups) for row, window in enumerate(group)}

    def _score(self, windows: Sequence[Window]) -> list[Scores]:
        longest = max(len(window.inputs) for window in windows)
        places = [self._place[id(window)] for window in windows]
        with self._walk.finished_with(lambda: self._passes.rows(places, longest)):
            return super()._score(windows)


def compare_variants(
    checkpoint: Checkpoint,
    documents: Sequence[TokenizedLike],
    variants: Sequence[Variant],
    *,
    window: int = 512,
    stride: int | None = None,
    batch_tokens: int = 4096,
    folder: Path | None = None,
    limit: int = MEMORY_BYTES,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    divergence: bool = False,
    progress: Progress | None = None,
) -> tuple[PerplexityResult, list[VariantResult]]:
    """Compare changes of a checkpoint on held-out text, in the memory of a few layers.

    Args:
        checkpoint: opened and verified.
        documents: tokenized held-out documents.
        variants: what to compare.
        window: longest piece in tokens.
        stride: tokens between windows; half a window by default.
        batch_tokens: rows times longest row of a batch.
        folder: where states go; None for memory up to `limit`, then a temporary file.
        limit: bytes of states kept in memory.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
        divergence: also how far each variant's predictions are from the unchanged model's: one more run of the head.
        progress: told layer by layer.

    Returns:
        The unchanged model's likelihoods, and each variant's results in the order given.

    Raises:
        BadData: no document has two tokens.
        BadConfig: a variant is impossible for this model, or two have one name.
    """
    walk = SideBySideWalk(
        checkpoint,
        from_documents(documents, window, stride),
        variants,
        batch_tokens=batch_tokens,
        folder=folder,
        limit=limit,
        dtype=dtype,
        device=device,
    )
    try:
        walk.run(progress)
        return walk.results(divergence=divergence)
    finally:
        walk.close()
