"""A plan of sparsity: which share of each layer's weights becomes zero, and the statistics that say which.

On disk a JSON file that a person can read, and beside it a safetensors file of the same name with the statistics that
the method needs. They fix every zero: the same plan on the same model gives the same zeros again, without a text.

Legend: E experts, H hidden, I expert width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field

from moekit import catalogue
from moekit.compress.engine import plan_files
from moekit.compress.engine.outcome import LayerDecision
from moekit.compress.engine.zeroing import SparsifyMethod
from moekit.trace.meta import DataEntry
from moekit.trace.statistics import LayerStatistics


class LayerShare(BaseModel):
    """What one layer is to become.

    Attributes:
        experts: E.
        hidden: H.
        width: I.
        sparsity: share of zeros that was asked for.
        never_routed: experts that no token of the calibration text chose.
        figures: what else the method tells, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int
    hidden: int
    width: int
    sparsity: float = Field(ge=0, lt=1)
    never_routed: tuple[int, ...] = ()
    figures: dict[str, float | list[float]] = {}


class SparsityFile(plan_files.ReadablePart):
    """The readable part of a plan.

    Attributes:
        format: version of this file.
        method: name in the catalogue.
        settings: the method's knobs.
        sparsity: share of zeros among the routed experts' weights that are there.
        total: share of `original` that is to be gone, with experts or as zeros; None where nobody asked for one.
        original: routed experts' weights of the checkpoint before any experts were removed; None where unknown.
        weights: routed experts' weights that are there.
        seed: of everything random.
        model: what it was made for, for people.
        fingerprint: of that model.
        data: the text that it was calibrated on.
        tokens: of that text.
        kept_apart: text whose held-out part was kept out of it, for a proof; "" where none was.
        layers: decoder layer -> what it is to become.
        warnings: what a reader must know.
    """

    format: int = 1
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    sparsity: float = Field(ge=0, lt=1)
    total: float | None = Field(default=None, ge=0, lt=1)
    original: int | None = Field(default=None, ge=1)
    weights: int = Field(ge=1)
    seed: int = 0
    model: str = ""
    fingerprint: str
    data: tuple[DataEntry, ...] = ()
    tokens: int = 0
    kept_apart: str = ""
    layers: dict[int, LayerShare]
    warnings: tuple[str, ...] = ()


class SparsityPlan:
    """Shares of zeros, and the statistics by which they are placed.

    Args:
        file: the readable part.
        statistics: decoder layer -> what the method needs, measured where the layer stands: of sequential methods
            behind the sparse layers before it.
    """

    def __init__(self, file: SparsityFile, statistics: Mapping[int, LayerStatistics]) -> None:
        self.file = file
        self.statistics = dict(statistics)

    @property
    def method(self) -> SparsifyMethod:
        """The method, made from name and knobs."""
        return make_method(self.file.method, self.file.settings)

    @property
    def decisions(self) -> dict[int, LayerDecision]:
        """Decoder layer -> all of its experts: none goes."""
        return {layer: LayerDecision(keep=tuple(range(told.experts))) for layer, told in self.file.layers.items()}

    @property
    def hash(self) -> str:
        """sha256 over method, knobs, shares and statistics: plans with equal hashes change a model alike."""
        told = self.file.model_dump(mode="json", include={"method", "settings", "seed", "layers"})
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        digest.update(safetensors.torch.save(plan_files.flatten(self.statistics)))
        return digest.hexdigest()

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
    def load(cls, path: str | Path) -> SparsityPlan:
        """Read a plan.

        Raises:
            BadData: not a plan, or damaged.
            UnsafeInput: a header that lies.
        """
        path = Path(path)
        hint = "make it again; plans of `moekit prune` are carried out by `moekit apply`"
        file = plan_files.read_plan(SparsityFile, path, command="moekit sparsify", hint=hint)
        named = plan_files.read_statistics(path, file.layers, file.statistics_sha256)
        statistics = {
            layer: LayerStatistics(told.experts, told.hidden, (), file.tokens, named[layer], width=told.width)
            for layer, told in file.layers.items()
        }
        return cls(file, statistics)


def make_method(name: str, settings: Mapping[str, Any]) -> SparsifyMethod:
    """A method from its catalogue name and knobs.

    Raises:
        BadConfig: unknown name, or knobs it refuses.
    """
    method: SparsifyMethod = catalogue.make("sparsify", name, settings)
    return method
