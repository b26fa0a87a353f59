"""Can every expert be chosen? Looks at router rows and selection biases, and asks the routers themselves.

Legend: T tokens, H hidden, E experts, K choices a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, ask_router
from moekit.checking.report import Finding
from moekit.checkpoint.expected import disk_names
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.layout import Layout

# Probes a router is asked: this many times as many choices as there are experts, so that a fair one never misses any.
_CHOICES_PER_EXPERT = 64
_MAX_PROBES = 16_384


def _load(layer: MoELayer, checkpoint: Checkpoint, names: Mapping[str, str]) -> nn.Module | None:
    """A router with its weights from disk; None if they are not all there."""
    if layer.router is None:
        return None
    router = copy.deepcopy(layer.router).to_empty(device="cpu").float()
    state = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    with torch.no_grad():
        for key, tensor in state.items():
            disk = names.get(f"{layer.router_name}.{key}")
            if disk is None or checkpoint.tensors[disk].shape != tuple(tensor.shape):
                return None
            tensor.copy_(checkpoint.read(disk))
    return router


def check_routers(checkpoint: Checkpoint, layout: Layout, layers: list[MoELayer]) -> Iterator[Finding]:
    """Zero and equal rows, biases that shut an expert out, experts that no probe reaches."""
    names = disk_names(checkpoint.tensors, layout)
    for layer in layers:
        router = _load(layer, checkpoint, names)
        if router is None:
            yield Finding(
                severity="note",
                code="router-not-asked",
                message="the router could not be built from the checkpoint alone and was not asked",
                file=str(checkpoint.path),
                layer=layer.index,
            )
            continue
        tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            continue  # told already
        said = list(_check_rows(checkpoint, layer, router)) + list(_check_biases(checkpoint, layer, router))
        yield from said
        yield from _ask(checkpoint, layer, router, {finding.expert for finding in said})


def _rows(router: nn.Module, experts: int, hidden: int) -> Tensor | None:
    """The router's linear map [E, H]."""
    for tensor in router.parameters():
        if tuple(tensor.shape) == (experts, hidden):
            return tensor.detach()
    return None


def _check_rows(checkpoint: Checkpoint, layer: MoELayer, router: nn.Module) -> Iterator[Finding]:
    rows_EH = _rows(router, layer.geometry.experts, layer.geometry.hidden)
    if rows_EH is None:
        return
    zero = (rows_EH == 0).all(dim=1).nonzero().flatten().tolist()
    if len(zero) == layer.geometry.experts:
        yield _finding(checkpoint, layer, None, "warning", "untrained-router", "the router is all zeros: untrained")
        return
    for expert in zero:
        message = "the router's row of this expert is all zeros: it is chosen by chance, not by content"
        yield _finding(checkpoint, layer, expert, "error", "router-row-zero", message)
    _, inverse, counts = torch.unique(rows_EH, dim=0, return_inverse=True, return_counts=True)
    for group in (counts > 1).nonzero().flatten().tolist():
        members = (inverse == group).nonzero().flatten().tolist()
        if members[0] not in zero:
            message = f"the router's rows of experts {members} are the same: all but the first win only ties"
            yield _finding(checkpoint, layer, members[-1], "warning", "router-rows-equal", message)


def _check_biases(checkpoint: Checkpoint, layer: MoELayer, router: nn.Module) -> Iterator[Finding]:
    """Selection biases are added to scores in (0, 1): one that lies a whole unit below K others is never chosen."""
    experts, top_k = layer.geometry.experts, layer.geometry.top_k
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        if tensor.numel() != experts or "correction" not in name:
            continue
        bias_E = tensor.detach().float().flatten()
        for expert in range(experts):
            others = bias_E[torch.arange(experts) != expert]
            if int((others >= bias_E[expert] + 1).sum()) >= top_k and not _grouped(router):
                message = f"its selection bias {bias_E[expert]:g} shuts this expert out: it can never be chosen"
                yield _finding(checkpoint, layer, expert, "error", "unroutable-expert", message)


def _grouped(router: nn.Module) -> bool:
    groups = (getattr(router, name, None) for name in ("num_group", "n_group"))
    return any(isinstance(count, int) and count > 1 for count in groups)


def _ask(checkpoint: Checkpoint, layer: MoELayer, router: nn.Module, known: set[int | None]) -> Iterator[Finding]:
    """Route random hidden states and see whom they never reach."""
    experts, top_k = layer.geometry.experts, max(layer.geometry.top_k, 1)
    probes = min(math.ceil(_CHOICES_PER_EXPERT * experts / top_k), _MAX_PROBES)
    generator = torch.Generator().manual_seed(layer.index)
    answer = ask_router(router, torch.randn(probes, layer.geometry.hidden, generator=generator))
    if answer is None:
        return
    counts_E = torch.bincount(answer[2].flatten(), minlength=experts)[:experts]
    never = (counts_E == 0).nonzero().flatten().tolist()
    if None in known or len(never) > experts - 2 * top_k:
        return  # an untrained router ties everywhere
    for expert in never:
        if expert not in known:
            message = f"none of {probes} random hidden states is routed to this expert"
            yield _finding(checkpoint, layer, expert, "warning", "never-routed", message)


def _finding(
    checkpoint: Checkpoint, layer: MoELayer, expert: int | None, severity: str, code: str, message: str
) -> Finding:
    return Finding.model_validate(
        {
            "severity": severity,
            "code": code,
            "message": message,
            "file": str(checkpoint.path),
            "layer": layer.index,
            "expert": expert,
            "hint": "profile the model on real text (moekit profile) to see what its routers do",
        }
    )
