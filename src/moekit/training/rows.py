"""Single experts that train: the other rows of stacked weights stay as they are, to the last bit.

Experts of a layer are rows of a few stacked tensors, which train or do not as a whole. Here the gradient of all rows
but the chosen ones is cleared before it is accumulated, and weight decay, which needs no gradient, is applied to the
chosen rows by hand; Adam's step of a row that never had a gradient is exactly 0. After the run it is checked.

Legend: E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moekit.anatomy.probe import decoder_index
from moekit.errors import UnsupportedModel


class ExpertRows:
    """Keeps rows of stacked experts still while others train.

    Args:
        model: the model.
        rows: parameter name -> [E] bool, True for experts that train.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, Tensor]) -> None:
        self._parameters = {name: model.get_parameter(name) for name in rows}
        self._rows = {name: mask_E.to(self._parameters[name].device) for name, mask_E in rows.items()}
        self._before = self._digests()
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Clear the gradients of rows that stay, from now on."""
        for name, parameter in self._parameters.items():
            still = ~self._rows[name].view(-1, *(1,) * (parameter.dim() - 1))
            clear = lambda grad, still=still: grad.masked_fill(still, 0)  # noqa: E731
            self._handles.append(parameter.register_hook(clear))  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def split_decay(self, optimizer: torch.optim.Optimizer) -> RowDecay:
        """Take weight decay of these parameters out of an optimizer; the callback returned applies it to their rows."""
        mine = {id(parameter): name for name, parameter in self._parameters.items()}
        decay: list[tuple[dict[str, Any], list[tuple[nn.Parameter, Tensor]], float]] = []
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in mine]
            if not own or not group["weight_decay"]:
                continue
            group["params"] = [p for p in group["params"] if id(p) not in mine]
            optimizer.add_param_group({**group, "params": own, "weight_decay": 0.0})
            rows = [(p, self._rows[mine[id(p)]]) for p in own]
            decay.append((optimizer.param_groups[-1], rows, float(group["weight_decay"])))
        return RowDecay(decay)

    def check(self) -> None:
        """Make sure that no other row has changed.

        Raises:
            UnsupportedModel: one has: naming layer and expert.
        """
        after = self._digests()
        for name, digests in self._before.items():
            for expert, (was, now) in enumerate(zip(digests, after[name], strict=True)):
                if was != now and not bool(self._rows[name][expert]):
                    raise UnsupportedModel(
                        f"{name!r} has changed, although this expert does not train",
                        layer=decoder_index(name),
                        expert=expert,
                        hint="train with an optimizer that leaves rows without a gradient alone, such as AdamW",
                    )

    def _digests(self) -> dict[str, list[bytes]]:
        return {
            name: [hashlib.sha256(_bytes(row)).digest() for row in parameter.detach().cpu()]
            for name, parameter in self._parameters.items()
        }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


class RowDecay(TrainerCallback):  # type: ignore[misc]
    """AdamW's decoupled weight decay, on chosen rows alone.

    Args:
        decay: for each group of the optimizer: the group (for its rate), parameters with their rows, and the decay.
    """

    def __init__(self, decay: list[tuple[dict[str, Any], list[tuple[nn.Parameter, Tensor]], float]]) -> None:
        self._decay = decay

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shrink the rows that train by rate times decay, as AdamW does before its own step."""
        for group, rows, decay in self._decay:
            for parameter, mask_E in rows:
                parameter[mask_E] *= 1 - group["lr"] * decay
