"""What the axes of a part's tensors mean, so that tensors follow when experts are reordered.

A tensor's axes are a word of one letter an axis: "EH" is [experts, hidden], "" a scalar. E, K, H and I are the layer's
experts, choices a token, model width and expert width; other letters are sizes of the part's own. A word that ends in
"->E" holds expert numbers: in "ER->E" row e ranks R experts by their numbers, which are renamed, not moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moekit.anatomy.permute import inverse
from moekit.anatomy.probe import Geometry
from moekit.errors import BadConfig

_NAMES = "->E"


def check_axes(tensors: Mapping[str, Tensor], axes: Mapping[str, str], geometry: Geometry, layer: int) -> None:
    """Refuse tensors whose axes are not known, or whose sizes are not this layer's.

    Raises:
        BadConfig: naming the layer and the tensor.
    """
    sizes = {"E": geometry.experts, "K": geometry.top_k, "H": geometry.hidden, "I": geometry.width}
    for name, tensor in tensors.items():
        if name not in axes:
            raise BadConfig(
                f"nothing says what the axes of the part's tensor {name!r} mean",
                layer=layer,
                hint=f'name it in the part\'s `axes`, such as {{"{name}": "EH"}}; known are {sorted(axes) or "none"}',
            )
        word = axes[name].removesuffix(_NAMES)
        wrong = len(word) != tensor.dim() or any(
            sizes.get(letter, size) != size for letter, size in zip(word, tensor.shape, strict=False)
        )
        if wrong:
            wanted = [sizes.get(letter, letter) for letter in word]
            raise BadConfig(
                f"the part's tensor {name!r} has shape {list(tensor.shape)}, not {wanted}",
                layer=layer,
                hint="it was made for another model",
            )
        if axes[name].endswith(_NAMES):
            _check_numbers(name, tensor, geometry.experts, layer)


def _check_numbers(name: str, tensor: Tensor, experts: int, layer: int) -> None:
    if tensor.is_floating_point() or (tensor.numel() and int(tensor.max()) >= experts):
        raise BadConfig(
            f"the part's tensor {name!r} names experts beyond the {experts} of this layer",
            layer=layer,
            hint="it was made for another model, or is damaged",
        )


def permuted(tensor: Tensor, axes: str, order: Sequence[int]) -> Tensor:
    """The tensor for reordered experts, `order[new] = old`; negative expert numbers (none) stay."""
    index = torch.tensor(order, device=tensor.device)
    for axis, letter in enumerate(axes.removesuffix(_NAMES)):
        if letter == "E":
            tensor = tensor.index_select(axis, index)
    if axes.endswith(_NAMES):
        new_of_old = torch.tensor(inverse(order), device=tensor.device)
        renamed = new_of_old[tensor.long().clamp_min(0)].to(tensor.dtype)
        tensor = torch.where(tensor >= 0, renamed, tensor)
    return tensor
