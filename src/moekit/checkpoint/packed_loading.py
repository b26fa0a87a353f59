"""Load a folder of moekit's packed experts as it lies: the model without its experts' weights, and those as integers.

Legend: R rows, G groups, W words of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.carried import append_tensors
from moekit.checkpoint.conversions import follow_names
from moekit.checkpoint.folder import CONFIG_FILE
from moekit.checkpoint.hollow import hollow_out, is_hollow
from moekit.checkpoint.names import expert_in
from moekit.checkpoint.precision import reading_dtype
from moekit.checkpoint.quantized.base import SCALE, WEIGHT
from moekit.checkpoint.quantized.packed_experts import LAYOUT, announced
from moekit.checkpoint.quantized.registry import quantization
from moekit.checkpoint.quantized.weights import WeightReader
from moekit.checkpoint.safety import read_header, read_json
from moekit.checkpoint.tying import tie
from moekit.checkpoint.uneven import fill
from moekit.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from moekit.checkpoint.folder import Checkpoint
    from moekit.checkpoint.layout import Layout

# What families call the projections of an expert that has a file name of its own.
PROJECTIONS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}


@dataclass(frozen=True)
class PackedMatrix:
    """One projection of one expert.

    Attributes:
        layer: decoder layer.
        expert: number.
        part: "gate", "up" or "down".
        bits: of a number.
        words_RW: int32.
        scale_RG: bfloat16.
    """

    layer: int
    expert: int
    part: str
    bits: int
    words_RW: Tensor
    scale_RG: Tensor


def holds_packed_experts(checkpoint: Checkpoint) -> bool:
    """Whether a folder's experts are packed as moekit packs them."""
    settings = quantization(checkpoint.config)
    return settings is not None and settings.get("format") == LAYOUT


def load_hollow(
    checkpoint: Checkpoint, build: Callable[[torch.dtype | None], PreTrainedModel], dtype: str | torch.dtype
) -> tuple[PreTrainedModel, Iterable[str]]:
    """Load all but the experts of such a folder; the experts' parameters take no memory and hold NaN.

    Args:
        checkpoint: opened and verified.
        build: makes its model of a dtype (None as the config says) without weights.
        dtype: of the weights; "auto" takes what this device computes in.

    Returns:
        The model, and what did not get weights.
    """
    given = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    given = reading_dtype(checkpoint, given)
    model = build(given)
    wanted = given or model.config.dtype or torch.float32
    with WeightReader(checkpoint, wanted) as reader:
        assert reader.quantized is not None
        hollow = {checkpoint.layout.live_name(name) for name in reader.quantized.weights}
        plain = [name for name in checkpoint.tensors if name not in reader.quantized.owners]
        fill(model, {name: reader.read(name) for name in plain}, dtype=wanted, file=checkpoint.path)
    hollow_out(model, hollow, wanted)
    follow_names(model, plain)
    tie(model)
    missing = [name for name, value in model.state_dict().items() if value.is_meta and not is_hollow(value)]
    return model, missing


@dataclass(frozen=True)
class PackedWeights:
    """What stands for experts in shards, and what the config says of it.

    Attributes:
        tensors: by name on disk.
        settings: `quantization_config`.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def packed_weights(matrices: Iterable[PackedMatrix], layout: Layout) -> PackedWeights:
    """Packed experts as a folder holds them.

    Args:
        matrices: of all layers.
        layout: of the model, for the names on disk.

    Raises:
        UnsupportedModel: transformers has no names for matrices of single experts.
    """
    names = {key: name for name in layout.stock if (key := _matrix_named(name, layout)) is not None}
    tensors: dict[str, Tensor] = {}
    columns: dict[str, int] = {}
    group = 0
    for one in sorted(matrices, key=lambda m: (m.layer, m.expert)):
        name = names.get((one.layer, one.expert, one.part))
        if name is None:
            raise UnsupportedModel(
                f"transformers knows no name for the {one.part} projection of a single expert",
                layer=one.layer,
                expert=one.expert,
            )
        stem = name.removesuffix(".weight")
        last = stem.rpartition(".")[2]
        tensors[f"{stem}.weight_packed"], tensors[f"{stem}.weight_scale"] = one.words_RW, one.scale_RG.bfloat16()
        columns[last] = layout.stock[name][1]
        group = columns[last] // one.scale_RG.shape[1] if one.scale_RG.shape[1] > 1 else group
    return PackedWeights(tensors, announced(group, columns))


def _matrix_named(name: str, layout: Layout) -> tuple[int, int, str] | None:
    part = PROJECTIONS.get(name.removesuffix(".weight").rpartition(".")[2])
    layer, expert = layout.where(name)
    return None if part is None or layer is None or expert is None else (layer, expert, part)


def add_packed(folder: Path, work: PackedWeights, max_shard_bytes: int) -> None:
    """Add packed experts to the shards of a folder that a hollow model was just saved into."""
    file = folder / "packed.partial"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in work.tensors.items()}, file)
    append_tensors(folder, [(info, file) for info in read_header(file).tensors.values()], max_shard_bytes)
    file.unlink()
    announce(folder, work)


def announce(folder: Path, work: PackedWeights) -> None:
    """Say in a folder's config how its experts are packed."""
    config = {**read_json(folder / CONFIG_FILE), "quantization_config": work.settings}
    atomic_write(folder / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def packed_matrices(checkpoint: Checkpoint) -> Iterator[PackedMatrix]:
    """The experts of such a folder as they lie, one matrix at a time, in the order of the files."""
    with WeightReader(checkpoint) as reader:
        assert reader.quantized is not None
        for name, packed in reader.quantized.weights.items():
            layer, expert = checkpoint.layout.layer(name), expert_in(name)
            assert layer is not None
            assert expert is not None
            yield PackedMatrix(
                layer,
                expert,
                PROJECTIONS[name.removesuffix(".weight").rpartition(".")[2]],
                packed.facts["bits"],
                reader.read(packed.parts[WEIGHT].name),
                reader.read(packed.parts[SCALE].name),
            )
