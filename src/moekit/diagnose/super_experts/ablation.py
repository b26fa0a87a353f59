"""What a live model does without some of its experts: skipping them, and others at random for a control.

Legend: T positions, K choices a token, E experts.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.diagnose.super_experts.report import SHARED
from moekit.errors import BadConfig
from moekit.trace.seam import read_arguments, refuse_compiled

# (decoder layer, expert); expert `SHARED` is all shared experts of the layer.
Pair = tuple[int, int]


def by_layer(model: nn.Module, pairs: Collection[Pair]) -> Iterator[tuple[MoELayer, set[int]]]:
    """The live layers of some pairs, with the experts of each.

    Raises:
        BadConfig: no such layer or expert.
    """
    wanted = defaultdict[int, set[int]](set)
    for layer, expert in pairs:
        wanted[layer].add(expert)
    known = {layer.index: layer for layer in find_moe_layers(model)}
    for index, experts in wanted.items():
        if index not in known:
            raise BadConfig("this is no MoE layer", layer=index, hint=f"the MoE layers are {list(known)}")
        found, count = known[index], known[index].geometry.experts
        if strange := sorted(e for e in experts if not (SHARED if found.shared else 0) <= e < count):
            raise BadConfig(
                "there is no such expert",
                layer=index,
                expert=strange[0],
                hint=f"the layer has experts 0 to {count - 1}" + (" and shared ones, -1" if found.shared else ""),
            )
        yield found, experts


@contextlib.contextmanager
def without_experts(model: nn.Module, pairs: Collection[Pair]) -> Iterator[None]:
    """Skip some experts: a token that chooses one gets nothing from it, its other gates are not renormalised.

    To the bit what zeroing their down projections (and biases) gives where their outputs are finite, on any experts
    implementation; the weights are not touched, the gates are zeroed on their way into the experts. Routers choose as
    before.

    Args:
        model: a MoE, eager; its logits are those of the whole model again afterwards.
        pairs: (decoder layer, expert), -1 for the shared experts of the layer; none skips nothing.

    Raises:
        BadConfig: no such layer or expert.
        UnsupportedModel: no MoE, or a compiled one.
    """
    refuse_compiled(model)
    with contextlib.ExitStack() as skipping:  # undone whatever happens, also where a later pair is refused
        for layer, experts in by_layer(model, pairs):
            skipping.enter_context(skipped(layer, experts))
        yield


@contextlib.contextmanager
def skipped(layer: MoELayer, experts: Collection[int]) -> Iterator[None]:
    """`without_experts` for one layer, which need not stand in a whole model.

    Args:
        layer: a live layer.
        experts: that it has, -1 for its shared ones.
    """
    with contextlib.ExitStack() as hooks:
        if routed := sorted(set(experts) - {SHARED}):
            hook = layer.experts.register_forward_pre_hook(_gates_zeroed(layer, routed), with_kwargs=True)
            hooks.callback(hook.remove)
        for module in layer.shared if SHARED in experts else ():
            hooks.callback(module.register_forward_hook(_silenced).remove)
        yield


def _gates_zeroed(layer: MoELayer, experts: Sequence[int]) -> Any:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _, index_TK, _ = read_arguments(layer, args, kwargs)  # refuses what is not (hidden, indices, gates)
        gates = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()][1]
        gone = torch.tensor(experts, dtype=torch.int64, device=gates.device)
        if gates.shape == index_TK.shape:
            changed = gates.masked_fill(torch.isin(index_TK.long(), gone), 0.0)
        else:  # a gate for every expert
            changed = gates.index_fill(1, gone, 0.0)

        def swap(value: Any) -> Any:
            return changed if value is gates else value

        return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}

    return hook


def _silenced(module: nn.Module, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def random_experts(
    experts: Mapping[int, int], like: Collection[Pair], *, seed: int, same_layers: bool = False
) -> list[Pair]:
    """As many other routed experts, drawn at random: what an ablation is compared with.

    Args:
        experts: decoder layer -> E.
        like: the pairs that they stand for; never drawn.
        seed: equal seeds draw equal pairs.
        same_layers: draw as many in each layer as `like` has there; else from all layers.

    Raises:
        BadConfig: there are not so many others.
    """
    generator = torch.Generator().manual_seed(seed)
    taken = set(like)
    others = [(layer, e) for layer in sorted(experts) for e in range(experts[layer]) if (layer, e) not in taken]
    groups = [(len(like), others)]
    if same_layers:
        counts = Counter(layer for layer, _ in like)
        groups = [(count, [pair for pair in others if pair[0] == layer]) for layer, count in sorted(counts.items())]
    drawn: list[Pair] = []
    for count, pool in groups:
        if count > len(pool):
            raise BadConfig(f"{count} other experts are wanted, but there are {len(pool)}", hint="take fewer pairs")
        drawn += [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]
    return sorted(drawn)


def random_control(
    experts: Mapping[int, int], shared: Collection[int], like: Collection[Pair], *, seed: int
) -> list[Pair]:
    """As many others, of the same layers where there are so many, else of any: what an ablation is compared with.

    Routed experts stand for routed ones; the shared experts of other layers for shared ones, and where there are not so
    many, routed ones.

    Args:
        experts: decoder layer -> E.
        shared: decoder layers with shared experts.
        like: the pairs that they stand for; never drawn.
        seed: equal seeds draw equal pairs.

    Raises:
        BadConfig: there are not so many others.
    """
    generator = torch.Generator().manual_seed(seed)
    left = {(layer, e) for layer, count in experts.items() for e in range(count)} | {(n, SHARED) for n in shared}
    left -= set(like)
    drawn: list[Pair] = []

    def draw(count: int, pool: Collection[Pair]) -> None:
        ordered = sorted(pool)
        some = [ordered[i] for i in torch.randperm(len(ordered), generator=generator)[:count].tolist()]
        drawn.extend(some)
        left.difference_update(some)

    draw(sum(e == SHARED for _, e in like), {pair for pair in left if pair[1] == SHARED})
    left = {pair for pair in left if pair[1] != SHARED}
    for layer, count in sorted(Counter(layer for layer, e in like if e != SHARED).items()):
        draw(count, {pair for pair in left if pair[0] == layer})
    draw(len(set(like)) - len(drawn), left)
    if len(drawn) < len(set(like)):
        raise BadConfig(
            f"{len(set(like))} other experts are wanted, but there are {len(drawn)}",
            hint="raise the thresholds, so that fewer experts are found, or go without the check (--no-proof)",
        )
    return sorted(drawn)
