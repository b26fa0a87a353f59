"""A rank whose batch is empty takes part in every exchange of the others.

Stock attention cannot take a batch of no rows (its reshapes are ambiguous then), and a rank that leaves the forward
pass leaves the others waiting. So the pass is made on one row that nobody sees: its tokens choose no expert, nothing is
sent for it, and what the model returns has no rows again.

Legend: N tokens, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
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
        given = [*args, *(kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs)]
        self.active = any(isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == 0 for value in given[:2])
        if not self.active:
            return None
        filled = {name: _one_row(value, name) for name, value in kwargs.items()}
        return tuple(_one_row(value, "") for value in args), {**filled, "use_cache": False}

    def _leave(self, model: nn.Module, args: Any, output: Any) -> Any:
        if not self.active:
            return None
        self.active = False
        return _no_rows(output)


def _one_row(value: Any, name: str) -> Any:
    """A tensor of no rows with one row of zeros; of ones for masks, of ignored labels for labels."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != 0:
        return value
    fill = IGNORED if name == "labels" else int("mask" in name)
    return value.new_full((1, *value.shape[1:]), fill)


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
