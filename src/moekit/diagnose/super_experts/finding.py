"""Super experts: the few that carry massive activations, and with them attention sinks (arXiv:2507.23279).

Without three of its 6,144 experts Qwen3-30B-A3B breaks; without three others it does not change. Whatever drops, merges
or quantises experts should leave these alone: `SuperExpertReport.protected` says which they are.

Legend: E experts, A all maxima that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moekit._progress import Progress
from moekit.anatomy.probe import find_moe_layers
from moekit.diagnose.super_experts.magnitudes import MASSIVE_RATIO, MASSIVE_VALUE, median_magnitude
from moekit.diagnose.super_experts.report import SHARED, Candidate, LayerProfile, Rule, SuperExpertReport
from moekit.errors import BadData, NumericFault
from moekit.trace.recorder import record
from moekit.trace.statistics import LayerStatistics

__all__ = ["NEEDS", "SHARED", "SuperExpertReport", "find_super_experts", "forms_massive", "profile_super_experts"]

# What `find_super_experts` reads; `shared_peak` too, where layers have shared experts.
NEEDS = ("output_peak", "stream_peak", "stream_gain", "stream_magnitude")
_SHOWN = 10


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
                hint="record them, or take the first 75 % of the layers for those that form (--forming first-75)",
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
