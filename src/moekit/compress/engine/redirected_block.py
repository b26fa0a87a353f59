"""A block that computes what a smaller one with its runtime parts does, without parts: for measuring, layer by layer.

Parts live in whole models. Where one block runs beside others on the same inputs, a block of as many experts as before
stands in for it: by the plain sum over a token's choices the two are the same.

Legend: T tokens, K choices a token, E experts before, H hidden.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moekit.anatomy.probe import MoELayer
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.resize import resized_block
from moekit.compress.weights import LayerWeights
from moekit.trace.seam import read_arguments


@torch.no_grad()
def redirected_block(
    layer: MoELayer,
    config: PreTrainedConfig,
    before: LayerWeights,
    made: LayerWeights,
    outcome: LayerOutcome,
    novices_EH: Tensor | None = None,
) -> nn.Module:
    """A block of as many experts as before that computes what the smaller one with its parts does, for measuring.

    Each old expert's place holds the new one that takes its tokens; where nobody does it holds zeros, and a hook adds
    the constants.

    Args:
        layer: the block as it is.
        config: of its model, with the number of experts as it is.
        before: its weights.
        made: weights of the new experts.
        outcome: which of the old experts these are, and who takes whose tokens.
        novices_EH: constants by old expert.
    """
    table = outcome.redirect or ()
    nobody = [old for old, new in enumerate(table) if new is None]
    spread = made.select([new or 0 for new in table]).with_router(before.router)
    down_EHI, bias_EH = spread.down_EHI.clone(), spread.down_bias_EH
    down_EHI[nobody] = 0
    if bias_EH is not None:
        bias_EH = bias_EH.clone()
        bias_EH[nobody] = 0
    spread = dataclasses.replace(spread, down_EHI=down_EHI, down_bias_EH=bias_EH)
    block = resized_block(layer, config, spread, LayerOutcome(keep=tuple(range(len(table)))))
    if nobody and novices_EH is not None:
        kept = torch.ones(len(table), dtype=torch.bool)
        kept[nobody] = False
        constants_EH = novices_EH.float().masked_fill(kept[:, None], 0.0).to(down_EHI.device)
        below = layer.experts_name.removeprefix(layer.name).lstrip(".")
        block.get_submodule(below).register_forward_hook(_answering(layer, constants_EH), with_kwargs=True)
    return block


def _answering(layer: MoELayer, constants_EH: Tensor) -> Any:
    """A hook that adds gates times constants to what experts give."""

    def add(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        _, index_TK, weights_TK = read_arguments(layer, args, kwargs)
        gates_TE = weights_TK.float().new_zeros(len(index_TK), len(constants_EH) + 1)
        gates_TE = gates_TE.scatter_add(1, index_TK.long(), weights_TK.float())[:, :-1]
        return (output.float() + (gates_TE @ constants_EH).view_as(output)).to(output.dtype)

    return add
