"""Adds up what hooks saw: choices wait on the device until a few thousand tokens are worth counting.

Legend: N tokens, K choices a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.anatomy.probe import Geometry, MoELayer
from moekit.errors import BadData, NumericFault, UnsupportedModel
from moekit.trace.batch import TokenBatch
from moekit.trace.layer_hook import LayerBuffer, LayerHook
from moekit.trace.meta import DataEntry, index_dtype
from moekit.trace.sources.base import ForwardPass, Place
from moekit.trace.statistics import LayerStatistics
from moekit.trace.tokens import TokenLabels
from moekit.trace.vocabulary import Statistic

# Added up once so many tokens, or passes, are waiting.
FLUSH_TOKENS = 4096
FLUSH_PASSES = 512


class LayerAccumulator:
    """The account of one layer.

    Args:
        layer: the layer.
        statistics: what to add up.
        keep_choices: keep each token's choices.
        keep_weights: keep their gate weights too.
    """

    def __init__(
        self, layer: MoELayer | Place, statistics: Sequence[Statistic], *, keep_choices: bool, keep_weights: bool
    ) -> None:
        self.layer = layer
        self.top_k = layer.geometry.top_k
        self.indices: list[Tensor] = []
        self.weights: list[Tensor] = []
        self._late = [s for s in statistics if s.from_choices]
        self._statistics = list(statistics)
        self._stats: LayerStatistics | None = None
        self._keep_choices = keep_choices
        self._keep_weights = keep_weights
        self._weigh = keep_weights or any("weights" in s.sources for s in self._late)
        self._waiting: list[LayerBuffer] = []

    def add(self, buffer: LayerBuffer, domains: Sequence[str]) -> None:
        """Take in one pass that ended well.

        Raises:
            UnsupportedModel: another number of choices than in the passes before.
        """
        top_k = buffer.indices.shape[1]
        if self._waiting or self.indices:
            if top_k != self.top_k:
                raise UnsupportedModel(
                    f"{top_k} choices a token, {self.top_k} in the passes before",
                    layer=self.layer.index,
                    hint="fill up with the index E (no expert) and weight 0",
                )
        else:
            self.top_k = top_k
        if not len(buffer.indices):
            return
        stats = self._open(buffer.indices.device, domains)
        for measured in buffer.measured:
            stats.add(measured)
        buffer.measured.clear()
        self._waiting.append(buffer)

    def _open(self, device: torch.device, domains: Sequence[str]) -> LayerStatistics:
        geometry = self.layer.geometry
        if self._stats is None:
            self._stats = LayerStatistics.empty(
                self._statistics,
                geometry.experts,
                geometry.hidden,
                domains,
                width=geometry.width,
                device=str(device),
            )
        self._stats = self._stats.with_domains(tuple(domains))
        return self._stats

    def flush(self, labels: TokenLabels, domains: Sequence[str]) -> None:
        """Count what waits.

        Args:
            labels: of the tokens waiting, on the CPU.
            domains: names of the domains known so far.

        Raises:
            NumericFault: NaN or infinity among the gate weights or router logits.
            BadData: an index that is no expert.
        """
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        self._check(waiting)
        indices_NK = torch.cat([s.indices for s in waiting])
        weights_NK = torch.cat([s.weights for s in waiting]) if self._weigh else None
        stats = self._open(indices_NK.device, domains)
        if self._late:
            seen = TokenBatch(
                self.layer.geometry.experts,
                indices_NK.long(),
                domains=len(domains),
                domain=labels.domain_N,
                position=labels.position_N,
                weights=weights_NK,
            )
            stats.add(stats.measure(seen, self._late))
        stats.tokens += len(indices_NK)
        if self._keep_choices:
            self.indices.append(indices_NK.cpu())
        if self._keep_weights and weights_NK is not None:
            self.weights.append(self._half(weights_NK))

    def _half(self, weights_NK: Tensor) -> Tensor:
        half_NK = weights_NK.half().cpu()
        if not bool(half_NK.isfinite().all()):
            raise NumericFault(
                f"a gate weight of {float(weights_NK.abs().max()):.3g} does not fit 16 bits",
                layer=self.layer.index,
                hint="record without weights; statistics of them are kept in full precision",
            )
        return half_NK

    def _check(self, waiting: Sequence[LayerBuffer]) -> None:
        checks = [check for s in waiting for check in s.checks]
        if checks and not bool(torch.stack(checks).isfinite().all()):
            raise NumericFault(
                "NaN or infinity among the router's logits or weights",
                layer=self.layer.index,
                hint="weights of this or an earlier layer are damaged (see `moekit check`), or precision is too low",
            )
        found = [s.extremes for s in waiting if s.extremes is not None]
        if not found:  # a dense layer
            return
        extremes = torch.stack(found)
        least, most = int(extremes[:, 0].min()), int(extremes[:, 1].max())
        experts = self.layer.geometry.experts
        if least < 0 or most > experts:
            raise BadData(
                f"the router chose expert {least if least < 0 else most} of {experts}",
                layer=self.layer.index,
                hint=f"indices are 0..{experts - 1}, and {experts} for no expert",
            )

    def choices(self) -> tuple[Tensor, Tensor | None]:
        """Kept choices [N, K], and weights [N, K] where kept."""
        dtype = index_dtype(self.layer.geometry.experts)
        empty = torch.zeros(0, self.top_k, dtype=dtype)
        self.indices = [torch.cat([empty, *self.indices])]
        if self._keep_weights:
            self.weights = [torch.cat([empty.half(), *self.weights])]
        return self.indices[0], self.weights[0] if self._keep_weights else None

    def record(self, domains: Sequence[str]) -> LayerRecord:
        """What was recorded so far, in main memory."""
        indices, weights = self.choices() if self._keep_choices else (None, None)
        statistics = self._open(torch.device("cpu"), domains).to_cpu()
        return LayerRecord(self.layer.geometry, self.top_k, statistics, indices, weights)


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """What was recorded of one layer.

    Attributes:
        geometry: of the layer.
        top_k: K as seen.
        statistics: of the layer.
        indices: [N, K], where choices are kept.
        weights: [N, K] fp16, where weights are kept.
    """

    geometry: Geometry
    top_k: int
    statistics: LayerStatistics
    indices: Tensor | None = None
    weights: Tensor | None = None


class LayerRecording:
    """One layer while it is seen."""

    def __init__(self, place: Place, hook: LayerHook, accumulator: LayerAccumulator) -> None:
        self.place = place
        self.hook = hook
        self.accumulator = accumulator

    def take(self, current: ForwardPass, domains: Sequence[str]) -> None:
        """Enter what the last pass showed."""
        buffer = self.hook.buffer
        self.hook.begin(None)
        if buffer is None:
            raise UnsupportedModel("the experts did not show what they were given", layer=self.place.index)
        self.accumulator.add(buffer, domains)
        self.accumulator.flush(current.labels, domains)


class LabelAccumulator:
    """The account of tokens: how many, of which documents and domains.

    Args:
        keep: keep each token's labels.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._waiting: list[TokenLabels] = []
        self._kept: list[TokenLabels] = []
        self._documents: dict[int, set[int]] = {}
        self._tokens: dict[int, int] = {}

    @property
    def tokens(self) -> int:
        """Tokens taken in."""
        return sum(self._tokens.values()) + sum(map(len, self._waiting))

    @property
    def is_due(self) -> bool:
        """Whether enough waits to be worth counting."""
        return len(self._waiting) >= FLUSH_PASSES or sum(map(len, self._waiting)) >= FLUSH_TOKENS

    def add(self, labels: TokenLabels) -> None:
        """Take in one pass."""
        if len(labels):
            self._waiting.append(labels)

    def flush(self) -> TokenLabels:
        """Count what waits; returns its labels."""
        labels = TokenLabels.concatenate(self._waiting)
        self._waiting.clear()
        pairs = torch.stack([labels.domain_N.int(), labels.document_N])
        for (domain, document), count in zip(*_count(pairs), strict=True):
            self._documents.setdefault(domain, set()).add(document)
            self._tokens[domain] = self._tokens.get(domain, 0) + count
        if self._keep and len(labels):
            self._kept.append(labels)
        return labels

    def data(self, source: str, domains: Sequence[str]) -> list[DataEntry]:
        """Documents and tokens by domain."""
        return [
            DataEntry(source=source, domain=name, documents=len(self._documents[d]), tokens=self._tokens[d])
            for d, name in enumerate(domains)
            if d in self._tokens
        ]

    def sorted(self) -> tuple[TokenLabels, Tensor | None]:
        """Labels with each sequence's tokens together (generation interleaves rows), and the order that did it."""
        labels = TokenLabels.concatenate(self._kept)
        self._kept = [labels]
        if bool((labels.sequence_N[1:] >= labels.sequence_N[:-1]).all()):
            return labels, None
        order = labels.sequence_N.argsort(stable=True)
        return labels[order], order


def _count(pairs: Tensor) -> tuple[list[list[int]], list[int]]:
    columns, counts = torch.unique(pairs, dim=1, return_counts=True)
    return columns.T.tolist(), counts.tolist()
