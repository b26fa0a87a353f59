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

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from moekit import catalogue
from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.safety import read_header
from moekit.compress.budget import Budget
from moekit.compress.decision import LayerDecision
from moekit.compress.prune.base import PruneMethod
from moekit.compress.resize import Groups
from moekit.errors import BadCheckpoint, BadConfig, BadData
from moekit.trace.meta import DataEntry
from moekit.trace.statistics import LayerStatistics

MAX_PLAN_BYTES = 256 << 20


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


class PlanFile(BaseModel):
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

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    protected: dict[int, tuple[int, ...]] = {}
    layers: dict[int, LayerPlan]
    warnings: tuple[str, ...] = ()


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
        """sha256 over method, knobs and decisions: plans with equal hashes change a model alike."""
        told = self.file.model_dump(mode="json", include={"method", "settings", "top_k", "groups", "seed", "layers"})
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def check_model(self, fingerprint: str, where: str | Path = "") -> None:
        """Refuse another model.

        Raises:
            BadConfig: naming both fingerprints.
        """
        if fingerprint != self.file.fingerprint:
            raise BadConfig(
                f"this plan was made for {self.file.model} ({self.file.fingerprint[:12]}), not for {fingerprint[:12]}",
                file=where or None,
                hint="make a plan for this model: scores of one say nothing of another",
            )

    def save(self, path: str | Path) -> None:
        """Write `path` (JSON) and the statistics beside it; the JSON comes last and names a whole plan."""
        path = Path(path)
        flat = {
            f"{layer}.{name}": tensor.contiguous()
            for layer, named in self.statistics.items()
            for name, tensor in named.items()
        }
        atomic_write(_beside(path), safetensors.torch.save(flat))
        atomic_write(path, self.file.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read a plan.

        Raises:
            BadData: not a plan, or damaged.
            UnsafeInput: a header that lies.
        """
        path = Path(path)
        if not path.is_file():
            raise BadData("there is no plan here", file=path, hint="`moekit prune --plan FILE` writes one")
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise BadData(f"{path.stat().st_size} bytes are too many for a plan", file=path)
        try:
            file = PlanFile.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BadData(f"damaged plan: {where}: {first['msg']}", file=path, hint="make it again") from error
        return cls(file, _read_statistics(_beside(path), file))


def _beside(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _read_statistics(path: Path, file: PlanFile) -> dict[int, LayerStatistics]:
    try:
        read_header(path)
    except (BadCheckpoint, OSError) as error:
        raise BadData(
            f"the statistics of the plan are missing or damaged: {error}",
            file=path,
            hint="keep the .safetensors file beside the .json file of a plan",
        ) from error
    named: dict[int, dict[str, Tensor]] = {layer: {} for layer in file.layers}
    for key, tensor in safetensors.torch.load_file(path).items():
        layer, _, name = key.partition(".")
        if not layer.isdigit() or int(layer) not in named:
            raise BadData(f"damaged plan: a tensor {key!r} that no layer of it has", file=path, hint="make it again")
        named[int(layer)][name] = tensor
    made: dict[int, LayerStatistics] = {}
    for number, values in named.items():
        plan = file.layers[number]
        made[number] = LayerStatistics(plan.experts, plan.hidden, file.domains, file.tokens, values, width=plan.width)
    return made


def make_method(name: str, settings: Mapping[str, Any]) -> PruneMethod:
    """A method from its catalogue name and knobs.

    Raises:
        BadConfig: unknown name, or knobs it refuses.
    """
    cls = catalogue.get("prune", name).cls
    try:
        method = cls(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or name
        raise BadConfig(f"{name}: {where}: {first['msg']}", hint=f"see `moekit methods {name}`") from error
    assert isinstance(method, PruneMethod)
    return method
