"""Why a model's MoE layers cannot be given: it does not follow a text, or holds no experts that are known."""

from __future__ import annotations

import inspect

from torch import nn

from moekit.checkpoint.names import stated_experts
from moekit.errors import UnsupportedModel


def refuse_second_text(model: nn.Module) -> None:
    """Refuse what reads a text and fills another one at once: experts and logits are not of the first alone.

    Raises:
        UnsupportedModel: the model is given a second text, and is no encoder with a decoder.
    """
    config, own = getattr(model, "config", None), inspect.signature(model.forward).parameters
    if not {"input_ids", "decoder_input_ids"} <= own.keys() or getattr(config, "is_encoder_decoder", False):
        return
    raise UnsupportedModel(
        f"{type(model).__name__} does not continue a text token by token: it fills a second one at once "
        "(decoder_input_ids) with the experts that read the first, and its logits are of the second",
        hint="moekit check, estimate, reshard and undo work on it; what follows a text through its experts (profile, "
        "prune, merge, route, place, sparsify, quantize, train) does not",
    )


def no_experts(model: nn.Module) -> UnsupportedModel:
    """Why there are none: a dense model, or a Mixture of Experts of another kind."""
    name = type(model).__name__
    if is_dense(model):
        return UnsupportedModel(
            f"{name} is not a Mixture of Experts: no module has `num_experts` and weights of as many experts",
            hint="`moekit convert` turns a dense Llama-type model into a MoE",
        )
    counting = _counting(model)
    where = f"{counting!r} keeps them" if counting is not None else "they lie"
    return UnsupportedModel(
        f"{name} is a Mixture of Experts, but {where} in a form that moekit does not know: not as weights of one "
        "gated or plain network for each expert",
        hint="moekit check, estimate, reshard, train, generate and undo work on it; what looks at single experts "
        "(profile, prune, merge, route, place, sparsify, quantize) does not",
    )


def is_dense(model: nn.Module) -> bool:
    """Whether neither a module nor the config counts experts; `find_moe_layers` may know no form of those counted."""
    describe = getattr(getattr(model, "config", None), "to_dict", None)
    count = stated_experts(describe()) if describe is not None else None
    return _counting(model) is None and (count or 0) <= 1


def _counting(model: nn.Module) -> str | None:
    """A module that states how many experts there are."""
    return next((n for n, m in model.named_modules() if isinstance(getattr(m, "num_experts", None), int)), None)
