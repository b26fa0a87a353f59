"""What a decision may ask of a model, told before any work is done.

Legend: E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.checkpoint.names import config_groups, config_top_k
from moekit.compress.engine.outcome import LayerDecision
from moekit.errors import BadConfig


def check_layers(decisions: Mapping[int, LayerDecision], counts: Mapping[int, int], file: Path | None = None) -> None:
    """Refuse decisions that do not name each MoE layer and only experts that it has.

    Args:
        decisions: by decoder layer.
        counts: decoder layer -> E.
        file: for the message.

    Raises:
        BadConfig: naming layer and expert.
    """
    for layer in decisions:
        if layer not in counts:
            raise BadConfig(
                f"the decision names a layer that holds no routed experts; there are {_span(counts)}",
                file=file,
                layer=layer,
                hint="it was made for another model",
            )
    missing = [layer for layer in counts if layer not in decisions]
    if missing:
        raise BadConfig(
            f"the decision says nothing of {len(missing)} MoE layers: {_span(dict.fromkeys(missing, 0))}",
            file=file,
            layer=missing[0],
            hint="name all experts of a layer that is to stay as it is",
        )
    for layer, decision in decisions.items():
        experts = counts[layer]
        if decision.keep[0] < 0 or decision.keep[-1] >= experts:
            wrong = decision.keep[0] if decision.keep[0] < 0 else decision.keep[-1]
            raise BadConfig(
                f"there are experts 0 to {experts - 1}, at most {experts} can be kept",
                file=file,
                layer=layer,
                expert=wrong,
                hint="it was made for another model",
            )


def _span(layers: Mapping[int, int]) -> str:
    found = sorted(layers)
    runs: list[list[int]] = []
    for layer in found:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def check_top_k(decisions: Mapping[int, LayerDecision], top_k: int, file: Path | None = None) -> None:
    """Refuse layers that keep fewer experts than a token chooses.

    Raises:
        BadConfig: naming the layer and the nearest legal values.
    """
    for layer, decision in decisions.items():
        if len(decision.keep) < top_k:
            raise BadConfig(
                f"{len(decision.keep)} experts would stay, but each token chooses {top_k}",
                file=file,
                layer=layer,
                hint=f"keep at least {top_k}, or let tokens choose fewer (top_k={len(decision.keep)})",
            )


def check_even(decisions: Mapping[int, LayerDecision], file: Path | None = None) -> None:
    """Refuse layers that keep different numbers of experts where stock transformers must load the result.

    Raises:
        BadConfig: naming the counts.
    """
    kept = {layer: len(decision.keep) for layer, decision in decisions.items()}
    if len(set(kept.values())) > 1:
        least, most = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
        raise BadConfig(
            f"layers would keep {kept[least]} (layer {least}) to {kept[most]} (layer {most}) experts, and stock "
            "transformers knows one number for all",
            file=file,
            hint="give every layer the same budget, or do without stock loading: moekit.load opens uneven checkpoints",
        )


def check_groups(
    decisions: Mapping[int, LayerDecision],
    counts: Mapping[int, int],
    config: Mapping[str, Any],
    top_k: int | None = None,
    file: Path | None = None,
) -> None:
    """Refuse decisions that do not keep equally many experts of each routing group.

    Args:
        decisions: by decoder layer.
        counts: decoder layer -> E.
        config: parsed config.json.
        top_k: K from now on; None as the config says.
        file: for the message.

    Raises:
        BadConfig: naming the layer and what each group would keep.
    """
    groups, allowed = config_groups(config)
    if groups <= 1:
        return
    chosen = top_k or config_top_k(config) or 1
    for layer, decision in decisions.items():
        size = counts[layer] // groups
        kept = [sum(expert // size == group for expert in decision.keep) for group in range(groups)]
        if len(set(kept)) > 1:
            raise BadConfig(
                f"the {groups} routing groups would keep {kept} experts, and groups must be equal",
                file=file,
                layer=layer,
                hint='keep equally many of each group, or route without groups (groups="free")',
            )
        if kept[0] * allowed < chosen:
            raise BadConfig(
                f"a token may choose from {allowed} groups, which would hold {kept[0] * allowed} experts, fewer "
                f"than the {chosen} it chooses",
                file=file,
                layer=layer,
                hint=f'keep at least {-(-chosen // allowed)} of each group, or route without groups (groups="free")',
            )
