"""Which gate a router has, found by asking it: no class names.

The candidates that a router's attributes allow are compared, bit for bit, with what the router itself answers. Where
several agree, it is asked again on rows where they may differ, until one is left or nothing tells them apart:

- rows whose scores are all tiny: there an epsilon, a floor, or neither give other weights;
- rows in bfloat16, whatever type the model is kept in: there a softmax in fp32 and one in the logits' own type round
  differently, though only a few in a thousand rows.

Legend: T tokens, H hidden, E experts, K choices a token.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moekit.anatomy.asking import ask_router, stirred
from moekit.anatomy.gate import Gate, GateSpec, Scoring
from moekit.anatomy.probe import MoELayer
from moekit.checkpoint.names import is_part_tensor
from moekit.errors import UnsupportedModel

# The names that families give to the factor on weights.
_SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale", "scaling_factor")
_EPSILONS = (0.0, 1e-20, 1e-6, 1e-9, 1e-12)


@dataclass(frozen=True)
class _Question:
    """Rows that a router is asked about.

    Attributes:
        rows: T.
        dtype: of hidden states and weights; None for the router's own.
        low: all logits negative, from hardly to so far that scores underflow.
    """

    rows: int
    dtype: torch.dtype | None = None
    low: bool = False


_QUESTIONS = (
    _Question(64),
    _Question(64, low=True),
    *(_Question(rows, torch.bfloat16) for rows in (64, 256, 1024)),
)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A router that is asked, with random weights.

    Attributes:
        router: a copy.
        block: holds what the router's block gives it; None where it gives nothing.
    """

    router: nn.Module
    block: nn.Module | None

    @property
    def home(self) -> nn.Module:
        """Where its selection bias is found: see `MoELayer.gate_home`."""
        return self.router if self.block is None else self.block

    @property
    def passed(self) -> tuple[Tensor, ...]:
        """What the block gives it."""
        return () if self.block is None else tuple(self.block.buffers())


def _stirred_tensors(layer: MoELayer) -> nn.Module | None:
    if not layer.passed:
        return None
    block = nn.Module()
    for name in layer.passed:
        block.register_buffer(name, torch.empty_like(getattr(layer.block, name), device="cpu"))
    return stirred(block)


# A gate depends on a router's code and attributes, not on its weights: equal routers are asked once.
_known: dict[tuple[object, ...], GateSpec] = {}


def identify_gate(layer: MoELayer) -> GateSpec:
    """Find the gate of a layer's router by asking a copy of it that has random weights and biases.

    Raises:
        UnsupportedModel: no candidate reproduces the router; its routing can be traced but not replaced.
    """
    router = layer.require_router()
    key = _key(router, layer)
    if key is not None and key in _known:
        return _known[key]
    asked = _Asked(stirred(router), _stirred_tensors(layer))
    rows_TH = torch.ones(2, layer.geometry.hidden).to(next(asked.router.parameters()).dtype)
    answer = ask_router(asked.router, rows_TH, stock=True, passed=asked.passed)
    assert answer is not None  # it is a router because it answers
    # The family's own K: attached parts may choose another number.
    alive = list(_candidates(asked, layer.geometry.experts, answer[2].shape[1]))
    for number, question in enumerate(_QUESTIONS):
        alive = _agreeing(asked, question, layer.geometry.hidden, alive, seed=number + 1)
        if len({replace(spec, sorted=True) for spec in alive}) < 2:
            break
    if not alive:
        raise UnsupportedModel(
            f"{type(router).__name__} follows none of the known gates (softmax, sigmoid, softmax over the chosen, "
            "sparsemixer; with selection bias, groups, normalisation, scale)",
            layer=layer.index,
            hint="trace and place it without a routing policy, or add its gate to moekit/anatomy/gate.py",
        )
    if key is not None:
        _known[key] = alive[0]
    return alive[0]


def _agreeing(asked: _Asked, question: _Question, hidden: int, specs: list[GateSpec], seed: int) -> list[GateSpec]:
    """Those of the candidates that answer like the router."""
    router = copy.deepcopy(asked.router) if question.dtype is not None or question.low else asked.router
    if question.dtype is not None:
        router.to(question.dtype)
    like = next(router.parameters())
    rows_TH = torch.randn(question.rows, hidden, generator=torch.Generator().manual_seed(seed))
    if question.low:
        rows_TH = rows_TH.abs() * torch.logspace(-1, 2.5, question.rows).unsqueeze(1)
        with torch.no_grad():
            for parameter in router.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(-parameter.abs())
    answer = ask_router(router, rows_TH.to(like.dtype), stock=True, passed=asked.passed)
    if answer is None:  # a router that does not run in this type tells nothing in it
        return specs
    home = router if asked.block is None else asked.block
    return [spec for spec in specs if _equals(spec, home, answer)]


def _equals(spec: GateSpec, home: nn.Module, answer: tuple[Tensor, Tensor, Tensor]) -> bool:
    logits_TE, weights_TK, indices_TK = answer
    try:
        with torch.no_grad():
            ours_TK, chosen_TK = Gate(spec, home)(logits_TE)
    except RuntimeError:  # a bias or grouping that does not fit these shapes
        return False
    # Rows that the router itself answers with NaN tell nothing.
    same_TK = (ours_TK.to(weights_TK.dtype) == weights_TK) | weights_TK.isnan()
    return torch.equal(chosen_TK, indices_TK) and bool(same_TK.all())


def _attribute(router: nn.Module, *names: str) -> object | None:
    return next((getattr(router, name) for name in names if getattr(router, name, None) is not None), None)


def _bias_names(home: nn.Module, experts: int) -> list[str]:
    """Candidates for a selection bias: [E]-sized tensors below the router that are not the linear map's own bias."""
    tensors = (*home.named_parameters(), *home.named_buffers())
    names = [n for n, t in tensors if t.numel() == experts and not is_part_tensor(n)]
    return [n for n in names if n not in {"bias", "layer.bias"}]


def _candidates(asked: _Asked, experts: int, top_k: int) -> Iterator[GateSpec]:
    router = asked.router
    jitter = _attribute(router, "router_jitter_noise")
    if isinstance(jitter, float) and top_k == 2:
        yield GateSpec(top_k, scoring="sparsemixer", jitter=jitter)
    scaling = _attribute(router, *_SCALES)
    scales = [float(scaling), 1.0] if isinstance(scaling, int | float) and scaling != 1 else [1.0]
    groups, top_groups = _attribute(router, "num_group", "n_group"), _attribute(router, "topk_group")
    grouped: list[tuple[int, int]] = [(1, 1)]
    if isinstance(groups, int) and isinstance(top_groups, int) and groups > 1:
        grouped.insert(0, (groups, top_groups))
    floor = _attribute(router, "norm_min")
    normals: list[tuple[bool, float, float]] = [(False, 0.0, 0.0), *((True, epsilon, 0.0) for epsilon in _EPSILONS)]
    if isinstance(floor, float):
        normals.insert(0, (True, 0.0, floor))
    scorings: list[Scoring] = ["softmax", "softmax_native", "sigmoid", "selected_softmax", "selected_softmax_native"]
    biases = [*_bias_names(asked.home, experts), ""]
    for scoring, bias, (count, top), (normal, epsilon, least), scale in itertools.product(
        scorings, biases, grouped, normals, scales
    ):
        spec = GateSpec(top_k, scoring, normal, epsilon, least, scale, bias, count, top)
        if count > 1:
            by_max = replace(spec, group_score="max")
            known = [replace(way, outside=outside) for way in (spec, by_max) for outside in (float("-inf"), 0.0)]
        else:
            known = [spec]
        for one in known:
            yield one
            yield replace(one, sorted=False)


def _key(router: nn.Module, layer: MoELayer) -> tuple[object, ...] | None:
    """What decides a router's gate; None where its forward was replaced, which no attribute shows."""
    told: list[object] = [layer.geometry.hidden, layer.geometry.experts, layer.passed]
    for name, module in router.named_modules():
        if is_part_tensor(f"{name}."):
            continue
        if "forward" in module.__dict__:
            return None
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "training"}
        describe = getattr(getattr(module, "config", None), "to_dict", None)
        values = repr(describe()) if describe is not None else ""
        told.append((name, getattr(type(module), "stock_class", type(module)), tuple(sorted(plain.items())), values))
    tensors = (*router.named_parameters(), *router.named_buffers())
    told += [(n, str(t.dtype), tuple(t.shape)) for n, t in tensors if not is_part_tensor(n)]
    return tuple(told)
