"""What a method is that changes the weights of experts, whatever it does to them.

A method is a frozen pydantic config with pure functions. The engine calls them in this order: `worth` says what each
expert is worth, `allocate` shares the budget among the layers, `decide` says what becomes of a layer, and `transform`
makes its new weights. It is registered with `@register(kind=..., needs=...)`; reading, streaming, writing and proving
are not its business. Kinds fill in what their methods have in common: `PruneMethod`, `MergeMethod`,
`SparsifyMethod`, `QuantizeMethod`, `SlimMethod`.

Legend: E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moekit import catalogue
from moekit.anatomy.probe import Geometry
from moekit.compress.engine.carrying import carried_out
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome, Widths
from moekit.compress.weights import LayerWeights

Passes = Literal["none", "once", "sequential", "search"]
B = TypeVar("B")
S = TypeVar("S", int, float, Widths)


class Reconstruction(Protocol):
    """Runs a layer's MoE block on the calibration inputs with only some of its experts."""

    def loss(self, kept: Sequence[int]) -> float:
        """Distance of the block's output from the full one: sum over batches of the Frobenius norm, in float64."""


class Baseline(NamedTuple):
    """What a proof compares a method with, at the same budget.

    Attributes:
        name: of a method.
        settings: its knobs.
        kind: of the method; "" for the kind of the one that is proved.
    """

    name: str
    settings: Mapping[str, Any] = MappingProxyType({})
    kind: str = ""


class WeightMethod(BaseModel, ABC, Generic[B, S]):
    """Base of all methods that change weights; fields are the method's knobs.

    B is the kind's budget, S what a layer gets of it: experts that stay, neurons, a share of zeros, or bits.

    Attributes:
        reads_weights: `worth`, `allocate` or `decide` look at `inputs.weights`.
        rewrites: `transform` changes weights; otherwise experts stay or go as they are.
        reads_moments: `transform` looks at second moments of what experts are given. They are made one expert at a time
            as the text stands at the layer, and kept nowhere: what is kept is the layer that was made of them.
        searches: `search` is asked instead of `worth` and `decide`; it needs the model, not only statistics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reads_weights: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False
    reads_moments: ClassVar[bool] = False
    searches: ClassVar[bool] = False

    @classmethod
    def implied_traits(cls) -> frozenset[catalogue.Trait]:
        """Rewrites, where a class says so."""
        return frozenset({"rewrites"} if cls.rewrites else ())

    @property
    def sequential(self) -> bool:
        """Whether each layer is decided on what the changed layers before it give."""
        return False

    @property
    def made_on_text(self) -> bool:
        """Whether new weights are made where the text stands at a layer, of what its experts are given, and kept."""
        return self.reads_moments

    @property
    def decides_behind(self) -> bool:
        """Whether a sequential method decides on what it measures there; else the outcomes are known beforehand."""
        return False

    @property
    def redirects(self) -> bool:
        """Whether the router goes on choosing among experts that are gone, whose tokens go elsewhere.

        Outcomes then have a `redirect`, and the result needs a routing policy of moekit beside its weights.
        """
        return False

    @property
    def passes(self) -> Passes:
        """How the text goes through the model: not at all, once, layer after changed layer, or for a search."""
        if self.searches:
            return "search"
        if self.sequential:
            return "sequential"
        return "once" if self.required else "none"

    @property
    def required(self) -> tuple[str, ...]:
        """Statistics the method needs with these knobs; those of its record by default."""
        return catalogue.of(type(self)).needs

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[Any]:
        """Settings that the generic tests try; the defaults, unless fields are required."""
        return [cls()]

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        """What a proof compares with at the same budget."""
        return ()

    @property
    def shares_by_measure(self) -> bool:
        """Whether a sequential method shares the budget by what it measures in the model as it is."""
        return False

    @property
    def reads_inner(self) -> bool:
        """Whether `finds` looks at `inputs.inner`, what experts' neurons give on every token of the text."""
        return False

    def finds(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> Mapping[str, Tensor]:
        """What `transform` needs and can only be found where the text stands at the layer, in small tensors by name.

        Asked in sequential passes alone, once a layer is decided. It is kept with the layer's statistics, and so with
        the plan: its names are those of no statistic.
        """
        return {}

    def unseen(self, experts: Sequence[int], outcome: LayerOutcome) -> str:
        """What a plan's warning adds of experts that no token of the calibration text chose; "" for nothing.

        Args:
            experts: those of a layer.
            outcome: of the layer.
        """
        return ""

    def worth(self, inputs: LayerInputs) -> Tensor:
        """How much each expert is worth, [E], more is better; empty for methods that do not rank experts."""
        return Tensor()

    @abstractmethod
    def allocate(
        self, inputs: Mapping[int, LayerInputs], scores: Mapping[int, Tensor], budget: B, sizes: Any
    ) -> dict[int, S]:
        """Share the budget among the layers.

        Args:
            inputs: of each layer.
            scores: of each layer, [E].
            budget: what may stay in all layers together.
            sizes: experts and bytes of each layer.

        Returns:
            Decoder layer -> what it gets.

        Raises:
            BadConfig: the budget is impossible; names the nearest legal value.
        """

    @abstractmethod
    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: S) -> LayerOutcome:
        """What becomes of a layer that gets this share of the budget."""

    def transform(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> LayerWeights:
        """Weights and router rows of the new experts, in the order of `outcome.sources`."""
        return carried_out(weights, outcome, inputs.layer)

    def novices(self, inputs: LayerInputs, outcome: LayerOutcome) -> Tensor | None:
        """Constants [E, H] that answer for experts whose tokens go to nobody; None for no answer.

        Args:
            inputs: of the layer.
            outcome: of the layer, with a `redirect`.
        """
        return None

    def told(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> dict[str, float]:
        """What the method tells of the new weights it made, by name."""
        return {}

    def search(self, inputs: LayerInputs, block: Reconstruction, share: S) -> LayerOutcome:
        """Decide by trying; for methods with `searches`."""
        raise NotImplementedError(f"{type(self).__name__} does not search")
