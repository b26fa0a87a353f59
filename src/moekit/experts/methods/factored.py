"""Experts whose matrices are a low rank and a few rows more, W = L R + Z (MC-SMoE, arXiv:2310.01334).

A layer's factors take one of two forms. While it trains, Z is whole, with a score for each of its rows; once it has
trained, the rows that are zero are gone, and two lists of numbers say which expert and which output each of the others
belongs to. L may be one for several experts, whose R then are what tells them apart (`basis`).

Legend: T tokens, n tokens of one expert, E experts, P bases, H hidden, I expert width, O outputs and J inputs of a
matrix, R rank, N rows that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moekit.anatomy.probe import Geometry
from moekit.anatomy.storage import Part
from moekit.catalogue import register
from moekit.checkpoint.hollow import is_hollow
from moekit.errors import BadConfig, NumericFault
from moekit.experts.factored_expert import (
    MATRICES,
    FactoredExpert,
    Factors,
    WholeExpert,
    dense,
    expert_with,
    weighted_sum,
)
from moekit.experts.factors import factorize, joined, share_basis
from moekit.experts.split import find_known
from moekit.runtime.experts import ExpertsInputs, ExpertsPart
from moekit.runtime.part import LayerInit
from moekit.runtime.slots import PartOnLayer


def _axes() -> dict[str, str]:
    found = {"basis": "E"}
    for part in MATRICES:
        out, into = ("H", "I") if part == "down" else ("I", "H")
        found |= {f"{part}_left": f"E{out}R", f"{part}_shared": f"P{out}R", f"{part}_right": f"ER{into}"}
        found |= {f"{part}_rest": f"E{out}{into}", f"{part}_score": f"E{out}"}
        found |= {f"{part}_rows": f"N{into}", f"{part}_owner": "N->E", f"{part}_row": "N"}
    return found


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
        nothing = any(is_hollow(matrix) for _, matrix in dense(init.module, init.layer, 0))
        if nothing or any(name.endswith("_owner") for name in init.constants):
            return self._room(init)
        matrices: dict[Part, list[Tensor]] = {}
        for expert in range(init.geometry.experts):
            for part, weight in dense(init.module, init.layer, expert):
                if not bool(weight.isfinite().all()):
                    raise NumericFault(
                        f"{part} holds NaN or infinity", layer=init.layer, expert=expert, hint="see `moekit check`"
                    )
                matrices.setdefault(part, []).append(weight)
        basis = init.constants.get("basis")
        tensors: dict[str, Tensor] = {}
        for part, weights in matrices.items():
            if basis is None:
                made = [torch.stack(each) for each in zip(*(factorize(w, self.rank) for w in weights), strict=True)]
            else:
                made = list(share_basis(weights, basis.tolist(), self.rank))
            names = ("left" if basis is None else "shared", "right", "rest")
            tensors |= {f"{part}_{name}": tensor for name, tensor in zip(names, made, strict=True)}
        scores = {
            f"{part}_score": torch.zeros(tensors[f"{part}_rest"].shape[:2], device=tensors[f"{part}_rest"].device)
            for part in matrices
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
            if is_hollow(held):
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._parameters[leaf] = nn.Parameter(torch.zeros_like(held).contiguous())
        assert isinstance(on.learned, Factors)
        for expert in range(on.geometry.experts):
            own = expert_with(FactoredExpert, module, on.layer, on.learned, constants, expert)
            for part, matrix_OJ in dense(module, on.layer, expert):
                matrix_OJ.copy_(joined(*own.pieces(part)))

    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """Expert by expert, by their factors."""
        return weighted_sum(FactoredExpert, inputs, inputs.hidden_TH)

    def reference(self, inputs: ExpertsInputs) -> Tensor:
        """The same by whole matrices in fp32."""
        return weighted_sum(WholeExpert, inputs, inputs.hidden_TH.float())


def _outside(row_N: Tensor, outputs: int, owner_N: Tensor) -> bool:
    return bool(((row_N < 0) | (row_N >= outputs) | (owner_N < 0)).any())
