"""What a layer of factored experts learns, and one expert that computes with it.

Legend: T tokens, n tokens of one expert, E experts, H hidden, O outputs and J inputs of a matrix, R rank, N rows that
are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.storage import Part
from moekit.experts.factors import applied, joined
from moekit.experts.split import SplitExpert, find_known, one_expert
from moekit.runtime.experts import ExpertsInputs

MATRICES: tuple[Part, ...] = ("gate", "up", "down")


class Factors(nn.Module):
    """What one layer learns: parameters by the names of `Factored.axes`, and each row's score while it trains."""

    def __init__(self, parameters: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone()))
        for name, tensor in scores.items():
            self.register_buffer(name, tensor)

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = getattr(self, name)
        return found

    @property
    def matrices(self) -> tuple[Part, ...]:
        """Those that an expert has."""
        return tuple(part for part in MATRICES if f"{part}_right" in self)

    @property
    def residuals(self) -> dict[str, nn.Parameter]:
        """Part -> Z [E, O, J], while it is whole."""
        return {part: self.get_parameter(f"{part}_rest") for part in self.matrices if f"{part}_rest" in self}

    @property
    def nbytes(self) -> int:
        """Bytes of what is learned, scores left out."""
        return sum(p.nbytes for p in self.parameters())


@dataclass(frozen=True, eq=False)
class FactoredExpert(SplitExpert):
    """One expert that computes with factors; biases and activation are the module's own.

    Attributes:
        factors: of its layer.
        constants: of its layer, as `Factored.prepare` gives them.
        expert: its number.
    """

    factors: Factors
    constants: Mapping[str, Tensor]
    expert: int

    def pieces(self, part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(L [O, R], R [R, J], outputs that Z has rows of [N], these rows [N, J])."""
        learned, expert = self.factors, self.expert
        basis = self.constants.get("basis")
        left_OR = learned[f"{part}_left"][expert] if basis is None else learned[f"{part}_shared"][basis[expert]]
        right_RJ = learned[f"{part}_right"][expert]
        if f"{part}_rest" in learned:
            rest_OJ = learned[f"{part}_rest"][expert]
            return left_OR, right_RJ, torch.arange(len(rest_OJ), device=rest_OJ.device), rest_OJ
        own_N = self.constants[f"{part}_own"][slice(*self.constants[f"{part}_bounds"][expert : expert + 2].tolist())]
        return left_OR, right_RJ, self.constants[f"{part}_row"][own_N], learned[f"{part}_rows"][own_N]

    def linear(self, given: Tensor, part: Part) -> Tensor:
        """One projection, by its factors."""
        left_OR, right_RJ, row_N, rows_NJ = self.pieces(part)
        if len(row_N) == len(left_OR) and f"{part}_rest" in self.factors:  # all rows, in their order
            whole = (given @ right_RJ.to(given.dtype).T) @ left_OR.to(given.dtype).T
            output = whole + given @ rows_NJ.to(given.dtype).T
        else:
            output = applied(given, left_OR, right_RJ, row_N, rows_NJ)
        bias = self.matrix(part, bias=True)
        return output if bias is None else output + bias.to(output.dtype)


class WholeExpert(FactoredExpert):
    """The same from the whole matrix."""

    def linear(self, given: Tensor, part: Part) -> Tensor:
        """One projection, by L R + Z in fp32."""
        bias = self.matrix(part, bias=True)
        return nn.functional.linear(given, joined(*self.pieces(part)), None if bias is None else bias.float())


def expert_with(
    cls: type[FactoredExpert],
    module: nn.Module,
    layer: int,
    factors: Factors,
    constants: Mapping[str, Tensor],
    expert: int,
) -> FactoredExpert:
    """An expert by number, from what a layer has learned and its prepared constants."""
    stock = one_expert(module, find_known(module, layer), dict(module.named_parameters()), expert)
    return cls(stock.module, stock.storage, stock.own, factors, constants, expert)


def dense(module: nn.Module, layer: int, expert: int) -> Iterator[tuple[Part, Tensor]]:
    """The matrices of one expert as the module stores them, [O, J]; views."""
    storage = find_known(module, layer)
    own = one_expert(module, storage, dict(module.named_parameters()), expert)
    for part in MATRICES:
        matrix = own.matrix(part) if part != "gate" or storage.has_gate else None
        if matrix is not None:
            yield part, matrix


def weighted_sum(cls: type[FactoredExpert], inputs: ExpertsInputs, hidden_TH: Tensor) -> Tensor:
    """The experts' weighted sum for every token, one expert after the other: [T, H]."""
    total_TH = torch.zeros_like(hidden_TH)
    learned: Any = inputs.learned
    for expert in torch.unique(inputs.index_TK).tolist():
        if expert == inputs.geometry.experts:
            continue
        rows_n, place_n = (inputs.index_TK == expert).nonzero(as_tuple=True)
        weight_n1 = inputs.weights_TK[rows_n, place_n, None].to(hidden_TH.dtype)
        given_nH = hidden_TH[rows_n]
        if inputs.geometry.weighs_inputs:
            given_nH = given_nH * weight_n1
        run = expert_with(cls, inputs.module, inputs.layer, learned, inputs.constants, expert)
        output_nH = run(given_nH, given_nH)
        if not inputs.geometry.weighs_inputs:
            output_nH = output_nH * weight_n1
        total_TH = total_TH.index_add(0, rows_n, output_nH.to(total_TH.dtype))
    return total_TH
