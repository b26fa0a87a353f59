"""Configs that say another number of experts, or another width of them.

Legend: E experts, K choices a token.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from moekit.anatomy.probe import iterate_moe_layers
from moekit.checkpoint.names import EXPERT_COUNT_KEYS, TOP_K_KEYS, config_top_k
from moekit.checkpoint.skeleton import empty_model
from moekit.checkpoint.spec import KEYS, stated
from moekit.errors import BadConfig, UnsupportedModel

Groups = Literal["free", "equal"]


def resized_config(
    config: PreTrainedConfig,
    experts: int,
    *,
    top_k: int | None = None,
    groups: Groups = "free",
    dropped: bool | None = None,
    width: int | None = None,
) -> PreTrainedConfig:
    """A copy of a config with another number of experts.

    Args:
        config: of the model.
        experts: routed experts a layer from now on.
        top_k: choices a token from now on; None as before.
        groups: once experts are dropped, "free" lets tokens choose from all experts, "equal" keeps the router's limits
            to groups of neighbouring experts.
        dropped: whether any layer of the model loses experts; None where all layers get the same number.
        width: neurons of every routed expert from now on; None as before.

    Raises:
        BadConfig: fewer experts than choices, a number of choices that the family's router does not make, or groups
            that do not divide the experts or become too small for the router to score.
        UnsupportedModel: the config does not say how many experts there are.
    """
    made = copy.deepcopy(config)
    text: Any = stating_experts(made)
    own = text.to_dict()
    counts = [key for key in EXPERT_COUNT_KEYS if isinstance(own.get(key), int)]
    if not counts:
        raise UnsupportedModel(
            f"{type(config).__name__} names its number of experts by none of {', '.join(EXPERT_COUNT_KEYS)}"
        )
    before = own[counts[0]]
    if width is not None:
        _set_width(text, own, width)
    for key in counts:
        setattr(text, key, experts)
    choices = [key for key in TOP_K_KEYS if isinstance(own.get(key), int)]
    for key in choices:
        if top_k is not None:
            setattr(text, key, top_k)
    chosen = int(getattr(text, choices[0])) if choices else 1
    if chosen < 1:
        raise BadConfig(
            f"a token cannot choose {chosen} experts", hint=f"choose 1 to {experts} (--top-k, in Python top_k)"
        )
    if experts < chosen:
        raise BadConfig(
            f"{experts} experts would stay, but each token chooses {chosen}",
            hint=f"keep at least {chosen}, or let tokens choose fewer (--top-k {experts}, in Python top_k)",
        )
    if (experts != before) if dropped is None else dropped:
        _set_groups(made, text, experts, groups)
    if top_k is not None and top_k != (config_top_k(own) or 0):
        _check_choices(made, top_k)
    return made


def stating_experts(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that states the number of experts: of the language model, or one within (DBRX)."""
    text = config.get_text_config()
    inside = [value for value in vars(text).values() if isinstance(value, PreTrainedConfig)]
    stating = (c for c in (text, *inside) if any(isinstance(c.to_dict().get(key), int) for key in EXPERT_COUNT_KEYS))
    return next(stating, text)


def _set_width(text: Any, own: Mapping[str, Any], width: int) -> None:
    """Another width of routed experts; shared experts, whose width some families state in theirs, keep their own.

    Raises:
        BadConfig: wider than before, or the family cannot say both widths; names those that it can.
        UnsupportedModel: the config does not say how wide experts are.
    """
    known = stated(own, "width")
    if known is None:
        raise UnsupportedModel(
            f"{type(text).__name__} names the width of its experts by none of {', '.join(KEYS['width'])}"
        )
    key, before = known
    if width > before:
        raise BadConfig(f"experts of {before} neurons cannot become {width} wide", hint=f"ask for {before} or fewer")
    shared = stated(own, "shared")
    if shared is not None and shared[1] and stated(own, "shared_width") is None and width != before:
        whole = shared[1] * before
        if whole % width:
            fitting = [w for w in range(before, 0, -1) if whole % w == 0]
            near = min(fitting, key=lambda w: (abs(w - width), w))
            raise BadConfig(
                f"this family states the {whole} neurons of its shared experts as a multiple of the routed experts' "
                f"width, and {width} does not divide {whole}",
                hint=f"narrow to {near}, the nearest width that divides {whole}",
            )
        setattr(text, shared[0], whole // width)
    setattr(text, key, width)


def _check_choices(made: PreTrainedConfig, top_k: int) -> None:
    """Refuse a number of choices that the config can say, but the router does not make (PhiMoE's are always two)."""
    layer = next(iterate_moe_layers(skeleton_of(made)), None)
    if layer is not None and layer.router is not None and layer.geometry.top_k != top_k:
        raise BadConfig(
            f"this family's router always chooses {layer.geometry.top_k} experts, not {top_k}",
            hint=f"keep at least {layer.geometry.top_k} experts, and leave top_k as it is",
        )


def _set_groups(made: PreTrainedConfig, text: Any, experts: int, groups: Groups) -> None:
    count = getattr(text, "n_group", None)
    if not isinstance(count, int) or count < 1:
        return
    if groups == "free" and count > 1:
        count = text.n_group = text.topk_group = 1
    if experts % count:
        raise BadConfig(
            f"{experts} experts are not equally many in {count} routing groups",
            hint=f"keep a multiple of {count}, or route without groups (--groups free)",
        )
    if experts == count and any(layer.router is None for layer in iterate_moe_layers(skeleton_of(made))):
        # Some families score a group by its two best experts; asked on meta, their routers fail on smaller groups.
        raise BadConfig(
            "routing groups of a single expert would be left, too few for this family's router to score",
            hint=f"keep at least {2 * count}" + ("" if count == 1 else ", or route without groups (--groups free)"),
        )


@functools.lru_cache(maxsize=8)
def _skeleton(kind: Callable[..., PreTrainedConfig], text: str) -> PreTrainedModel:
    return empty_model(kind(json.loads(text)))


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights; shared, so only to be looked at."""
    values = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _skeleton(type(config).from_dict, values)
