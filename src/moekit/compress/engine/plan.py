"""A pruning plan: what a method decided for each layer, with the scores it decided from.

On disk a JSON file that a person can read, and beside it a safetensors file of the same name with the statistics that
the method needs, so that another budget needs no new pass over the text.

Legend: E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from moekit import catalogue
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine import plan_files
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.outcome import LayerDecision
from moekit.compress.engine.resize import Groups
from moekit.trace.meta import DataEntry
from moekit.trace.statistics import LayerStatistics


class LayerPlan(BaseModel):
    """What was decided for one layer.

    Attributes:
        experts: E.
        hidden: H.
        width: I.
        scores: how much each expert is worth to the method; more is better.
        never_routed: experts that no token of the calibration text chose.
        decision: what stays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int
    hidden: int
    width: int
    scores: tuple[float, ...]
    never_routed: tuple[int, ...] = ()
    decision: LayerDecision


class PlanFile(plan_files.ReadablePart):
    """The readable part of a plan.

    Attributes:
        format: version of this file.
        method: name in the catalogue.
        settings: the method's knobs.
        budget: what may stay.
        top_k: choices a token makes afterwards; None as before.
        groups: "free" lets every expert stay or go and lifts the router's group limits; "equal" keeps equally many a
            group, and the limits.
        seed: of everything random.
        model: what it was made for, for people.
        fingerprint: of that model.
        trace: digest of the trace it was made from, "" without.
        data: the text of that trace.
        tokens: of that text.
        domains: of that text.
        protected: decoder layer -> experts that stay whatever their score.
        layers: decoder layer -> what was decided.
        warnings: what a reader must know.
    """

    format: int = 1
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    budget: Budget
    top_k: int | None = None
    groups: Groups = "free"
    seed: int = 0
    model: str = ""
    fingerprint: str
    trace: str = ""
    data: tuple[DataEntry, ...] = ()
    tokens: int = 0
    domains: tuple[str, ...] = ()
    protected: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    layers: dict[int, LayerPlan]
    warnings: tuple[str, ...] = ()


_DECIDING = {"fingerprint", "method", "settings", "top_k", "groups", "seed", "protected", "layers"}


class PrunePlan:
    """Decisions, and the statistics behind them.

    Args:
        file: the readable part.
        statistics: decoder layer -> what the method needs.
    """

    def __init__(self, file: PlanFile, statistics: Mapping[int, LayerStatistics]) -> None:
        self.file = file
        self.statistics = dict(statistics)

    @property
    def method(self) -> PruneMethod:
        """The method, made from name and knobs."""
        return make_method(self.file.method, self.file.settings)

    @property
    def decisions(self) -> dict[int, LayerDecision]:
        """Decoder layer -> what stays."""
        return {layer: plan.decision for layer, plan in self.file.layers.items()}

    @property
    def hash(self) -> str:
        """sha256 over model, method, knobs, protection and decisions: plans with equal hashes change a model alike."""
        told = self.file.model_dump(mode="json", include=_DECIDING)
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def check_model(self, fingerprint: str, where: str | Path = "") -> None:
        """Refuse another model.

        Raises:
            BadConfig: naming both fingerprints.
        """
        plan_files.check_model(self.file.model, self.file.fingerprint, fingerprint, where)

    def save(self, path: str | Path) -> None:
        """Write `path` (JSON) and the statistics beside it; the JSON comes last and names a whole plan."""
        plan_files.write_plan(Path(path), self.file, self.statistics)

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read a plan.

        Raises:
            BadData: not a plan, or damaged.
            UnsafeInput: a header that lies.
        """
        path = Path(path)
        file = plan_files.read_plan(PlanFile, path, command="moekit prune")
        named = plan_files.read_statistics(path, file.layers, file.statistics_sha256)
        statistics = {
            layer: LayerStatistics(told.experts, told.hidden, file.domains, file.tokens, named[layer], width=told.width)
            for layer, told in file.layers.items()
        }
        return cls(file, statistics)


def make_method(name: str, settings: Mapping[str, Any]) -> PruneMethod:
    """A method from its catalogue name and knobs.

    Raises:
        BadConfig: unknown name, or knobs it refuses.
    """
    method: PruneMethod = catalogue.make("prune", name, settings)
    return method
