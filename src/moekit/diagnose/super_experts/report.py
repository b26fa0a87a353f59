"""What is told of super experts: the rule, what each layer showed, who passed, and by how much."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moekit._validation import parse_file
from moekit.checkpoint.atomic import atomic_write
from moekit.errors import BadConfig

# Number of a layer's shared experts, all together.
SHARED = -1


class Rule(BaseModel):
    """When an expert is a super expert: its largest |output| passes both thresholds, in a layer that forms.

    Attributes:
        percentile: of A, interpolated; the maximum must exceed it.
        ratio: share of the largest of A that the maximum must exceed.
        scope: A is taken from the first 75 % of the decoder layers and all that form ("first-75"), from all ("model"),
            or from the layers that form alone ("formation").
        forming: a layer forms a massive activation where its block adds enough to one value of the residual stream
            ("gain"), or where it is one of the first 75 % ("first-75", as the paper's code has it).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    percentile: float = Field(default=99.5, ge=0, le=100, description="of all maxima, which a super expert exceeds")
    ratio: float = Field(default=0.1, ge=0, le=1, description="share of the largest maximum that it exceeds")
    scope: Literal["first-75", "model", "formation"] = Field(default="first-75", description="whose maxima compare")
    forming: Literal["gain", "first-75"] = Field(default="gain", description="which layers form massive activations")


class LayerProfile(BaseModel):
    """One layer as it was measured.

    Attributes:
        maxima: each expert's largest |output| before gating; 0 where no token chose it.
        shared: that of the shared experts; None without.
        stream: largest |value| of the residual stream after the layer, its channel and position; None if not recorded.
        gain: most that the block adds to one value's magnitude, its channel and position; None if not recorded.
        median: of the residual stream's |values| after the layer; None if not recorded.
        forms: whether the layer forms a massive activation.
        compared: whether its maxima are in A.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    maxima: tuple[float, ...]
    shared: float | None = None
    stream: tuple[float, int, int] | None = None
    gain: tuple[float, int, int] | None = None
    median: float | None = None
    forms: bool
    compared: bool


class Candidate(BaseModel):
    """An expert and how far it stands from the thresholds.

    Attributes:
        layer: decoder layer.
        expert: its number; -1 for the shared experts.
        value: largest |output| before gating.
        channel: where in the output.
        position: of the token in its sequence.
        over_percentile: value over the percentile of A; None where that is 0.
        over_ratio: value over `ratio` times the largest of A; None where that is 0.
        large: whether it passes both thresholds.
        forms: whether its layer forms a massive activation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    expert: int
    value: float
    channel: int
    position: int
    over_percentile: float | None
    over_ratio: float | None
    large: bool
    forms: bool


class SuperExpertReport(BaseModel):
    """Which experts are super experts, why, and by how much.

    Attributes:
        format: version of this file.
        model: name or path, for people.
        fingerprint: of the model; "" if unknown.
        rule: by which they were found.
        tokens: of the text.
        percentile: value of the percentile of A.
        largest: of A.
        found: the super experts, by layer and number.
        others: the next largest, whatever keeps them from being one.
        layers: decoder layer -> what was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str = ""
    fingerprint: str = ""
    rule: Rule
    tokens: int = Field(ge=0)
    percentile: float
    largest: float
    found: tuple[Candidate, ...]
    others: tuple[Candidate, ...]
    layers: dict[int, LayerProfile]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(layer, expert) of each super expert; -1 for shared experts."""
        return [(c.layer, c.expert) for c in self.found]

    @property
    def room(self) -> int:
        """How many of the n maxima of A can exceed an interpolated percentile: n - 1 - floor(percentile (n - 1) / 100).

        At the 99.5th percentile one alone of up to 201 maxima, whatever stands out.
        """
        compared = [profile for profile in self.layers.values() if profile.compared]
        last = sum(len(p.maxima) + (p.shared is not None) for p in compared) - 1
        return last - math.floor(last * self.rule.percentile / 100)

    @property
    def protected(self) -> dict[int, frozenset[int]]:
        """Decoder layer -> routed experts that must stay as they are; layers without any are left out."""
        layers = sorted({c.layer for c in self.found if c.expert != SHARED})
        return {n: frozenset(e for layer, e in self.pairs if layer == n and e != SHARED) for n in layers}

    def mask(self, layer: int) -> Tensor:
        """True at the super experts of a layer, [E]."""
        marks_E = torch.zeros(len(self.layers[layer].maxima), dtype=torch.bool)
        marks_E[sorted(self.protected.get(layer, ()))] = True
        return marks_E

    @property
    def verdict(self) -> str:
        """What was found, or which condition left nothing."""
        if self.found:
            names = (f"{'shared' if e == SHARED else e} of layer {layer}" for layer, e in self.pairs)
            return f"super experts: {', '.join(names)}"
        if not any(profile.forms for profile in self.layers.values()):
            return "no super expert: no layer forms a massive activation"
        if large := [c for c in self.others if c.large]:
            names = (f"{c.expert} of layer {c.layer}" for c in large)
            return f"no super expert: layers of those past both thresholds form none ({', '.join(names)})"
        return f"no super expert: no maximum of a forming layer exceeds both {self.percentile:g} and " + (
            f"{self.rule.ratio:g} x {self.largest:g}"
        )

    def check_model(self, fingerprint: str, where: str | Path = "") -> None:
        """Refuse another model.

        Raises:
            BadConfig: naming both fingerprints.
        """
        if fingerprint != self.fingerprint:
            raise BadConfig(
                f"this report is of {self.model} ({self.fingerprint[:12]}), not of {fingerprint[:12]}",
                file=where or None,
                hint="profile this model: another one's super experts are other experts",
            )

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        atomic_write(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SuperExpertReport:
        """Read a report.

        Raises:
            BadData: not there, or damaged.
        """
        return parse_file(cls, path, what="report", missing="find the model's super experts", hint="find them again")
