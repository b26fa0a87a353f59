"""The placement artefact: which device holds which expert, and how well that serves the trace it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moekit._validation import parse
from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.safety import read_json
from moekit.errors import BadCheckpoint, BadConfig, BadData

FORMAT = 1
# 1000 layers of 1000 experts with copies stay far below.
MAX_FILE_BYTES = 64_000_000


class Placement(BaseModel):
    """Device of every expert, layer by layer.

    Attributes:
        format: version of the file's layout.
        fingerprint: of the model it was made for, "" if unknown.
        trace: hash of the trace it was made from, "" if unknown.
        devices: D.
        nodes: nodes that the devices stand in, filled one after the other.
        experts: most experts of any layer.
        layers: decoder layer -> device of each expert.
        replicas: decoder layer -> expert -> further devices that hold a copy of it.
        solver: name in the catalogue.
        config: the solver's knobs.
        seed: of its random starts.
        objective: decoder layer -> value reached.
        bound: decoder layer -> no placement with these blocks is worth more; None if not computed.
        proven: decoder layers whose value is known to be the optimum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    fingerprint: str = ""
    trace: str = ""
    devices: int = Field(ge=1)
    nodes: int = Field(default=1, ge=1)
    experts: int = Field(ge=1)
    layers: dict[int, list[int]]
    replicas: dict[int, dict[int, list[int]]] = {}
    solver: str
    config: dict[str, Any] = {}
    seed: int = 0
    objective: dict[int, float] = {}
    bound: dict[int, float] | None = None
    proven: list[int] = []

    @model_validator(mode="after")
    def _check(self) -> Placement:
        if not self.layers:
            raise ValueError("no layer is placed")
        if self.nodes > self.devices:
            raise ValueError(f"{self.devices} devices cannot stand in {self.nodes} nodes")
        for layer, groups in self.layers.items():
            if not groups or not all(0 <= device < self.devices for device in groups):
                raise ValueError(f"layer {layer}: devices must be 0..{self.devices - 1}")
        self._check_figures()
        if max(map(len, self.layers.values())) != self.experts:
            raise ValueError(f"no layer places {self.experts} experts")
        for layer, copies in self.replicas.items():
            for expert, further in copies.items():
                if layer not in self.layers or not 0 <= expert < len(self.layers[layer]):
                    raise ValueError(f"layer {layer}, expert {expert}: copies of an expert that is not placed")
                held = [self.layers[layer][expert], *further]
                if len(set(held)) != len(held) or not all(0 <= device < self.devices for device in held):
                    raise ValueError(f"layer {layer}, expert {expert}: copies must be on distinct devices")
        return self

    def _check_figures(self) -> None:
        copies = {layer: sum(map(len, further.values())) for layer, further in self.replicas.items()}
        most = max(len(groups) + copies.get(layer, 0) for layer, groups in self.layers.items())
        if self.devices > most:
            raise ValueError(f"{self.devices} devices, but no layer has more than {most} experts and copies")
        if self.bound is not None and (missing := sorted(set(self.objective) - set(self.bound))):
            raise ValueError(f"bound lacks layer {missing[0]}, whose objective is there")

    def _of(self, layer: int) -> list[int]:
        if layer not in self.layers:
            raise BadConfig("the placement has no such layer", layer=layer, hint=f"it places {sorted(self.layers)}")
        return self.layers[layer]

    def order(self, layer: int) -> list[int]:
        """Permutation after which every device owns a contiguous block: new position -> old expert.

        Inside a device experts keep their old order.
        """
        groups = self._of(layer)
        return sorted(range(len(groups)), key=lambda expert: groups[expert])

    def orders(self) -> dict[int, list[int]]:
        """`order` of every layer."""
        return {layer: self.order(layer) for layer in self.layers}

    def sizes(self, layer: int) -> list[int]:
        """Experts that each device owns, copies left out."""
        groups = self._of(layer)
        return [groups.count(device) for device in range(self.devices)]

    @property
    def is_equal(self) -> bool:
        """Whether every device owns as many experts as any other, in every layer."""
        return all(len(set(self.sizes(layer))) == 1 for layer in self.layers)

    def holders(self, layer: int) -> list[list[int]]:
        """All devices that hold each expert, the owner first."""
        copies = self.replicas.get(layer, {})
        return [[device, *copies.get(expert, [])] for expert, device in enumerate(self._of(layer))]

    @property
    def gap(self) -> dict[int, float] | None:
        """Decoder layer -> how far below the bound its value lies at most."""
        if self.bound is None:
            return None
        return {layer: max(0.0, self.bound[layer] - value) for layer, value in self.objective.items()}

    @property
    def hash(self) -> str:
        """sha256 of where everything lies: placements of equal hash place alike, whoever found them."""
        what = [self.devices, self.nodes, sorted(self.layers.items()), sorted(self._sorted_replicas())]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _sorted_replicas(self) -> Sequence[tuple[int, list[tuple[int, list[int]]]]]:
        return [(layer, sorted(copies.items())) for layer, copies in self.replicas.items() if copies]

    def check_model(self, fingerprint: str) -> None:
        """Refuse another model than the one it was made for.

        Raises:
            BadConfig: both fingerprints are known and differ.
        """
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise BadConfig(
                f"this placement was made for model {self.fingerprint[:12]}, not {fingerprint[:12]}",
                hint="profile this model and place it anew",
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        atomic_write(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read a placement file.

        Raises:
            BadData: missing, too large, damaged, or written by a newer moekit.
        """
        path = Path(path)
        if not path.is_file():
            raise BadData("no placement file here", file=path, hint="`moekit place` writes one")
        try:
            value = read_json(path, limit=MAX_FILE_BYTES)
        except BadCheckpoint as error:
            raise BadData(f"damaged placement: {error.message}", file=path, hint="place again") from error
        if isinstance(value.get("format"), int) and value["format"] > FORMAT:
            raise BadData("a newer moekit wrote this placement", file=path, hint="upgrade moekit")
        return parse(cls, value, what="placement", file=path, hint="place again")
