"""Experts that stay packed integers in memory and are computed from there.

Legend: T tokens, n tokens of one expert, K choices a token, E experts, S stored experts, H hidden, I expert width, R
rows (outputs) and C columns (inputs) of a matrix, G groups of columns, N words of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moekit.anatomy.storage import Storage, activation_of
from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.experts.kernels import product
from moekit.experts.packing import PACKED_PARTS, PackedPart, Stored, computable, stored
from moekit.experts.reference import by_own_code
from moekit.runtime.experts import ExpertsInputs, ExpertsPart

# Up to so many tokens a pass reads weights rather than computes with them.
FEW = 16
# (inputs [n, C], parts of the same inputs) -> their outputs behind each other
Linear = Callable[..., Tensor]


@register(
    name="packed",
    kind="experts",
    changes="runtime",
    stock=False,
    limits=(
        "`moekit export --to packed` writes the folders that it computes; alone it changes nothing.",
        "Stock transformers and vLLM refuse the folder: export to compressed-tensors, auto-round or gguf for them.",
        "More than 16 tokens at once are computed with one expert's weights unpacked after the other.",
        "Experts are frozen: a model in training mode is refused.",
    ),
)
class Packed(ExpertsPart):
    """Compute experts from packed integers, 1 to 8 bits, each matrix with a width and each group with a scale.

    y = sum over a token's choices of g_i W_down (act(W_gate x) * W_up x), where W = number times scale and is never
    held in floats for more than one matrix at a time. Up to 16 tokens a pass is bound by the bytes that it reads: there
    torch's kernels multiply the integers themselves, as `moekit.experts.kernels` tells.
    Choose it by exporting a rounded model (`moekit export --to packed`), to hold and decode a MoE in a fraction of its
    bytes.
    """

    axes: ClassVar[Mapping[str, str]] = {
        "slot": "E",
        **{f"{part}_bits": "S" for part in PACKED_PARTS},
        **{f"{part}_words": "N" for part in PACKED_PARTS},
        **{f"{part}_scales": "SRG" for part in PACKED_PARTS},
    }
    in_shards: ClassVar[bool] = True

    kernel: Literal["auto", "none"] = Field(
        default="auto",
        description="auto: up to 16 tokens by torch's products with integers (moekit.experts.kernels), which round "
        "activations and hold the integers of experts that were chosen a second time, in layouts of their own; none: "
        "weights unpacked in the model's dtype always",
    )

    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """The experts from their integers; the model's own where the layer has none.

        Raises:
            BadConfig: the model is in training mode.
        """
        if "slot" not in inputs.constants:
            return inputs.run(inputs.hidden_TH, inputs.index_TK, inputs.weights_TK)
        if inputs.module.training and torch.is_grad_enabled():
            raise BadConfig(
                "packed experts are not trained",
                layer=inputs.layer,
                hint="train the model that it was exported from, or load it with parts=False, which unpacks it",
            )
        few = self.kernel == "auto" and len(inputs.hidden_TH) <= FEW and inputs.hidden_TH.device.type == "cpu"
        return _summed(inputs, inputs.hidden_TH, fast=few)

    def reference(self, inputs: ExpertsInputs) -> Tensor:
        """The same, token by token and choice by choice, with weights unpacked in fp32."""
        if "slot" not in inputs.constants:
            return by_own_code(inputs)
        storage = computable(inputs.module, inputs.layer)
        total_TH = torch.zeros_like(inputs.hidden_TH, dtype=torch.float32)
        for token, (index_K, weights_K) in enumerate(zip(inputs.index_TK.tolist(), inputs.weights_TK, strict=True)):
            for expert, weight in zip(index_K, weights_K.float(), strict=True):
                if expert >= inputs.geometry.experts:
                    continue
                x_1H = inputs.hidden_TH[token : token + 1].float()
                x_1H = x_1H * weight if inputs.geometry.weighs_inputs else x_1H
                y_1H = _expert(inputs, storage, x_1H, _unpacking(inputs, expert))
                total_TH[token] += y_1H[0] * (1 if inputs.geometry.weighs_inputs else weight)
        return total_TH


def _summed(inputs: ExpertsInputs, hidden_TH: Tensor, fast: bool) -> Tensor:
    """Each chosen expert once, on the tokens that chose it."""
    storage = computable(inputs.module, inputs.layer)
    total_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
    for expert in sorted(set(inputs.index_TK.flatten().tolist())):
        if expert >= inputs.geometry.experts:
            continue
        token_n, choice_n = (inputs.index_TK == expert).nonzero(as_tuple=True)
        weight_n1 = inputs.weights_TK[token_n, choice_n, None]
        given_nH = hidden_TH[token_n]
        given_nH = given_nH * weight_n1 if inputs.geometry.weighs_inputs else given_nH
        linear = _multiplying(inputs, expert) if fast else _unpacking(inputs, expert)
        output_nH = _expert(inputs, storage, given_nH, linear).float()
        output_nH = output_nH if inputs.geometry.weighs_inputs else output_nH * weight_n1.float()
        total_TH.index_add_(0, token_n, output_nH)
    return total_TH.to(hidden_TH.dtype)


def _expert(inputs: ExpertsInputs, storage: Storage, given_nH: Tensor, linear: Linear) -> Tensor:
    """Down (act (gate x) * up x), without a gate down (act (up x))."""
    module: Any = inputs.module
    if "gate_words" in inputs.constants:
        gate_nI, up_nI = linear(given_nH, "gate", "up").chunk(2, dim=1)
        if hasattr(module, "_apply_gate"):  # a family's own: some clamp, some add
            pair = (gate_nI, up_nI)
            inner_nI = module._apply_gate(
                torch.cat(pair, dim=1) if storage.concatenated else torch.stack(pair, dim=2).flatten(1)
            )
        else:
            inner_nI = _activation(inputs, storage)(gate_nI) * up_nI
    else:
        inner_nI = _activation(inputs, storage)(linear(given_nH, "up"))
    output_nH = linear(inner_nI, "down")
    return module.post_expert_norm(output_nH) if getattr(module, "has_post_expert_norm", False) else output_nH


def _activation(inputs: ExpertsInputs, storage: Storage) -> Callable[[Tensor], Tensor]:
    found = activation_of(inputs.module, storage)
    assert found is not None  # see `computable`
    return found


def _unpacking(inputs: ExpertsInputs, expert: int) -> Linear:
    """By weights that are unpacked for this one product, in the dtype of what they are given."""
    slot = int(inputs.constants["slot"][expert])

    def linear(given_nC: Tensor, *parts: PackedPart) -> Tensor:
        made = [
            nn.functional.linear(given_nC, one.weights().to(given_nC.dtype)) for one in _stored(inputs, slot, parts)
        ]
        return made[0] if len(made) == 1 else torch.cat(made, dim=1)

    return linear


def _multiplying(inputs: ExpertsInputs, expert: int) -> Linear:
    """By torch's kernels where there is one for a matrix."""
    slot, plain = int(inputs.constants["slot"][expert]), _unpacking(inputs, expert)

    def linear(given_nC: Tensor, *parts: PackedPart) -> Tensor:
        by_kernel = product(inputs.constants[f"{parts[0]}_words"], slot, lambda: list(_stored(inputs, slot, parts)))
        return plain(given_nC, *parts) if by_kernel is None else by_kernel(given_nC)

    return linear


def _stored(inputs: ExpertsInputs, slot: int, parts: Sequence[PackedPart]) -> Iterator[Stored]:
    for part in parts:
        yield stored(inputs.constants, part, slot, inputs.geometry.width if part == "down" else inputs.geometry.hidden)
