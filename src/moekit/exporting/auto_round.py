"""AutoRound's form, packed as GPTQ packs: a width for each matrix, read by transformers with `auto-round` installed.

A matrix [R, C] of whole numbers lies turned around: `qweight` [C b / 32, R], numbers plus 2^(b-1) in words along the
inputs, without gaps at any width; `scales` [C / group, R] in float16; `qzeros` [C / group, R b / 32] holds the zero
point less one, 2^(b-1) - 1, for every output. Names are the model's own: auto-round gives each expert a linear map of
its own before it reads them. Nothing but experts is announced: `block_name_to_quantize` lists their modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.quantized.running import pack_words, unpack_words
from moekit.compress.engine.grids import Grids
from moekit.compress.engine.shard_writer import Spec
from moekit.errors import BadConfig
from moekit.exporting.form import Form
from moekit.exporting.matrices import ExpertMatrix
from moekit.exporting.recovery import Recovered
from moekit.exporting.rounded import Planned

# Rows and columns come in so many.
_TOGETHER = 32


class AutoRound(Form):
    """Packed whole numbers of any width from 2 to 8 bits, matrix by matrix."""

    name: ClassVar[str] = "auto-round"
    renames: ClassVar[bool] = False

    def check(self, plan: Sequence[Planned], spared: Sequence[ExpertMatrix], grids: Grids) -> None:
        """Rows and columns must come in whole words, and in groups."""
        for entry in plan:
            rows, columns = entry.matrix.shape
            if rows % _TOGETHER or columns % _TOGETHER:
                raise BadConfig(
                    f"the {entry.matrix.part} projection of {rows} x {columns} is no multiple of {_TOGETHER}, which "
                    "auto-round reads",
                    layer=entry.matrix.layer,
                    expert=entry.matrix.expert,
                    hint="--to compressed-tensors holds any size",
                )

    def specs(self, planned: Planned, grids: Grids) -> list[Spec]:
        """Words, zero points and scales."""
        stem, bits = module_name(planned), _held(planned)
        rows, columns = planned.matrix.shape
        groups = columns // (grids.group or columns)
        return [
            Spec(f"{stem}.qweight", "I32", (columns // 32 * bits, rows)),
            Spec(f"{stem}.qzeros", "I32", (groups, rows // 32 * bits)),
            Spec(f"{stem}.scales", "F16", (groups, rows)),
        ]

    def pack(self, planned: Planned, found: Recovered) -> dict[str, Tensor]:
        """Inputs first."""
        stem, bits = module_name(planned), _held(planned)
        middle = 1 << (bits - 1)
        zeros_GR = torch.full(found.scale_RG.T.shape, middle - 1)
        return {
            f"{stem}.qweight": pack_words(found.numbers_RC + middle, bits).T.contiguous(),
            f"{stem}.qzeros": pack_words(zeros_GR, bits),
            f"{stem}.scales": found.scale_RG.T.half().contiguous(),
        }

    def unpack(self, planned: Planned, tensors: dict[str, Tensor]) -> Recovered:
        """Outputs first."""
        stem, bits = module_name(planned), _held(planned)
        rows, columns = planned.matrix.shape
        numbers_RC = unpack_words(tensors[f"{stem}.qweight"].T, bits, columns).to(torch.int16)
        zeros_GR = unpack_words(tensors[f"{stem}.qzeros"], bits, rows).to(torch.int16) + 1
        zeros_RC = zeros_GR.T.repeat_interleave(columns // len(zeros_GR), 1)
        return Recovered(numbers_RC - zeros_RC, tensors[f"{stem}.scales"].T.float())

    def readable(self, plan: Sequence[Planned]) -> bool:
        """Where the names of the linear maps are those of the family's files, too."""
        return all(module_name(entry) == entry.matrix.name for entry in plan)

    def config(
        self, plan: Sequence[Planned], spared: Sequence[ExpertMatrix], grids: Grids, checkpoint: Checkpoint
    ) -> dict[str, Any]:
        """The commonest width for all, and the others by name."""
        common = Counter(_held(entry) for entry in plan).most_common(1)[0][0]
        scheme = {"group_size": grids.group or -1, "sym": True, "data_type": "int"}
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": common,
            **scheme,
            "block_name_to_quantize": list(dict.fromkeys(entry.matrix.live for entry in plan)),
            "extra_config": {
                module_name(entry): {"bits": _held(entry), **scheme} for entry in plan if _held(entry) != common
            },
        }


def module_name(planned: Planned) -> str:
    """Path of the linear map that auto-round makes of a matrix."""
    matrix = planned.matrix
    return f"{matrix.live}.{matrix.expert}.{matrix.part}_proj"


def _held(planned: Planned) -> int:
    """Bits of a number in the file: -1 and 1 lie in two."""
    return max(planned.bits, 2)
