"""An optimizer's state in a sharded checkpoint: a slice for each expert, under the expert's logical id."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.errors import BadConfig
from moekit.parallel.checkpoints.files import TORCH_DTYPES
from moekit.parallel.checkpoints.index import OPTIMIZER, Index
from moekit.parallel.checkpoints.pieces import Pieces, Stack, rows, split

logger = logging.getLogger(__name__)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Names of the parameters that an optimizer updates.

    Raises:
        BadConfig: it updates parameters of another model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            raise BadConfig(
                "the optimizer updates parameters that the model does not have",
                hint="make the optimizer after expert_parallel() has dealt the experts out",
            )
    return names


def optimizer_states(model: nn.Module, optimizer: torch.optim.Optimizer, stacks: dict[str, Stack]) -> Pieces:
    """States of an optimizer, one slice for each expert.

    Raises:
        BadConfig: an expert's state cannot be told from its neighbour's.
    """
    names, pieces = _names(model, optimizer), Pieces()
    for parameter, states in optimizer.state.items():
        stack, inner = split(names[id(parameter)], stacks)
        for state, value in states.items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                if not isinstance(value, int | float):
                    raise BadConfig(
                        f"the optimizer keeps a {type(value).__name__} as {state!r}, which cannot be saved",
                        hint="use an optimizer whose states are tensors or numbers",
                    )
                pieces.numbers.add(state)
                value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
            if stack is None:
                pieces.tensors[f"{OPTIMIZER}/{state}/{inner}"] = value.detach()
            else:
                for expert, row in _state_rows(value, parameter, stack, state):
                    pieces.tensors[f"{OPTIMIZER}/{state}/{stack.name}.{expert}.{inner}"] = row
    return pieces


def _state_rows(value: Tensor, parameter: Tensor, stack: Stack, state: str) -> Iterator[tuple[int, Tensor]]:
    if value.dim() == 0:
        for expert, _ in rows(parameter, stack):
            yield expert, value.detach()
    elif value.shape[0] == parameter.shape[0]:
        yield from rows(value, stack)
    else:
        raise BadConfig(
            f"the optimizer's {state!r} of shape {tuple(value.shape)} has no slice for each expert",
            layer=stack.entry.layer,
            hint="use an optimizer that keeps its state element by element, such as AdamW",
        )


def group_settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Learning rates and the like, with the names of the parameters they hold for."""
    names = _names(model, optimizer)
    plain = (bool, int, float, str, tuple, list, type(None))
    settings = []
    for group in optimizer.param_groups:
        values = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        kept = {key: value for key, value in values.items() if isinstance(value, plain)}
        settings.append({"params": [names[id(p)] for p in group["params"]], "settings": kept})
    return settings


def restore_groups(model: nn.Module, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Put learning rates and the like back.

    Raises:
        BadConfig: the optimizer groups its parameters in another way.
    """
    now = group_settings(model, optimizer)
    if [group["params"] for group in now] != [group["params"] for group in groups]:
        raise BadConfig(
            f"the optimizer has {len(now)} groups of parameters, the checkpoint {len(groups)}, or others in them",
            hint="make the optimizer as it was made before the checkpoint was saved",
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved["settings"].items():
            old = group.get(key)
            if isinstance(old, Tensor):
                old.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(old, tuple) else value


def empty_states(model: nn.Module, optimizer: torch.optim.Optimizer, stacks: dict[str, Stack], index: Index) -> Pieces:
    """Give an optimizer empty states to read a checkpoint's into.

    Raises:
        BadConfig: the checkpoint's states do not fit the parameters.
    """
    states_of: dict[str, list[str]] = defaultdict(list)
    for key in index.tensors:
        if key.startswith(f"{OPTIMIZER}/"):
            _, state, name = key.split("/", 2)
            states_of[name].append(state)
    names, pieces = _names(model, optimizer), Pieces()
    for group in optimizer.param_groups:
        on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            stack, inner = split(names[id(parameter)], stacks)
            optimizer.state.pop(parameter, None)
            if stack is None:
                _dense_states(optimizer, parameter, inner, states_of[inner], index, pieces, on_device)
            else:
                _expert_states(optimizer, parameter, stack, inner, states_of, index, pieces, on_device)
    return pieces


def _empty(key: str, parameter: Tensor, index: Index, on_device: bool, count: int | None = None) -> Tensor:
    entry = index.tensors[key]
    dtype = TORCH_DTYPES[entry.dtype]
    if not entry.shape:
        device = parameter.device if on_device else torch.device("cpu")
        return torch.zeros(() if count is None else (count,), dtype=dtype, device=device)
    shape = entry.shape if count is None else (parameter.shape[0], *entry.shape)
    if isinstance(parameter, DTensor):
        if shape != tuple(parameter.shape):
            raise BadConfig(f"{key!r} of shape {entry.shape} cannot be dealt out like its parameter", hint="use AdamW")
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def _dense_states(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    name: str,
    states: list[str],
    index: Index,
    pieces: Pieces,
    on_device: bool,
) -> None:
    for state in states:
        key = f"{OPTIMIZER}/{state}/{name}"
        tensor = _empty(key, parameter, index, on_device)
        pieces.tensors[key] = tensor
        optimizer.state[parameter][state] = tensor
        if state in index.numbers:
            pieces.finish.append(_as_number(optimizer, parameter, state))


def _as_number(optimizer: torch.optim.Optimizer, parameter: Tensor, state: str) -> Callable[[], None]:
    def convert() -> None:
        optimizer.state[parameter][state] = optimizer.state[parameter][state].item()

    return convert


def _expert_states(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    stack: Stack,
    inner: str,
    states_of: dict[str, list[str]],
    index: Index,
    pieces: Pieces,
    on_device: bool,
) -> None:
    ids = [expert for expert, _ in rows(parameter, stack)]
    # An expert without a state never had a gradient: zeros are what the optimizer would begin with.
    for state in sorted({state for expert in ids for state in states_of[f"{stack.name}.{expert}.{inner}"]}):
        keys = {expert: f"{OPTIMIZER}/{state}/{stack.name}.{expert}.{inner}" for expert in ids}
        known = {expert: key for expert, key in keys.items() if key in index.tensors}
        tensor = _empty(next(iter(known.values())), parameter, index, on_device, len(ids))
        scalar = not index.tensors[next(iter(known.values()))].shape
        slices = list(enumerate(tensor)) if scalar else [(i, row) for i, (_, row) in enumerate(rows(tensor, stack))]
        pieces.tensors |= {known[ids[i]]: row for i, row in slices if ids[i] in known}
        optimizer.state[parameter][state] = tensor
        if scalar:
            pieces.finish.append(_join(optimizer, parameter, state, stack))
        if state in index.numbers:
            pieces.finish.append(_as_number(optimizer, parameter, state))


def _join(optimizer: torch.optim.Optimizer, parameter: Tensor, state: str, stack: Stack) -> Callable[[], None]:
    """One number for experts that from now on share a tensor; they differ only if some were without gradient."""

    def join() -> None:
        each = optimizer.state[parameter][state]
        if bool((each != each[0]).any()):
            logger.warning(
                "layer %d: experts with different %r share a tensor now; the largest counts", stack.entry.layer, state
            )
        optimizer.state[parameter][state] = each.max()

    return join
