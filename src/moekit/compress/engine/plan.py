"""A plan: what a method decided for each layer, with the scores it decided from; one form for all kinds of methods.

On disk a JSON file that a person can read, and beside it a safetensors file of the same name with the statistics that
the method needs: so another budget needs no new pass over the text, and the same plan makes the same weights again.

Legend: E experts, H hidden, I expert width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field

from moekit import catalogue
from moekit.compress.budget.bits import BitBudget
from moekit.compress.budget.rules import TensorRule
from moekit.compress.budget.sizes import Budget
from moekit.compress.budget.sparsity import SparsityBudget
from moekit.compress.budget.width import WidthBudget
from moekit.compress.engine import plan_files
from moekit.compress.engine.dense_cuts import InputCut
from moekit.compress.engine.made_layers import MadeLayers
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.repairing import BlockRepair
from moekit.compress.engine.resize import Groups
from moekit.errors import BadConfig, BadData
from moekit.trace.meta import DataEntry
from moekit.trace.statistics import LayerStatistics


class LayerRecord(BaseModel):
    """What was decided for one layer.

    Attributes:
        experts: E.
        hidden: H.
        width: I.
        scores: how much each expert is worth to the method, more is better; empty where it does not rank experts.
        never_routed: experts that no token of the calibration text chose.
        outcome: what becomes of the layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int
    hidden: int
    width: int
    scores: tuple[float, ...] = ()
    never_routed: tuple[int, ...] = ()
    outcome: LayerOutcome


class PlanFile(plan_files.ReadablePart):
    """The readable part of a plan.

    Attributes:
        format: version of this file.
        kind: of the method, such as "prune" or "sparsify".
        method: name in the catalogue.
        settings: the method's knobs.
        budget: what may stay, in the form of the kind.
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
        kept_apart: text whose held-out part was kept out of it, for a proof; "" where none was.
        calibrated: how that text was laid out (name, tokens, rows), so that it can be gone through again; {} without.
        protected: decoder layer -> experts that stay whatever their score.
        repair: how experts that stay make up for those that go; None leaves them.
        rules: what becomes of tensors that belong to no routed expert.
        layers: decoder layer -> what was decided.
        cuts: name of a matrix outside of routed experts -> which of its inputs stay.
        mtp: beginning of a multi-token-prediction layer's names -> how much each of its experts is used; empty where
            such layers are not cut.
        made: decoder layer -> sha256 of its new weights, where they were made as the text stood at it and cannot be
            made from this plan alone; empty otherwise.
        warnings: what a reader must know.
    """

    format: int = 2
    kind: str
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    budget: Budget | SparsityBudget | BitBudget | WidthBudget
    top_k: int | None = None
    groups: Groups = "free"
    seed: int = 0
    model: str = ""
    fingerprint: str
    trace: str = ""
    data: tuple[DataEntry, ...] = ()
    tokens: int = 0
    domains: tuple[str, ...] = ()
    kept_apart: str = ""
    calibrated: dict[str, Any] = Field(default_factory=dict)
    protected: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    repair: BlockRepair | None = None
    rules: tuple[TensorRule, ...] = ()
    layers: dict[int, LayerRecord]
    cuts: dict[str, InputCut] = Field(default_factory=dict)
    mtp: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    made: dict[int, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()


_DECIDING = {"fingerprint", "kind", "method", "settings", "top_k", "groups", "seed", "protected", "rules", "layers"}


class WeightPlan:
    """Outcomes, and the statistics behind them.

    Args:
        file: the readable part.
        statistics: decoder layer -> what the method needs, measured where the layer stands: of sequential methods
            behind the changed layers before it.
        made: the new layers, where they were made as the text stood at them.
    """

    def __init__(
        self, file: PlanFile, statistics: Mapping[int, LayerStatistics], made: MadeLayers | None = None
    ) -> None:
        self.file = file
        self.statistics = dict(statistics)
        self.made = made

    def with_file(self, **changed: Any) -> WeightPlan:
        """The same decision with other fields of the readable part."""
        return WeightPlan(self.file.model_copy(update=changed), self.statistics, self.made)

    def made_layers(self) -> MadeLayers:
        """The new layers, where they were made as the text stood at them.

        Raises:
            BadConfig: the plan was read from a file, which tells what was decided and holds no weights.
        """
        if self.made is None:
            again = "--from PLAN` goes through the same text again"
            if self.file.repair is not None:
                again = "--repair ...` makes plan and weights of a text at once"
            raise BadConfig(
                f"the plan says what {self.file.method} decided, and its weights are made as the text passes by",
                hint=f"`moekit {self.file.kind} {again}",
            )
        return self.made

    @property
    def method(self) -> WeightMethod[Any, Any]:
        """The method, made from kind, name and knobs."""
        return make_method(self.file.kind, self.file.method, self.file.settings)

    @property
    def made_on_text(self) -> bool:
        """Whether its new weights are made where a text stands at each layer."""
        wanted = self.method.made_on_text or self.file.repair is not None
        return wanted and any(not told.outcome.unchanged(told.experts) for told in self.file.layers.values())

    @property
    def outcomes(self) -> dict[int, LayerOutcome]:
        """Decoder layer -> what becomes of it."""
        return {layer: told.outcome for layer, told in self.file.layers.items()}

    @property
    def hash(self) -> str:
        """sha256 over what decides: plans with equal hashes change a model alike.

        That is model, method, knobs, protection and outcomes, and the statistics where weights are made from them, or
        digests of the weights where they were made already.
        """
        told = self.file.model_dump(
            mode="json",
            include=_DECIDING | {name for name in ("mtp", "made", "repair", "cuts") if getattr(self.file, name)},
        )
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        if self.method.rewrites or self.method.redirects:
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
    def load(cls, path: str | Path, *kinds: str) -> WeightPlan:
        """Read a plan.

        Args:
            path: of the JSON file.
            kinds: of the method, one of which it must be of; none for any.

        Raises:
            BadData: not a plan, damaged, or of another kind.
            UnsafeInput: a header that lies.
        """
        path = Path(path)
        file = plan_files.read_plan(PlanFile, path, command=f"moekit {kinds[0] if kinds else 'prune'}")
        if kinds and file.kind not in kinds:
            way = f"{file.kind} --from PLAN" if file.kind in ("quantize", "slim", "sparsify") else "apply PLAN"
            raise BadData(
                f"this is a plan of `moekit {file.kind}`, not of `moekit {'` or `moekit '.join(kinds)}`",
                file=path,
                hint=f"`moekit {way}` carries it out",
            )
        named = plan_files.read_statistics(path, file.layers, file.statistics_sha256)
        statistics = {
            layer: LayerStatistics(told.experts, told.hidden, file.domains, file.tokens, named[layer], width=told.width)
            for layer, told in file.layers.items()
        }
        return cls(file, statistics)


AnyBudget = Budget | SparsityBudget | BitBudget | WidthBudget
_SAYS: dict[type[AnyBudget], str] = {
    Budget: "how many experts stay",
    SparsityBudget: "how many weights become zero",
    BitBudget: "how many bits a weight gets",
    WidthBudget: "how many neurons an expert keeps",
}
K = TypeVar("K", Budget, SparsityBudget, BitBudget, WidthBudget)


def budget_as(kind: type[K], budget: AnyBudget) -> K:
    """The budget, where it is of the kind that a job needs.

    Raises:
        BadConfig: it is a budget of another kind.
    """
    if isinstance(budget, kind):
        return budget
    raise BadConfig(f"this says {_SAYS[type(budget)]}, not {_SAYS[kind]}", hint="make it with the method's own command")


def make_method(kind: str, name: str, settings: Mapping[str, Any]) -> WeightMethod[Any, Any]:
    """A method from its kind, catalogue name and knobs.

    Raises:
        BadConfig: unknown name, or knobs it refuses.
    """
    method: WeightMethod[Any, Any] = catalogue.make(kind, name, settings)
    return method
