"""Placements made from a trace, and what the trace would have sent under them.

Legend: N tokens, K choices, E experts, D devices, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moekit._progress import Progress, track
from moekit.errors import BadConfig
from moekit.placement.plan import Placement
from moekit.placement.planning import place
from moekit.placement.replaying import Home, replay
from moekit.placement.result import ReplayResult

if TYPE_CHECKING:
    from moekit.trace.store import Trace


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a trace sends under a placement.

    Attributes:
        layers: decoder layer -> exact counts.
        total: their sum.
    """

    layers: dict[int, ReplayResult]
    total: ReplayResult

    @property
    def imbalance(self) -> float:
        """Largest device load over the mean, averaged over layers: devices wait for the slowest in every layer."""
        return sum(r.max_over_mean for r in self.layers.values()) / len(self.layers)

    @property
    def worst_imbalance(self) -> float:
        """The same of the worst layer."""
        return max(r.max_over_mean for r in self.layers.values())

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "layers": {layer: result.as_dict() for layer, result in self.layers.items()},
            "total": self.total.as_dict(),
            "imbalance": self.imbalance,
            "worst_imbalance": self.worst_imbalance,
        }


def experts_of(trace: Trace) -> dict[int, int]:
    """Decoder layer -> E."""
    return dict(zip(trace.meta.layers, trace.meta.experts, strict=True))


def check_trace(trace: Trace, placement: Placement) -> None:
    """Refuse a trace and a placement that cannot belong together.

    Raises:
        BadConfig: different models, layers or numbers of experts.
    """
    placement.check_model(trace.meta.fingerprint)
    for layer, experts in experts_of(trace).items():
        if layer not in placement.layers or len(placement.layers[layer]) != experts:
            raise BadConfig(
                f"the trace has {experts} experts here, the placement "
                f"{len(placement.layers[layer]) if layer in placement.layers else 'no such layer'}",
                layer=layer,
                hint="they were made for different models",
            )


def simulate(
    trace: Trace,
    placement: Placement,
    *,
    home: Home = "round-robin",
    progress: Progress | None = None,
) -> Simulation:
    """Replay every layer of a trace under a placement.

    Args:
        trace: with choices kept.
        placement: for the same model.
        home: device of each token, see `replay`; documents are dealt out in turn by default.
        progress: told once a layer.

    Raises:
        BadConfig: trace and placement do not belong together.
    """
    check_trace(trace, placement)
    results: dict[int, ReplayResult] = {}
    for layer in track(trace.meta.layers, "replaying", progress):
        results[layer] = replay(
            trace.indices(layer),
            placement.holders(layer),
            placement.devices,
            home,
            nodes=placement.nodes,
            document_N=trace.document_N,
        )
    first, *rest = results.values()
    return Simulation(results, sum(rest, first))


def statistics_of(trace: Trace) -> dict[str, Any]:
    """What `place` takes from a trace: "coactivation" and "load" of every layer, and "choices" where they are kept.

    Raises:
        BadData: the trace has neither choices nor co-activation counts.
    """
    found = trace.require(["coactivation", "load"])
    layers = trace.meta.layers
    return {
        "coactivation": {layer: found[layer]["coactivation"] for layer in layers},
        "load": {layer: found[layer]["load"] for layer in layers},
        "choices": {layer: trace.indices(layer) for layer in layers} if trace.meta.has_choices else {},
    }


def place_trace(trace: Trace, devices: int, **options: Any) -> Placement:
    """Place a model's experts by a trace: its pairs, its load, and for K > 2 its exact rows.

    Args:
        trace: of the model; for the row objective with choices kept.
        devices: D.
        options: see `moekit.placement.planning`.

    Raises:
        BadConfig: see `moekit.placement.planning`.
        BadData: the trace has neither choices nor co-activation counts.
    """
    return place(
        devices=devices, fingerprint=trace.meta.fingerprint, trace=trace.digest, **statistics_of(trace), **options
    )
