"""Find how a module stores its routed experts; the ways are told in `moekit.anatomy.storage`.

Legend: E experts, I expert width, H hidden.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moekit.anatomy.storage import Part, Projection, Storage

_DOWN: Part = "down"
_UP: Part = "up"
_ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")


def find_storage(module: nn.Module) -> Storage | None:
    """How a module stores routed experts; None if it holds none."""
    for rule in (_stacked, _joined, _paired, _listed):
        found = rule(module)
        if found is not None:
            return found
    return None


def _stated(module: nn.Module) -> int | None:
    count = getattr(module, "num_experts", None)
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def _called_with_choices(module: nn.Module) -> bool:
    """Whether a module's forward is given hidden states, choices and weights."""
    stock: type[nn.Module] = getattr(type(module), "stock_class", type(module))
    parameters = list(inspect.signature(stock.forward).parameters.values())[1:]
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 3


def _activation(module: nn.Module) -> str:
    return next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), "")


def _stacked(module: nn.Module) -> Storage | None:
    own = {n: p for n, p in module._parameters.items() if p is not None and p.dim() == 3}
    # The rule of one rank's share, too, whose own number of experts is smaller than the layer's.
    down, stated = own.get("down_proj"), _stated(module)
    into = next((own[name] for name in ("gate_up_proj", "up_proj") if name in own), None)
    if down is None or into is None:
        return None
    count = down.shape[0]
    if stated != count and not (stated is None and _called_with_choices(module)):
        return None
    gated = "gate_up_proj" in own
    if gated:  # [E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H]
        flipped = into.shape[2] == 2 * down.shape[1] and into.shape[1] == down.shape[2]
    else:
        flipped = bool(getattr(module, "is_transposed", False))
    width, hidden = (down.shape[1], down.shape[2]) if flipped else (down.shape[2], down.shape[1])
    parts: list[Part] = ["gate_up"] if gated else ["gate", "up"] if "gate_proj" in own else ["up"]
    projections = [Projection(part, (f"{part}_proj",), transposed=flipped) for part in (*parts, _DOWN)]
    for part in (*parts, _DOWN):
        if isinstance(module._parameters.get(f"{part}_proj_bias"), Tensor):
            projections.append(Projection(part, (f"{part}_proj_bias",), bias=True))
    return Storage(
        "stacked",
        count,
        hidden,
        width,
        tuple(projections),
        bool(getattr(module, "is_concatenated", True)),
        _activation(module),
        into.shape[0] - count,
    )


def _joined(module: nn.Module) -> Storage | None:
    count = _stated(module)
    if count is None or count < 1:
        return None
    for name, child in module.named_children():
        own = {n: p for n, p in child._parameters.items() if p is not None}
        shapes = {tuple(p.shape) for p in own.values()}
        if len(own) != 3 or len(shapes) != 1:
            continue
        shape = shapes.pop()
        if len(shape) != 2 or shape[0] % count:
            continue
        roles = _asked_roles(child, list(own))
        if roles is None:
            continue
        projections = tuple(
            Projection(part, (f"{name}.{own_name}",), transposed=part == "down", joined=True)
            for part, own_name in roles.items()
        )
        activation = _activation(child)
        path = f"{name}.{activation}" if activation else ""
        return Storage("joined", count, shape[1], shape[0] // count, projections, True, path)
    return None


def _asked_roles(child: nn.Module, names: Sequence[str]) -> dict[Part, str] | None:
    """Which of three matrices is gate, up and down: the child is given small ones of its own kind and compared."""
    activation = getattr(child, _activation(child) or "-", None)
    if activation is None:
        return None
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(3, 5, generator=generator)
    matrices = [torch.randn(7, 5, generator=generator) for _ in names]
    try:
        with torch.no_grad():
            answer = child.forward(given, *matrices)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return None
    for gate, up, down in itertools.permutations(range(3)):
        expected = (activation(given @ matrices[gate].T) * (given @ matrices[up].T)) @ matrices[down]
        if (
            isinstance(answer, Tensor)
            and answer.shape == expected.shape
            and torch.allclose(answer, expected, atol=1e-5)
        ):
            # Arguments come in the order in which the tensors are registered, or are named after them.
            order = _argument_order(child, names)
            return {"gate": order[gate], "up": order[up], "down": order[down]}
    return None


def _argument_order(child: nn.Module, names: Sequence[str]) -> list[str]:
    arguments = list(inspect.signature(child.forward).parameters)[1:4]
    named = [next((n for n in names if a == n or a.endswith(f"_{n}")), None) for a in arguments]
    return [n for n in named if n is not None] if len({*named} - {None}) == 3 else list(names)


def _paired(module: nn.Module) -> Storage | None:
    stacks = []
    for name, child in module.named_children():
        own = child._parameters.get("weight")
        if own is not None and own.dim() == 3 and _stated(child) == own.shape[0] and len(list(child.parameters())) == 1:
            stacks.append((name, own))
    if len(stacks) != 2 or not _activation(module):
        return None
    (first, into), (second, out) = stacks
    widths = (out.shape[2], 2 * out.shape[2])
    if into.shape[0] != out.shape[0] or into.shape[2] != out.shape[1] or into.shape[1] not in widths:
        return None
    part: Part = "gate_up" if into.shape[1] == 2 * out.shape[2] else "up"
    projections = (Projection(part, (f"{first}.weight",)), Projection("down", (f"{second}.weight",)))
    return Storage("paired", out.shape[0], out.shape[1], out.shape[2], projections, True, _activation(module))


def _listed(module: nn.Module) -> Storage | None:
    count = _stated(module)
    if count is None or count < 1:
        return None
    linears = {name: _linears(child) for name, child in module.named_children()}
    listed = {name: found for name, found in linears.items() if len(found) == 2}
    kinds = {tuple((n, tuple(lin.weight.shape), lin.bias is not None) for n, lin in f.items()) for f in listed.values()}
    if len(listed) != count or len(kinds) != 1:
        return None
    (first, into, first_bias), (second, out, second_bias) = next(iter(kinds))
    if into != out[::-1]:
        return None
    projections = [
        Projection("up", tuple(f"{child}.{first}.weight" for child in listed)),
        Projection("down", tuple(f"{child}.{second}.weight" for child in listed)),
    ]
    for wanted, part, name in ((first_bias, _UP, first), (second_bias, _DOWN, second)):
        if wanted:
            projections.append(Projection(part, tuple(f"{child}.{name}.bias" for child in listed), bias=True))
    one = next(iter(listed))
    activation = _activation(module.get_submodule(one))
    path = f"{one}.{activation}" if activation else ""
    return Storage("listed", count, out[0], out[1], tuple(projections), True, path)


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
