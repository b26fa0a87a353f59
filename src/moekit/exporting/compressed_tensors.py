"""compressed-tensors, `pack-quantized`: what vLLM runs, and stock transformers reads as floats.

A matrix [R, C] of whole numbers from -2^(b-1) lies as `weight_packed` [R, C b / 32], the numbers plus 2^(b-1) in words,
lowest bits first, `weight_scale` [R, C / group] in the dtype of the weights, and `weight_shape`. One scheme holds for
all experts of a layer: vLLM asks the first one, and transformers takes the first group of the config for the whole
model, without a word where others are meant. So widths that differ are refused.

2, 4 and 8 bits are written. Of other widths two layouts are about: readers up to 0.17, vLLM's among them, take
32 // bits numbers a word, later ones run on into the next word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.quantized.running import pack_words, unpack_words, word_count
from moekit.compress.engine.grids import Grids
from moekit.compress.engine.shard_writer import Spec
from moekit.errors import BadConfig
from moekit.exporting.form import Form
from moekit.exporting.matrices import ExpertMatrix
from moekit.exporting.recovery import Recovered
from moekit.exporting.rounded import Planned

WIDTHS = (2, 4, 8)
_DTYPES = {short: getattr(torch, name.removeprefix("torch.")) for name, short in TORCH_NAMES.items()}


class CompressedTensors(Form):
    """Packed whole numbers, one width for all.

    Args:
        layers_differ: whether layers may have widths of their own, or stay in floats, which vLLM reads and
            transformers does not.
    """

    name: ClassVar[str] = "compressed-tensors"
    renames: ClassVar[bool] = True
    spares: ClassVar[bool] = True

    def __init__(self, layers_differ: bool = False) -> None:
        self.layers_differ = layers_differ

    def check(self, plan: Sequence[Planned], spared: Sequence[ExpertMatrix], grids: Grids) -> None:
        """One width a layer that all readers agree on, and one for all layers unless they may differ."""
        if spared and not self.layers_differ:
            raise BadConfig(
                "this layer was not rounded, and transformers reads no experts in floats beside packed ones",
                layer=spared[0].layer,
                hint="--layers-may-differ leaves it as it is, for vLLM, which does; or round all layers",
            )
        by_layer: dict[int, set[int]] = {}
        for entry in plan:
            by_layer.setdefault(entry.matrix.layer, set()).add(entry.bits)
        for layer, widths in by_layer.items():
            if len(widths) > 1:
                raise BadConfig(
                    f"matrices of {_listed(widths)} bits lie in one layer, and compressed-tensors holds one width",
                    layer=layer,
                    hint="--to auto-round holds a width for each matrix, --to gguf the widest of a layer; or share "
                    "bits among whole layers (moekit quantize --unit layer --choices 2,4,8)",
                )
            _check_width(widths, layer)
        every = set().union(*by_layer.values())
        if len(every) > 1 and not self.layers_differ:
            raise BadConfig(
                f"layers of {_listed(every)} bits: transformers would read all of them by the first one's width, in "
                "silence",
                hint="--layers-may-differ writes them for vLLM, which reads a width for each layer; --to auto-round "
                "holds a width for each expert",
            )

    def specs(self, planned: Planned, grids: Grids) -> list[Spec]:
        """Words, scales and shape."""
        matrix, bits = planned.matrix, _held(planned)
        rows, columns = matrix.shape
        return [
            Spec(f"{matrix.name}.weight_packed", "I32", (rows, word_count(columns, bits))),
            Spec(f"{matrix.name}.weight_scale", matrix.source.dtype, (rows, columns // (grids.group or columns))),
            Spec(f"{matrix.name}.weight_shape", "I64", (2,)),
        ]

    def pack(self, planned: Planned, found: Recovered) -> dict[str, Tensor]:
        """Numbers are stored with 2^(b-1) added."""
        matrix, bits = planned.matrix, _held(planned)
        return {
            f"{matrix.name}.weight_packed": pack_words(found.numbers_RC + (1 << (bits - 1)), bits),
            f"{matrix.name}.weight_scale": found.scale_RG.to(_DTYPES[matrix.source.dtype]),
            f"{matrix.name}.weight_shape": torch.tensor(matrix.shape),
        }

    def unpack(self, planned: Planned, tensors: dict[str, Tensor]) -> Recovered:
        """Numbers and scales out of words."""
        stem, bits = planned.matrix.name, _held(planned)
        columns = int(tensors[f"{stem}.weight_shape"][1])
        numbers_RC = unpack_words(tensors[f"{stem}.weight_packed"], bits, columns).to(torch.int16) - (1 << (bits - 1))
        return Recovered(numbers_RC, tensors[f"{stem}.weight_scale"].float())

    def config(
        self, plan: Sequence[Planned], spared: Sequence[ExpertMatrix], grids: Grids, checkpoint: Checkpoint
    ) -> dict[str, Any]:
        """A group of the config for each width; targets are paths of experts, never classes of modules."""
        widths: dict[int, list[int]] = {}
        for entry in plan:
            layers = widths.setdefault(_held(entry), [])
            if entry.matrix.layer not in layers:
                layers.append(entry.matrix.layer)
        stems = {entry.matrix.layer: _stem(entry.matrix) for entry in plan}
        groups = {
            f"group_{number}": {
                "targets": _targets([stems[layer] for layer in layers], alone=len(widths) == 1 and not spared),
                "weights": _scheme(bits, grids.group),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for number, (bits, layers) in enumerate(sorted(widths.items()))
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": _targets(list(dict.fromkeys(_stem(matrix) for matrix in spared)), alone=False),
            "kv_cache_scheme": None,
        }


def _stem(matrix: ExpertMatrix) -> str:
    """Path of the block that holds a matrix's expert."""
    return matrix.name.rpartition(".experts.")[0]


def _scheme(bits: int, group: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _targets(stems: list[str], *, alone: bool) -> list[str]:
    if alone:
        return [r"re:.*\.experts\.\d+\..*"]
    return [rf"re:.*{re.escape(stem)}\.experts\.\d+\..*" for stem in stems]


def _held(planned: Planned) -> int:
    """Bits of a word's numbers: -1 and 1 lie in two."""
    return max(planned.bits, 2)


def _check_width(widths: set[int], layer: int) -> None:
    if not {max(bits, 2) for bits in widths} <= set(WIDTHS):
        raise BadConfig(
            f"experts of {_listed(widths)} bits: readers of compressed-tensors disagree on how these lie in words",
            layer=layer,
            hint="round to 2, 4 or 8 bits; --to auto-round holds 2 to 8 bits, --to gguf holds any",
        )


def _listed(widths: set[int]) -> str:
    return ", ".join(map(str, sorted(widths)))
