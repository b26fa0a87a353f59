"""moekit's own packed form: any width from 1 to 8 bits for each matrix, computed as it lies by `moekit.load`.

See `moekit.checkpoint.quantized.packed_experts` for what lies in the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.quantized.packed_experts import LEAST_COLUMNS, announced, numbers_of, words_of
from moekit.checkpoint.quantized.running import word_count
from moekit.compress.engine.grids import Grids
from moekit.compress.engine.shard_writer import Spec
from moekit.errors import BadConfig
from moekit.exporting.form import Form
from moekit.exporting.matrices import ExpertMatrix
from moekit.exporting.recovery import Recovered
from moekit.exporting.rounded import Planned


class PackedForm(Form):
    """Whole numbers in words without gaps, one width a matrix."""

    name: ClassVar[str] = "packed"
    renames: ClassVar[bool] = True

    def check(self, plan: Sequence[Planned], spared: Sequence[ExpertMatrix], grids: Grids) -> None:
        """Rows must be so long that words tell the width of their numbers."""
        for entry in plan:
            if entry.matrix.shape[1] < LEAST_COLUMNS:
                raise BadConfig(
                    f"rows of {entry.matrix.shape[1]} weights are shorter than {LEAST_COLUMNS}",
                    layer=entry.matrix.layer,
                    expert=entry.matrix.expert,
                    hint="--to compressed-tensors holds any size",
                )

    def specs(self, planned: Planned, grids: Grids) -> list[Spec]:
        """Words and scales."""
        matrix = planned.matrix
        rows, columns = matrix.shape
        return [
            Spec(f"{matrix.name}.weight_packed", "I32", (rows, word_count(columns, planned.bits))),
            Spec(f"{matrix.name}.weight_scale", "BF16", (rows, columns // (grids.group or columns))),
        ]

    def pack(self, planned: Planned, found: Recovered) -> dict[str, Tensor]:
        """Scales of symmetric grids have eight significant bits: bfloat16 holds them as they are."""
        stem = planned.matrix.name
        return {
            f"{stem}.weight_packed": words_of(found.numbers_RC, planned.bits),
            f"{stem}.weight_scale": found.scale_RG.bfloat16(),
        }

    def unpack(self, planned: Planned, tensors: dict[str, Tensor]) -> Recovered:
        """Numbers and scales out of words."""
        stem = planned.matrix.name
        numbers_RC = numbers_of(tensors[f"{stem}.weight_packed"], planned.bits, planned.matrix.shape[1])
        return Recovered(numbers_RC.to(torch.int16), tensors[f"{stem}.weight_scale"].float())

    def config(
        self, plan: Sequence[Planned], spared: Sequence[ExpertMatrix], grids: Grids, checkpoint: Checkpoint
    ) -> dict[str, Any]:
        """Columns of every projection; bits follow from the words."""
        columns = {entry.matrix.name.rpartition(".")[2]: entry.matrix.shape[1] for entry in plan}
        return announced(grids.group, columns)
