"""A rank whose batch is empty takes part in every exchange of the others.

Stock attention cannot take a batch of no rows (its reshapes are ambiguous then), and a rank that leaves the forward
pass leaves the others waiting. So the pass is made on one row that nobody sees: its tokens choose no expert, nothing is
sent for it, and what the model returns has no rows again. To whoever records or adds losses the row is padding.

Legend: S positions, N tokens, K choices, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# A label that losses of transformers leave out.
IGNORED = -100


@dataclass(eq=False)
class EmptyBatch:
    """Whether the forward pass under way stands for a batch of no rows.

    Attributes:
        active: it does.
    """

    active: bool = False
    _handles: list[RemovableHandle] = field(default_factory=list)

    def install(self, model: nn.Module) -> None:
        """Watch a model's forward passes."""
        self._handles = [
            # Before all others, so that they see the row of padding, whenever they came.
            model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def choices(self, indices_NK: Tensor, weights_NK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """The choices as they are, or those of no expert (index E, weight 0) while the batch is empty."""
        if not self.active:
            return indices_NK, weights_NK
        return indices_NK.new_full(indices_NK.shape, experts), weights_NK * 0

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        known = inspect.signature(model.forward).parameters.values()
        names = [parameter.name for parameter in known if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        given, rest = dict(zip(names, args, strict=False)) | kwargs, args[len(names) :]
        read = [given.get("input_ids"), given.get("inputs_embeds"), *rest[:1]]
        empty = [value for value in read if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == 0]
        self.active = bool(empty)
        if not empty:
            return None
        filled = {name: _one_row(value, name) for name, value in given.items()}
        if filled.get("attention_mask") is None:
            filled["attention_mask"] = empty[0].new_zeros((1, empty[0].shape[1]), dtype=torch.int64)
        return tuple(_one_row(value, "") for value in rest), {**filled, "use_cache": False}

    def _leave(self, model: nn.Module, args: Any, output: Any) -> Any:
        if not self.active:
            return None
        self.active = False
        return _no_rows(output)


def _one_row(value: Any, name: str) -> Any:
    """A tensor of no rows with one row of zeros, which stand for padding in masks; of ignored labels for labels."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != 0:
        return value
    return value.new_full((1, *value.shape[1:]), IGNORED if name == "labels" else 0)


def _no_rows(output: Any) -> Any:
    """An output with its tensors cut to no rows; numbers such as losses stay."""
    if isinstance(output, Tensor):
        return output[:0] if output.dim() else output
    if isinstance(output, Mapping):
        for name, value in output.items():
            output[name] = _no_rows(value)  # type: ignore[index]  # a ModelOutput takes new values
        return output
    if isinstance(output, tuple | list):
        return type(output)(_no_rows(value) for value in output)
    return output
