"""What a method may look at when it decides about one layer.

Legend: E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault
from moekit.trace.expert_inputs import Moments
from moekit.trace.statistics import LayerStatistics

Protected = Mapping[int, Collection[int]]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """One layer as a method sees it.

    Attributes:
        layer: decoder layer index.
        geometry: its sizes.
        statistics: those that the method needs, by name.
        read_weights: reads the layer's weights from the checkpoint; called at most once.
        seed: of everything random.
        protected: experts that must stay as they are, whatever their score.
        read_moments: second moments of one expert's inputs, made when they are asked for; only where the layer stands
            in a pass of the text, for methods that declare `reads_moments`.
        read_gated: the same of what one expert's down projection is given, each token weighted by its gate squared.
        read_inner: what one expert's down projection is given on every token of the text, chosen or not, some tokens
            [N, I] at a time, the same ones in the same order for each expert; likewise, for `reads_inner`.
    """

    layer: int
    geometry: Geometry
    statistics: LayerStatistics
    read_weights: Callable[[], LayerWeights] | None = None
    seed: int = 0
    protected: frozenset[int] = field(default_factory=frozenset)
    read_moments: Callable[[int], Moments] | None = None
    read_gated: Callable[[int], Tensor] | None = None
    read_inner: Callable[[int], Iterator[Tensor]] | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.geometry.experts

    @cached_property
    def weights(self) -> LayerWeights:
        """The layer's weights; only for methods that declare `reads_weights`."""
        if self.read_weights is None:
            raise LookupError("the method reads weights: declare `reads_weights = True`")
        return self.read_weights()

    def moments(self, expert: int) -> Moments:
        """Second moments of one expert's inputs; only for methods that declare `reads_moments`."""
        if self.read_moments is None:
            raise LookupError("second moments are there only while the text stands at the layer")
        return self.read_moments(expert)

    def gated_moment(self, expert: int) -> Tensor:
        """Sum of g^2 h h^T over the inputs of one expert's down projection; only for methods that read moments."""
        if self.read_gated is None:
            raise LookupError("second moments are there only while the text stands at the layer")
        return self.read_gated(expert)

    def inner(self, expert: int) -> Iterator[Tensor]:
        """What one expert's down projection is given on every token; only for methods that declare `reads_inner`."""
        if self.read_inner is None:
            raise LookupError("activations are there only while the text stands at the layer")
        return self.read_inner(expert)

    def finite(self, name: str) -> Tensor:
        """A statistic whose first axis counts experts.

        Raises:
            NumericFault: it holds NaN or infinity; names the layer and the expert of which most do.
        """
        value = self.statistics[name]
        bad_E = (~value.isfinite()).flatten(1).sum(1) if value.dim() > 1 else (~value.isfinite()).long()
        if bool(bad_E.any()):
            raise NumericFault(
                f"what was measured on the text ({name}) is NaN or infinite",
                layer=self.layer,
                expert=int(bad_E.argmax()),
                hint="look at the weights: `moekit check`",
            )
        return value

    def generator(self, purpose: str = "") -> torch.Generator:
        """A random generator of this layer, seed and purpose: the same whatever ran before."""
        key = f"{self.seed}|{self.layer}|{purpose}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        return torch.Generator().manual_seed(number)


class InputsByLayer(Mapping[int, LayerInputs]):
    """What a method sees of every layer, made anew each time it is asked: no layer's weights stay in memory.

    Args:
        geometries: decoder layer -> sizes.
        statistics: decoder layer -> what the method needs.
        read_weights: reads one layer's weights; None for methods that do not look at them.
        seed: of everything random.
        protected: decoder layer -> experts that stay whatever their score.
    """

    def __init__(
        self,
        geometries: Mapping[int, Geometry],
        statistics: Mapping[int, LayerStatistics],
        read_weights: Callable[[int], LayerWeights] | None,
        seed: int = 0,
        protected: Protected | None = None,
    ) -> None:
        self._geometries = geometries
        self._statistics = statistics
        self._read = read_weights
        self._seed = seed
        self._protected = protected or {}

    def __getitem__(self, layer: int) -> LayerInputs:
        read = self._read
        return LayerInputs(
            layer,
            self._geometries[layer],
            self._statistics[layer],
            None if read is None else lambda: read(layer),
            self._seed,
            frozenset(self._protected.get(layer, ())),
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self._geometries)

    def __len__(self) -> int:
        return len(self._geometries)
