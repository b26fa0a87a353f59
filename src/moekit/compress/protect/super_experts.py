"""Super experts: the few that carry massive activations, and with them attention sinks (arXiv:2507.23279).

Without three of its 6,144 experts Qwen3-30B-A3B breaks; without three others it does not change. Whatever drops, merges
or quantises experts should leave these alone: `SuperExpertReport.protected` says which they are.

Legend: E experts, A all maxima that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from moekit._progress import Progress
from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.atomic import atomic_write
from moekit.errors import BadConfig, BadData, NumericFault
from moekit.trace.massive import MASSIVE_RATIO, MASSIVE_VALUE, median_magnitude
from moekit.trace.recorder import record
from moekit.trace.statistics import LayerStatistics

# What `find_super_experts` reads; `shared_peak` too, where layers have shared experts.
NEEDS = ("output_peak", "stream_peak", "stream_gain", "stream_magnitude")
# Number of a layer's shared experts, all together.
SHARED = -1
_SHOWN = 10


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
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise BadData("there is no report here", file=path, hint="profile the model's super experts") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BadData(f"damaged report: {where}: {first['msg']}", file=path, hint="profile again") from error


def _place(peak_V: Tensor | None) -> tuple[float, int, int] | None:
    return None if peak_V is None else (float(peak_V[0]), int(peak_V[1]), int(peak_V[2]))


def forms_massive(gain: float, median: float) -> bool:
    """Whether a block that adds `gain` to one value forms a massive activation, in a layer of this median.

    The gain itself must be massive by Sun et al. (arXiv:2402.17762): > 100 and > 1,000 medians. So a massive activation
    that is only passed on does not count, nor one that attention makes.
    """
    return gain > MASSIVE_VALUE and gain > MASSIVE_RATIO * median


def _forming(statistics: Mapping[int, LayerStatistics], rule: Rule, early: int) -> set[int]:
    """Layers that form a massive activation."""
    if rule.forming == "first-75":
        return {layer for layer in statistics if layer < early}
    found = set()
    for layer, stats in statistics.items():
        if missing := [name for name in ("stream_gain", "stream_magnitude") if name not in stats]:
            raise BadData(
                f"{' and '.join(missing)} were not recorded",
                layer=layer,
                hint="record them, or take the first 75 % of the layers for those that form (forming=first-75)",
            )
        if forms_massive(float(stats["stream_gain"][0]), median_magnitude(stats["stream_magnitude"])):
            found.add(layer)
    return found


def _profile(stats: LayerStatistics, *, forms: bool, compared: bool) -> LayerProfile:
    shared = _place(stats.get("shared_peak"))
    counts = stats.get("stream_magnitude")
    return LayerProfile(
        maxima=tuple(stats["output_peak"][:, 0].tolist()),
        shared=None if shared is None else shared[0],
        stream=_place(stats.get("stream_peak")),
        gain=_place(stats.get("stream_gain")),
        median=None if counts is None else median_magnitude(counts),
        forms=forms,
        compared=compared,
    )


class _Peak(NamedTuple):
    layer: int
    expert: int
    value: float
    channel: int
    position: int


def _peaks(statistics: Mapping[int, LayerStatistics]) -> list[_Peak]:
    """Every expert's largest |output|, by layer; shared experts after the routed ones."""
    peaks = []
    for layer, stats in statistics.items():
        if "output_peak" not in stats:
            raise BadData("output_peak was not recorded", layer=layer, hint=f"record {', '.join(NEEDS)}")
        rows = list(enumerate(stats["output_peak"].tolist()))
        if "shared_peak" in stats:
            rows.append((SHARED, stats["shared_peak"].tolist()))
        for expert, (value, channel, position) in rows:
            if not math.isfinite(value):
                raise NumericFault(f"the largest output is {value}", layer=layer, expert=expert, hint="profile in fp32")
            peaks.append(_Peak(layer, expert, value, int(channel), int(position)))
    return peaks


def find_super_experts(
    statistics: Mapping[int, LayerStatistics],
    *,
    percentile: float = 99.5,
    ratio: float = 0.1,
    scope: Literal["first-75", "model", "formation"] = "first-75",
    forming: Literal["gain", "first-75"] = "gain",
    decoder_layers: int | None = None,
    model: str = "",
    fingerprint: str = "",
) -> SuperExpertReport:
    """Find the experts whose maximum exceeds P_percentile(A) and ratio max(A), in layers that form (section 3.2).

    The paper's code is `scope="first-75", forming="first-75"`, its text `scope="model"`. Among few maxima
    the percentile leaves room for one alone; see `SuperExpertReport.room`.

    Args:
        statistics: decoder layer -> `NEEDS`, and `shared_peak` where there are shared experts.
        percentile: see `Rule`, also for the next three.
        ratio: see `Rule`.
        scope: see `Rule`.
        forming: see `Rule`.
        decoder_layers: of the model, dense ones too; those up to the last MoE layer by default.
        model: name or path, for people.
        fingerprint: of the model.

    Raises:
        BadData: a statistic was not recorded, or there is no layer.
    """
    if not statistics:
        raise BadData("there are no statistics of any layer", hint=f"record {', '.join(NEEDS)}")
    rule = Rule(percentile=percentile, ratio=ratio, scope=scope, forming=forming)
    early = round(0.75 * (decoder_layers or max(statistics) + 1))
    form = _forming(statistics, rule, early)
    compared = {
        "model": set(statistics),
        "formation": form,
        "first-75": form | {layer for layer in statistics if layer < early},
    }[scope] or set(statistics)
    peaks = _peaks(statistics)
    all_A = torch.tensor([peak.value for peak in peaks if peak.layer in compared], dtype=torch.float64)
    limits = float(torch.quantile(all_A, percentile / 100)), ratio * float(all_A.max())

    def candidate(peak: _Peak) -> Candidate:
        return Candidate(
            **peak._asdict(),
            over_percentile=peak.value / limits[0] if limits[0] else None,
            over_ratio=peak.value / limits[1] if limits[1] else None,
            large=peak.value > max(limits),
            forms=peak.layer in form,
        )

    found = [peak for peak in peaks if peak.value > max(limits) and peak.layer in form]
    others = sorted(set(peaks) - set(found), key=lambda peak: (-peak.value, peak.layer, peak.expert))
    return SuperExpertReport(
        model=model,
        fingerprint=fingerprint,
        rule=rule,
        tokens=max(stats.tokens for stats in statistics.values()),
        percentile=limits[0],
        largest=float(all_A.max()),
        found=tuple(map(candidate, found)),
        others=tuple(map(candidate, others[:_SHOWN])),
        layers={n: _profile(s, forms=n in form, compared=n in compared) for n, s in statistics.items()},
    )


def profile_super_experts(
    model: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None, **settings: Any
) -> SuperExpertReport:
    """Run a model over a text and find its super experts; about 100 texts suffice, which ones hardly matters.

    Rows must be unpadded texts that begin as the model's texts usually do: sinks stand at their beginning.

    Args:
        model: a MoE.
        batches: see `moekit.trace.record`.
        progress: told of each batch.
        settings: of `find_super_experts`.

    Raises:
        BadData: the batches hold no tokens but padding.
        UnsupportedModel: no MoE, compiled, or its residual stream cannot be seen.
    """
    shared = ("shared_peak",) if all(layer.shared for layer in find_moe_layers(model)) else ()
    trace = record(model, batches, statistics=(*NEEDS, *shared), keep_choices=False, progress=progress)
    assert trace.statistics is not None
    told: dict[str, Any] = {
        "decoder_layers": getattr(getattr(model, "config", None), "num_hidden_layers", None),
        "model": trace.meta.model,
        "fingerprint": trace.meta.fingerprint,
    }
    return find_super_experts(trace.statistics, **told | settings)
