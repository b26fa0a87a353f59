"""Experts whose matrices are a low rank and a few rows more, W = L R + Z (MC-SMoE, arXiv:2310.01334).

A layer's factors take one of two forms. While it trains, Z is whole, with a score for each of its rows; once it has
trained, the rows that are zero are gone, and two lists of numbers say which expert and which output each of the others
belongs to. L may be one for several experts, whose R then are what tells them apart (`basis`).

Legend: T tokens, n tokens of one expert, E experts, P bases, H hidden, I expert width, O outputs and J inputs of a
matrix, R rank, N rows that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moekit.anatomy.probe import Geometry
from moekit.anatomy.storage import Part
from moekit.catalogue import register
from moekit.checkpoint.left_out import is_nothing
from moekit.errors import BadConfig, NumericFault
from moekit.experts.factors import applied, factorize, joined
from moekit.experts.split import SplitExpert, find_known, one_expert
from moekit.runtime.experts import ExpertsInputs, ExpertsPart
from moekit.runtime.part import LayerInit
from moekit.runtime.slots import PartOnLayer

MATRICES: tuple[Part, ...] = ("gate", "up", "down")


def _axes() -> dict[str, str]:
    found = {"basis": "E"}
    for part in MATRICES:
        out, into = ("H", "I") if part == "down" else ("I", "H")
        found |= {f"{part}_left": f"E{out}R", f"{part}_shared": f"P{out}R", f"{part}_right": f"ER{into}"}
        found |= {f"{part}_rest": f"E{out}{into}", f"{part}_score": f"E{out}"}
        found |= {f"{part}_rows": f"N{into}", f"{part}_owner": "N->E", f"{part}_row": "N"}
    return found


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


@register(
    name="factored",
    kind="experts",
    paper="arXiv:2310.01334",
    changes="runtime",
    stock=False,
    limits=(
        "Bytes are saved by the rows that training drops: a residual that is whole is larger than the matrix it is of.",
        "The shards keep the product as whole matrices unless `dense` is false: then other engines open the folder and "
        "compute the same, and it is larger, not smaller, than it was. Both sizes are told.",
        "Experts run one by one, in one process: slower than grouped kernels.",
        "Where single rows are worth as much as others, a low rank and a tenth of the rows lose what slimming to as "
        "many bytes would not: compare.",
    ),
)
class Factored(ExpertsPart):
    """Hold each expert's matrices as W = L R + Z: a low rank, and the few output rows of the rest that matter.

    L R is the best approximation of a rank to start with, Z the rest, whole, so that nothing changes. Training moves L,
    R and Z; after each step a row of Z scores mean |z dLoss/dz|, smoothed over steps, and of all rows of all experts
    and layers together only a share of the best stays: all of them during the warm-up, then fewer along a cubic, and
    `keep` in the end. Rows that are zero when training is over are dropped. Choose it with `moekit train --experts`,
    best with a teacher (`--kd`), where experts are to be stored small and their neurons matter as they are.
    """

    axes: ClassVar[Mapping[str, str]] = _axes()

    rank: int = Field(default=32, ge=1, description="rank of L R, for every matrix")
    keep: float = Field(default=0.1, ge=0, le=1, description="share of the rows of Z that is left in the end")
    after: float = Field(default=0.04, ge=0, lt=1, description="share of the run during which all rows stay")
    until: float = Field(default=0.84, gt=0, le=1, description="share of the run at which only `keep` is left")
    memory: float = Field(default=0.85, ge=0, lt=1, description="of a row's score, from one step to the next")

    dense: bool = Field(
        default=True,
        description="keep whole matrices in the shards, too, so that other engines open the folder; without them it is "
        "as small as its factors, and moekit.load alone opens it",
    )

    @property
    def leaves_out(self) -> bool:
        """Without whole matrices."""
        return not self.dense

    @model_validator(mode="after")
    def _forwards(self) -> Factored:
        if self.until <= self.after:
            raise ValueError(f"rows would be gone at {self.until}, before they begin to go at {self.after}")
        return self

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[Factored]:
        """A quarter of the rank, without whole matrices in a checkpoint, and all of it."""
        most = min(geometry.hidden, geometry.width)
        return [cls(rank=max(1, most // 4), dense=False), cls(rank=most, keep=0.5)]

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse a rank that these matrices do not have."""
        most = min(geometry.hidden, geometry.width)
        if self.rank > most:
            raise BadConfig(
                f"matrices of {geometry.width} x {geometry.hidden} have no rank of {self.rank}",
                layer=layer,
                hint=f"rank may be 1 to {most}; factors are smaller than a matrix below "
                f"{geometry.width * geometry.hidden // (geometry.width + geometry.hidden)}",
            )

    def prepare(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """Each expert's rows behind each other: their places, and where each expert's begin.

        Raises:
            BadConfig: a list lacks its other, or names an output that there is not.
        """
        made = {name: tensor.long() for name, tensor in tensors.items()}
        for part in MATRICES:
            owner_N, row_N = made.pop(f"{part}_owner", None), made.get(f"{part}_row")
            if owner_N is None and row_N is None:
                continue
            outputs = geometry.hidden if part == "down" else geometry.width
            if owner_N is None or row_N is None or owner_N.shape != row_N.shape or _outside(row_N, outputs, owner_N):
                raise BadConfig(f"the rows of {part} are numbered wrongly", hint="the part's tensors are damaged")
            made[f"{part}_own"] = owner_N.argsort(stable=True)
            counts_E = torch.bincount(owner_N, minlength=geometry.experts)
            made[f"{part}_bounds"] = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])
        return made

    def parameters(self, init: LayerInit) -> Factors:
        """Factors of the experts as they are; where constants say which rows there are, room for these.

        Raises:
            UnsupportedModel: the experts' projections cannot be computed one by one.
            NumericFault: an expert's weights hold NaN or infinity; names it.
        """
        if init.constants or any(is_nothing(matrix) for _, matrix in dense(init.module, init.layer, 0)):
            return self._room(init)
        found: dict[str, list[Tensor]] = {}
        for expert in range(init.geometry.experts):
            for part, weight in dense(init.module, init.layer, expert):
                try:
                    made = factorize(weight, self.rank)
                except NumericFault as error:
                    raise NumericFault(error.message, layer=init.layer, expert=expert, hint=error.hint) from error
                for name, tensor in zip(("left", "right", "rest"), made, strict=True):
                    found.setdefault(f"{part}_{name}", []).append(tensor)
        tensors = {name: torch.stack(parts) for name, parts in found.items()}
        scores = {
            f"{name.removesuffix('_rest')}_score": torch.zeros(tensor.shape[:2], device=tensor.device)
            for name, tensor in tensors.items()
            if name.endswith("_rest")
        }
        return Factors(tensors, scores)

    def _room(self, init: LayerInit) -> Factors:
        """Zeros of the sizes that constants name, or of whole residuals, to be filled with what was learned."""
        geometry, constants = init.geometry, init.constants
        like = next(init.module.parameters())
        sizes = {"H": geometry.hidden, "I": geometry.width, "E": geometry.experts, "R": self.rank}
        if "basis" in constants:
            sizes["P"] = int(constants["basis"].max()) + 1
        found: dict[str, Tensor] = {}
        for part in MATRICES if geometry.has_gate else MATRICES[1:]:
            names = ["shared" if "basis" in constants else "left", "right"]
            if f"{part}_owner" in constants:
                sizes["N"] = len(constants[f"{part}_owner"])
                names.append("rows")
            else:
                names += ["rest", "score"]
            for name in names:
                shape = [sizes[letter] for letter in self.axes[f"{part}_{name}"]]
                kind = torch.float32 if name == "score" else like.dtype
                found[f"{part}_{name}"] = torch.zeros(shape, dtype=kind, device=like.device)
        scores = {name: tensor for name, tensor in found.items() if name.endswith("_score")}
        return Factors({name: tensor for name, tensor in found.items() if name not in scores}, scores)

    def give_back(self, on: PartOnLayer, module: nn.Module) -> None:
        """Write L R + Z into the experts; where they hold nothing, into matrices of their own."""
        storage, constants = find_known(module, on.layer), on.common(None)["constants"]
        for name in (name for p in storage.projections if not p.bias for name in p.names):
            held = module.get_parameter(name)
            if is_nothing(held):
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._parameters[leaf] = nn.Parameter(torch.zeros_like(held).contiguous())
        assert isinstance(on.learned, Factors)
        for expert in range(on.geometry.experts):
            own = expert_with(FactoredExpert, module, on.layer, on.learned, constants, expert)
            for part, matrix_OJ in dense(module, on.layer, expert):
                matrix_OJ.copy_(joined(*own.pieces(part)))

    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """Expert by expert, by their factors."""
        return _weighted_sum(FactoredExpert, inputs, inputs.hidden_TH)

    def reference(self, inputs: ExpertsInputs) -> Tensor:
        """The same by whole matrices in fp32."""
        return _weighted_sum(WholeExpert, inputs, inputs.hidden_TH.float())


def _outside(row_N: Tensor, outputs: int, owner_N: Tensor) -> bool:
    return bool(((row_N < 0) | (row_N >= outputs) | (owner_N < 0)).any())


def dense(module: nn.Module, layer: int, expert: int) -> Iterator[tuple[Part, Tensor]]:
    """The matrices of one expert as the module stores them, [O, J]; views."""
    storage = find_known(module, layer)
    own = one_expert(module, storage, dict(module.named_parameters()), expert)
    for part in MATRICES:
        matrix = own.matrix(part) if part != "gate" or storage.has_gate else None
        if matrix is not None:
            yield part, matrix


def _weighted_sum(cls: type[FactoredExpert], inputs: ExpertsInputs, hidden_TH: Tensor) -> Tensor:
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
