"""What an outcome may ask of a model, told before any work is done.

Legend: E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.checkpoint.names import config_groups, config_top_k
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig, UnsupportedModel

_FREE = "route without groups (--groups free, in Python groups='free')"


def check_layers(outcomes: Mapping[int, LayerOutcome], counts: Mapping[int, int], file: Path | None = None) -> None:
    """Refuse outcomes that do not name each MoE layer and only experts that it has.

    Args:
        outcomes: by decoder layer.
        counts: decoder layer -> E.
        file: for the message.

    Raises:
        BadConfig: naming layer and expert.
    """
    for layer in outcomes:
        if layer not in counts:
            raise BadConfig(
                f"the outcome names a layer that holds no routed experts; there are {_span(counts)}",
                file=file,
                layer=layer,
                hint="it was made for another model",
            )
    missing = [layer for layer in counts if layer not in outcomes]
    if missing:
        raise BadConfig(
            f"the outcome says nothing of {len(missing)} MoE layers: {_span(dict.fromkeys(missing, 0))}",
            file=file,
            layer=missing[0],
            hint="name all experts of a layer that is to stay as it is",
        )
    for layer, outcome in outcomes.items():
        experts = counts[layer]
        if outcome.keep[0] < 0 or outcome.keep[-1] >= experts:
            wrong = outcome.keep[0] if outcome.keep[0] < 0 else outcome.keep[-1]
            raise BadConfig(
                f"there are experts 0 to {experts - 1}, at most {experts} can be kept",
                file=file,
                layer=layer,
                expert=wrong,
                hint="it was made for another model",
            )
        if outcome.redirect is not None and len(outcome.redirect) != experts:
            raise BadConfig(
                f"the outcome says where the tokens of {len(outcome.redirect)} experts go, and there are {experts}",
                file=file,
                layer=layer,
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


def check_top_k(outcomes: Mapping[int, LayerOutcome], top_k: int, file: Path | None = None) -> None:
    """Refuse layers that keep fewer experts than a token chooses.

    Raises:
        BadConfig: naming the layer and the nearest legal values.
    """
    for layer, outcome in outcomes.items():
        if len(outcome.keep) < top_k:
            raise BadConfig(
                f"{len(outcome.keep)} experts would stay, but each token chooses {top_k}",
                file=file,
                layer=layer,
                hint=f"keep at least {top_k}, or say --top-k {len(outcome.keep)} (in Python top_k)",
            )


def check_even(outcomes: Mapping[int, LayerOutcome], file: Path | None = None) -> None:
    """Refuse layers that keep different numbers of experts where stock transformers must load the result.

    Raises:
        BadConfig: naming the counts.
    """
    kept = {layer: len(outcome.keep) for layer, outcome in outcomes.items()}
    if len(set(kept.values())) > 1:
        least, most = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
        raise BadConfig(
            f"layers would keep {kept[least]} (layer {least}) to {kept[most]} (layer {most}) experts, and stock "
            "transformers knows one number for all",
            file=file,
            hint="give every layer the same budget, or do without stock loading: moekit.load opens uneven checkpoints",
        )


def check_stock(redirected: bool, file: Path | None = None) -> None:
    """Refuse what goes on choosing among old experts where stock transformers must load the result.

    Raises:
        BadConfig: it does.
    """
    if redirected:
        raise BadConfig(
            "the router goes on choosing among experts that are gone, which takes a routing policy of moekit: stock "
            "transformers would send their tokens to other experts",
            file=file,
            hint="leave --stock-only out (moekit.load attaches the policy), or let the router choose among the others "
            "(mone: --set operator=drop; merging: --set router=representative)",
        )


def check_groups(
    outcomes: Mapping[int, LayerOutcome],
    counts: Mapping[int, int],
    config: Mapping[str, Any],
    top_k: int | None = None,
    file: Path | None = None,
) -> None:
    """Refuse outcomes that do not keep equally many experts of each routing group.

    Args:
        outcomes: by decoder layer.
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
    for layer, outcome in outcomes.items():
        size = counts[layer] // groups
        kept = [sum(expert // size == group for expert in outcome.keep) for group in range(groups)]
        if len(set(kept)) > 1:
            raise BadConfig(
                f"the {groups} routing groups would keep {kept} experts, and groups must be equal",
                file=file,
                layer=layer,
                hint=f"keep equally many of each group (--groups equal), or {_FREE}",
            )
        if kept[0] * allowed < chosen:
            raise BadConfig(
                f"a token may choose from {allowed} groups, which would hold {kept[0] * allowed} experts, fewer "
                f"than the {chosen} it chooses",
                file=file,
                layer=layer,
                hint=f"keep at least {-(-chosen // allowed)} of each group, or {_FREE}",
            )


def common_width(outcomes: Mapping[int, LayerOutcome], file: Path | None = None) -> int | None:
    """The width that all layers get; None where they keep theirs.

    Raises:
        BadConfig: layers would get different widths.
        UnsupportedModel: an outcome asks for what the engine does not carry out.
    """
    for layer, outcome in outcomes.items():
        if outcome.shared_width is not None:
            raise UnsupportedModel(
                "the outcome narrows shared experts, and only routed ones are narrowed",
                file=file,
                layer=layer,
                hint="leave shared_width out",
            )
    widths = {layer: outcome.width for layer, outcome in outcomes.items()}
    if len(set(widths.values())) > 1:
        one, other = list(dict.fromkeys(widths.values()))[:2]
        layer = next(n for n, w in widths.items() if w == other)
        raise BadConfig(
            f"experts of this layer would be {other or 'as before'} wide, those of others {one or 'as before'}, "
            "and a config knows one width for all",
            file=file,
            layer=layer,
            hint="give all layers the same width",
        )
    return next(iter(widths.values()), None)


def check_made(made: LayerWeights, outcome: LayerOutcome, width: int, layer: int) -> None:
    """Refuse new weights that are not what an outcome says.

    Args:
        made: the new weights.
        outcome: of the layer.
        width: I of the layer before.
        layer: decoder layer.

    Raises:
        BadConfig: another number of experts, or another width.
    """
    if made.experts != outcome.experts:
        raise BadConfig(f"the rewriting gave {made.experts} experts, the outcome keeps {outcome.experts}", layer=layer)
    wanted = outcome.width or width
    if made.width != wanted:
        raise BadConfig(
            f"the rewriting gave experts of {made.width} neurons, the outcome says {wanted}",
            layer=layer,
            hint="say the width in the outcome",
        )
