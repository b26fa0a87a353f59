"""Workloads from a model's own experts, from a trace's choices, or from both.

Legend: R ranks, T tokens of a rank, H hidden size, E experts, K choices, N = R * T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.anatomy import MoELayer, find_moe_layers
from moekit.bench.dispatch.setting import DispatchBenchSetting
from moekit.bench.dispatch.workload import Choices, Workload, draw_choices, make_layer, normalise, spread
from moekit.errors import BadConfig, BadData
from moekit.placement import Placement
from moekit.trace import Trace


@dataclass(eq=False)
class LayerSource:
    """What is measured, and where experts may stand.

    Attributes:
        work: weights, tokens, choices.
        layouts: placement's name -> layer -> rank of each expert.
        text: where it all comes from, for a reader.
    """

    work: Workload
    layouts: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    text: str = "one made-up layer"


def make_source(
    setting: DispatchBenchSetting,
    *,
    model: Any = None,
    traces: Mapping[str, Trace] | None = None,
    placements: Mapping[str, Placement] | None = None,
    layers: int = 1,
) -> LayerSource:
    """Bring together what is measured.

    Args:
        setting: ranks, tokens and routing; sizes where no model or trace gives them.
        model: a live model whose experts are taken, in fp32; None makes weights up.
        traces: by name; the first one's choices are those that everybody gets, others are for our dispatchers alone.
            Without one, choices are drawn.
        placements: by name.
        layers: how many MoE layers one step goes through, evenly spaced.

    Raises:
        BadData: a trace of another model, or too short.
        BadConfig: a placement for other ranks, layers or experts.
    """
    traces, placements = dict(traces or {}), dict(placements or {})
    found = {} if model is None else {layer.index: layer for layer in find_moe_layers(model)}
    for trace in traces.values():
        _check_trace(trace, found, setting)
    numbers = _layers(found, traces, layers)
    if found:
        setting = _sizes_of_model(setting, [found[n] for n in numbers])
    if traces:
        setting = _sizes_of_traces(setting, list(traces.values()), numbers)
    work = make_layer(setting)
    work.layers = tuple(numbers)
    if found:
        work.config = model.config
        work.experts = {n: _weights(found[n].experts) for n in numbers}
    else:
        (made,) = work.experts.values()
        work.experts = dict.fromkeys(numbers, made)
        work.config.num_hidden_layers = max(numbers) + 1
    work.choices = {"": {n: draw_choices(setting, n) for n in numbers}}
    if traces:
        first = next(iter(traces))
        work.choices = {
            "" if name == first else name: {n: _chosen(trace, n, setting) for n in numbers}
            for name, trace in traces.items()
        }
    work.draw_hidden()
    layouts = {name: _owners(placement, numbers, setting) for name, placement in placements.items()}
    return LayerSource(work, layouts, _text(model, traces, numbers, setting))


def _layers(found: Mapping[int, MoELayer], traces: Mapping[str, Trace], count: int) -> list[int]:
    known = [set(trace.meta.layers) for trace in traces.values()] + ([set(found)] if found else [])
    if not known:
        return list(range(count))
    both = sorted(set.intersection(*known))
    if not both:
        raise BadData("model and traces have no MoE layer in common", hint="they are of different models")
    return list(spread(both, count))


def _check_trace(trace: Trace, found: Mapping[int, MoELayer], setting: DispatchBenchSetting) -> None:
    needed = setting.ranks * setting.tokens
    if not trace.meta.has_choices:
        raise BadData("the trace holds no choices", hint="profile again with choices kept")
    if trace.meta.tokens < needed:
        raise BadData(
            f"the trace holds {trace.meta.tokens} tokens, not the {needed} of {setting.ranks} ranks",
            hint=f"--tokens {max(1, trace.meta.tokens // setting.ranks)}, or profile more text",
        )
    for layer, experts in zip(trace.meta.layers, trace.meta.experts, strict=True):
        if layer in found and found[layer].geometry.experts != experts:
            raise BadData(
                f"the trace has {experts} experts, the model {found[layer].geometry.experts}",
                layer=layer,
                hint="the trace is of another model",
            )


def _sizes_of_model(setting: DispatchBenchSetting, layers: Sequence[MoELayer]) -> DispatchBenchSetting:
    sizes = {(x.geometry.hidden, x.geometry.experts, x.geometry.width, x.geometry.top_k) for x in layers}
    if len(sizes) != 1:
        raise BadConfig("the layers of this model differ in size", hint="measure one of them: --layers 1")
    hidden, experts, width, top_k = sizes.pop()
    # A router that does not follow the contract does not say how many it chooses.
    return _resized(setting, hidden=hidden, experts=experts, width=width, top_k=top_k or setting.top_k)


def _sizes_of_traces(
    setting: DispatchBenchSetting, traces: Sequence[Trace], layers: Sequence[int]
) -> DispatchBenchSetting:
    experts, choices, hidden = set(), set(), set()
    for trace in traces:
        for layer in layers:
            place = trace.meta.layers.index(layer)
            experts.add(trace.meta.experts[place])
            choices.add(trace.meta.top_k[place])
        hidden.add(trace.meta.hidden)
    if len(experts) != 1 or len(choices) != 1:
        raise BadData("these layers differ in experts or choices", hint="measure one of them: --layers 1")
    known = hidden.pop() if len(hidden) == 1 else None
    return _resized(setting, experts=experts.pop(), top_k=choices.pop(), **({"hidden": known} if known else {}))


def _resized(setting: DispatchBenchSetting, **sizes: int) -> DispatchBenchSetting:
    return DispatchBenchSetting(**{**setting.model_dump(), **sizes, "hot": min(setting.hot, sizes["experts"])})


def _weights(experts: Any) -> dict[str, Tensor]:
    named = [*experts.named_parameters(recurse=False), *experts.named_buffers(recurse=False)]
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in named}


def _chosen(trace: Trace, layer: int, setting: DispatchBenchSetting) -> Choices:
    tokens = setting.ranks * setting.tokens
    weights_NK = trace.weights(layer)
    known = None if weights_NK is None else weights_NK[:tokens]
    return normalise(trace.indices(layer)[:tokens], known, setting.experts)


def _owners(placement: Placement, layers: Sequence[int], setting: DispatchBenchSetting) -> dict[int, list[int]]:
    if placement.devices != setting.ranks:
        raise BadConfig(
            f"the placement is for {placement.devices} devices, not for {setting.ranks} ranks",
            hint=f"place again with --devices {setting.ranks}",
        )
    for layer in layers:
        if len(placement.layers.get(layer, ())) != setting.experts:
            raise BadConfig(
                f"the placement places {len(placement.layers.get(layer, ()))} experts of {setting.experts}",
                layer=layer,
                hint="it was made for another model",
            )
    return {layer: list(placement.layers[layer]) for layer in layers}


def _text(model: Any, traces: Mapping[str, Trace], layers: Sequence[int], setting: DispatchBenchSetting) -> str:
    which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
    name = "made-up weights" if model is None else f"experts of {Path(str(model.config._name_or_path)).name}"
    choices = f"choices of the trace {next(iter(traces))}" if traces else f"{setting.routing} choices"
    return f"{name}, {choices}, {which}"
