"""What a trace holds: what every token chose at every MoE layer, with labels and statistics.

Choices are kept in 1 byte each where E <= 255 (index E means none, so 255 still fits), else in 2; weights, where kept,
in fp16.

Legend: N tokens, K choices a token, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from moekit.errors import BadData
from moekit.trace.batch import TokenBatch
from moekit.trace.meta import TraceMeta
from moekit.trace.statistics import CHUNK_TOKENS, LayerStatistics, Statistics
from moekit.trace.tokens import TokenLabels
from moekit.trace.vocabulary import Statistic, resolve

__all__ = ["AnyTrace", "TraceData"]


class TraceData:
    """What routers chose on a text; `moekit.trace.Trace` adds files, merging and selecting.

    Args:
        meta: what it is of.
        labels: which document, domain and position each token is from; None without choices.
        indices: decoder layer -> [N, K] choices in their smallest type; empty without choices.
        weights: decoder layer -> [N, K] fp16; empty without.
        statistics: streaming statistics; None without.
    """

    def __init__(
        self,
        meta: TraceMeta,
        labels: TokenLabels | None = None,
        indices: Mapping[int, Tensor] | None = None,
        weights: Mapping[int, Tensor] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        self.meta = meta
        self._labels = labels
        self._indices = dict(indices or {})
        self._weights = dict(weights or {})
        self.statistics = statistics

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.meta.tokens} tokens, layers {self.meta.layers}, domains {self.meta.domains})"
        )

    @property
    def labels(self) -> TokenLabels:
        """Labels of all tokens.

        Raises:
            BadData: the trace kept statistics only.
        """
        if self._labels is None:
            raise BadData(
                "this trace holds statistics only, no choices token by token",
                hint="record it again without --no-choices (in Python keep_choices=True)",
            )
        return self._labels

    def raw_indices(self, layer: int) -> Tensor:
        """Choices of a layer as stored, [N, K] uint8 or int16; E means none.

        Raises:
            BadData: no such layer, or the trace kept statistics only.
        """
        self.meta.experts_of(layer)
        _ = self.labels
        return self._indices[layer]

    def indices(self, layer: int) -> Tensor:
        """Choices of a layer, [N, K] int64; E means none."""
        return self.raw_indices(layer).long()

    def weights(self, layer: int) -> Tensor | None:
        """Gate weights of a layer, [N, K] fp32; None where they were not kept."""
        self.meta.experts_of(layer)
        kept = self._weights.get(layer)
        return None if kept is None else kept.float()

    @property
    def sequence_N(self) -> Tensor:
        """Number of each token's sequence, int32."""
        return self.labels.sequence_N

    @property
    def document_N(self) -> Tensor:
        """Number of each token's document, int32."""
        return self.labels.document_N

    @property
    def domain_N(self) -> Tensor:
        """Number of each token's domain, int16."""
        return self.labels.domain_N

    @property
    def position_N(self) -> Tensor:
        """Each token's position in its sequence, int32."""
        return self.labels.position_N

    @property
    def phase_N(self) -> Tensor:
        """0 for given text, 1 for generated tokens; uint8."""
        return self.labels.phase_N

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before trusting the figures, such as experts never routed."""
        return self.meta.warnings

    @property
    def digest(self) -> str:
        """SHA-256 over what was recorded: names the trace in plans made from it."""
        digest = hashlib.sha256(self.meta.model_dump_json(exclude={"ancestors"}).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names on disk."""
        found = {f"layers.{layer}.indices": t for layer, t in self._indices.items()}
        found |= {f"layers.{layer}.weights": t for layer, t in self._weights.items()}
        if self._labels is not None:
            found |= self._labels.encode()
        for layer, named in (self.statistics or {}).items():
            found |= {f"statistics.{layer}.{name}": t for name, t in named.items()}
        return found

    def check_model(self, fingerprint: str) -> None:
        """Refuse another model.

        Raises:
            BadData: the trace was recorded on another model; nothing is said where either is unknown ("").
        """
        if fingerprint and self.meta.fingerprint and fingerprint != self.meta.fingerprint:
            raise BadData(
                f"this trace was recorded on {self.meta.model or 'a model'} with fingerprint "
                f"{self.meta.fingerprint[:12]}, not on {fingerprint[:12]}",
                hint="`moekit profile` records a trace of this model",
            )

    def check_descent(self, other: TraceData) -> None:
        """Refuse a trace of a model that has nothing to do with this one's.

        Args:
            other: a trace of the model that this one's was made from, or of the same model.

        Raises:
            BadData: naming both models; nothing is said where either is unknown ("").
        """
        mine, theirs = self.meta, other.meta
        if not (mine.fingerprint and theirs.fingerprint):
            return
        if theirs.fingerprint not in (mine.fingerprint, *mine.ancestors):
            raise BadData(
                f"this trace was recorded on {mine.model or 'a model'} ({mine.fingerprint[:12]}), which is not "
                f"made from {theirs.model or 'a model'} ({theirs.fingerprint[:12]}), the model of the other trace",
                hint="record both on one model, or the second on a model that moekit has made from the first",
            )

    def require(self, names: Iterable[str]) -> Statistics:
        """Statistics a method needs, computed from kept choices where they were not collected while recording.

        Args:
            names: names or groups of the vocabulary, such as a method's `needs`; "choices" and "weights" ask that
                those are kept.

        Raises:
            BadConfig: an unknown name.
            BadData: the trace neither has it nor can compute it.
        """
        names = [names] if isinstance(names, str) else list(names)
        if "choices" in names or "weights" in names:
            _ = self.labels
        if "weights" in names and not self.meta.has_weights:
            raise BadData(
                "the trace kept no gate weights", hint="record it again with --weights (in Python weights=True)"
            )
        entries = resolve(names)
        known = set(self.statistics.names) if self.statistics is not None else set()
        missing = [entry for entry in entries if entry.name not in known]
        for entry in missing:
            self._can_compute(entry)
        layers = {layer: self._with(layer, entries, missing) for layer in self.meta.layers}
        return Statistics(layers)

    def _can_compute(self, entry: Statistic) -> None:
        kept = {"choices"} if self.meta.has_choices else set()
        kept |= {"weights"} if self.meta.has_weights else set()
        if not set(entry.sources) | {"choices"} <= kept:
            raise BadData(
                f"the trace does not carry {entry.name!r}",
                hint=f"record it with statistics including {entry.name!r} (moekit profile --statistics {entry.name})",
            )

    def _with(self, layer: int, entries: Sequence[Statistic], missing: Sequence[Statistic]) -> LayerStatistics:
        experts = self.meta.experts_of(layer)
        computed = LayerStatistics.empty(missing, experts, self.meta.hidden, self.meta.domains)
        for start in range(0, self.meta.tokens if missing else 0, CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            weights = self._weights.get(layer)
            computed.update(
                TokenBatch(
                    experts,
                    self._indices[layer][rows].long(),
                    domains=len(self.meta.domains),
                    domain=self.labels.domain_N[rows],
                    position=self.labels.position_N[rows],
                    weights=None if weights is None else weights[rows],
                )
            )
        have = {} if self.statistics is None else self.statistics[layer]
        values = {e.name: computed[e.name] if e in missing else have[e.name] for e in entries}
        width = self.meta.width_of(layer)
        return LayerStatistics(experts, self.meta.hidden, self.meta.domains, self.meta.tokens, values, width=width)


AnyTrace = TypeVar("AnyTrace", bound=TraceData)
