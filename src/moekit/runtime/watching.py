"""Watch experts whose block does not call them with hidden states, indices and weights.

What tokens chose is read from what the block's chooser answers (`moekit.anatomy.choices`); a part that watches is shown
it there, and what it gives back is left aside: the block runs as it is.

Legend: T tokens, K choices a token, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.anatomy.choices import read_choices
from moekit.anatomy.probe import MoELayer
from moekit.anatomy.storage import expert_of
from moekit.errors import UnsupportedModel
from moekit.runtime.experts import ExpertsInputs, TransientPart

# Shown (hidden [T, H], indices [T, K], weights [T, K]).
Shown = Callable[[Tensor, Tensor, Tensor], None]


def refuse_unseen(layer: MoELayer, file: Path | None = None) -> None:
    """Refuse a layer of which nothing tells what tokens choose, or whose experts do not run what is chosen.

    Args:
        layer: with or without weights.
        file: for the message.

    Raises:
        UnsupportedModel: why it cannot be traced.
    """
    if layer.seam == "misread":
        raise UnsupportedModel(
            f"transformers {transformers.__version__} does not run the experts that their router chooses: asked about "
            f"random rows, {layer.experts_name!r} does not give the sum of what the chosen ones give",
            file=file,
            layer=layer.index,
            hint="what is traced or measured would not hold of the model as it was trained: take a release that runs "
            "the chosen experts, or prune by a method that looks at no text (--method random --no-proof)",
        )
    if layer.seam == "unknown" or (layer.seam != "experts" and layer.chooser is None):
        raise UnsupportedModel(
            f"the block {layer.name!r} neither hands its choices to its experts nor has a router that tells them",
            file=file,
            layer=layer.index,
            hint="its routing cannot be traced; moekit check, estimate and reshard work on this model",
        )


def watch_choices(layer: MoELayer, show: Shown) -> RemovableHandle:
    """Show what tokens choose in every pass, where the chooser's answer tells it.

    Args:
        layer: one whose seam is not "experts".
        show: is shown it.

    Raises:
        UnsupportedModel: nothing tells it.
    """
    chooser = layer.chooser
    refuse_unseen(layer)
    if layer.seam == "experts" or chooser is None:
        raise UnsupportedModel(f"the block {layer.name!r} hands its choices to its experts", layer=layer.index)
    experts, top_k = layer.geometry.experts, layer.geometry.top_k

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any], answer: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        hidden_TH = given.reshape(-1, given.shape[-1])
        index_TK, weights_TK = read_choices(layer.seam, answer, len(hidden_TH), experts, top_k)
        show(hidden_TH, index_TK, weights_TK)

    return chooser.register_forward_hook(see, with_kwargs=True)


def watch(layer: MoELayer, part: TransientPart) -> RemovableHandle:
    """Let a part that watches see the choices of a layer whose seam is not "experts".

    Raises:
        UnsupportedModel: the part does not only watch, or nothing tells the choices.
    """
    if not part.watches:
        raise UnsupportedModel(
            f"the block {layer.name!r} computes its experts itself: it does not call them with hidden states, indices "
            "and weights",
            layer=layer.index,
            hint="it can be traced (moekit profile), but its experts cannot be computed in another way",
        )

    def show(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        part.compute(
            ExpertsInputs(
                layer=part.layer,
                geometry=part.geometry,
                module=layer.experts,
                hidden_TH=hidden_TH,
                index_TK=index_TK,
                weights_TK=weights_TK,
                run=lambda h, i, w: each_alone(layer, h, i, w),
            )
        )

    return watch_choices(layer, show)


def each_alone(layer: MoELayer, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The experts' weighted sums [T, H] by the plain formula, one expert after the other; E is "no expert"."""
    output_TH = torch.zeros_like(hidden_TH)
    for expert in range(layer.geometry.experts):
        token_P, choice_P = (index_TK == expert).nonzero(as_tuple=True)
        if not len(token_P):
            continue
        weight_P1 = weights_TK[token_P, choice_P].unsqueeze(1)
        given = hidden_TH[token_P] * weight_P1 if layer.geometry.weighs_inputs else hidden_TH[token_P]
        made = expert_of(layer.experts, layer.storage, expert)(given)[1]
        output_TH.index_add_(0, token_P, made if layer.geometry.weighs_inputs else made * weight_P1)
    return output_TH
