"""Layers that were made where the text stood, kept on disk for whoever proves or writes them.

What they were made of (second moments of each expert's inputs) is larger than they are, and gone.

Legend: E experts.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekit._files import open_regular
from moekit.compress.weights import LayerWeights

_FIELDS = ("up_EIH", "down_EHI", "gate_EIH", "up_bias_EI", "gate_bias_EI", "down_bias_EH")


class MadeLayers:
    """New weights of layers, a file each.

    Args:
        folder: where; None for a temporary one, which is gone with this object.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="moekit-layers-") if folder is None else None
        self._folder = Path(self._own.name) if folder is None and self._own is not None else folder
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)

    def put(self, layer: int, weights: LayerWeights, figures: Mapping[str, float] | None = None) -> None:
        """Keep a layer and what is told of it, in the place of what was kept of it before."""
        write_layer(self._file(layer), weights, figures or {})

    def get(self, layer: int) -> tuple[LayerWeights, dict[str, float]]:
        """What was kept, in the dtype in which it was kept, and what is told of it."""
        return read_layer(self._file(layer))

    def digests(self, layers: Iterable[int]) -> dict[int, str]:
        """Decoder layer -> sha256 of what was kept of it."""
        found = {}
        for layer in layers:
            with open_regular(self._file(layer)) as stream:
                found[layer] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found

    def _file(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"made-{layer}.safetensors"


def write_layer(file: Path, weights: LayerWeights, figures: Mapping[str, float]) -> None:
    """Write a layer's weights and what is told of them; a killed run leaves no half of it under its name."""
    tensors = {name: tensor for name in _FIELDS if (tensor := getattr(weights, name)) is not None}
    tensors |= {f"router.{name}": tensor for name, tensor in weights.router.items()}
    tensors |= {f"others.{name}": tensor for name, tensor in weights.others.items()}
    apart = _apart(tensors)
    temporary = file.with_suffix(f".{os.getpid()}.part")
    save_file(apart, temporary, metadata={"figures": json.dumps(dict(figures))})
    os.replace(temporary, file)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, which the format refuses; copies of those only that are parts of others."""
    apart, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        apart[name] = plain
    return apart


def read_layer(file: Path) -> tuple[LayerWeights, dict[str, float]]:
    """What `write_layer` wrote."""
    with safe_open(file, framework="pt") as opened:
        figures: dict[str, float] = json.loads(opened.metadata()["figures"])
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def of(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    fields = {name: tensors.get(name) for name in _FIELDS}
    return LayerWeights(**fields, router=of("router."), others=of("others.")), figures  # type: ignore[arg-type]
