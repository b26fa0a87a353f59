"""What a live model does without some of its experts: skipping them, the control, attention sinks.

Legend: B texts, S positions, T = B S, K choices a token, E experts, H hidden, A attention heads.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.compress.protect.super_experts import SHARED
from moekit.errors import BadConfig
from moekit.trace.massive import is_massive
from moekit.trace.observation import widest
from moekit.trace.recorder import evaluating
from moekit.trace.seam import decoder_layer, read_arguments, refuse_compiled, uses_sigmoid

# (decoder layer, expert); expert `SHARED` is all shared experts of the layer.
Pair = tuple[int, int]


def _by_layer(model: nn.Module, pairs: Collection[Pair]) -> Iterator[tuple[MoELayer, set[int]]]:
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
    with contextlib.ExitStack() as hooks:  # undone whatever happens, also where a later pair is refused
        for layer, experts in _by_layer(model, pairs):
            if routed := sorted(experts - {SHARED}):
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


@dataclass(frozen=True)
class Sink:
    """A token that carries a massive activation.

    Attributes:
        row: of the batch.
        position: in the row.
        token: its id.
        layer: after which decoder layer (of those with experts) the activation is largest.
        channel: which value of the residual stream.
        value: of it.
    """

    row: int
    position: int
    token: int
    layer: int
    channel: int
    value: float


def find_sinks(model: PreTrainedModel, ids_BS: Tensor) -> list[Sink]:
    """Tokens whose residual stream holds a massive activation after some MoE layer, wherever they stand.

    Args:
        model: a MoE.
        ids_BS: unpadded texts.
    """
    found: dict[tuple[int, int], Sink] = {}

    def look(layer: int, stream_BSH: Tensor) -> None:
        value_BS, channel_BS = stream_BSH.abs().float().max(dim=-1)
        median = stream_BSH.abs().float().median()
        for row, position in is_massive(value_BS, median).nonzero().tolist():
            channel = int(channel_BS[row, position])
            sink = Sink(
                row, position, int(ids_BS[row, position]), layer, channel, float(stream_BSH[row, position, channel])
            )
            if (known := found.get((row, position))) is None or abs(sink.value) > abs(known.value):
                found[row, position] = sink

    with contextlib.ExitStack() as hooks, evaluating(model):
        for layer in find_moe_layers(model):

            def after(module: nn.Module, args: Any, output: Any, index: int = layer.index) -> None:
                look(index, output[0] if isinstance(output, tuple) else output)

            hooks.callback(decoder_layer(model, layer).register_forward_hook(after).remove)
        model(input_ids=ids_BS.to(model.device), use_cache=False)
    return [found[place] for place in sorted(found)]


def sinks_mask(sinks: Collection[Sink], like_BS: Tensor) -> Tensor:
    """True at the sinks, [B, S]."""
    mask_BS = torch.zeros(like_BS.shape, dtype=torch.bool)
    for sink in sinks:
        mask_BS[sink.row, sink.position] = True
    return mask_BS


def sink_mass(attention_BASS: Tensor, sinks_BS: Tensor) -> Tensor:
    """Attention that all queries pay to the sinks, by text and head, [B, A].

    Args:
        attention_BASS: attention maps, queries before keys.
        sinks_BS: True at the sinks.
    """
    paid_BAS = attention_BASS.sum(dim=2, dtype=widest(attention_BASS.device))
    return (paid_BAS * sinks_BS.to(paid_BAS.device)[:, None]).sum(dim=-1)


def attention_sink_decay(before_BASS: Tensor, after_BASS: Tensor, sinks_BS: Tensor) -> float:
    """ASDR of one layer (paper section 5): 0 where sinks are kept, 1 where they are gone.

    1 - mean over texts and heads of (attention paid to sinks after) / (attention paid to sinks before).

    Args:
        before_BASS: attention maps of the whole model, queries before keys.
        after_BASS: those of the model without some experts.
        sinks_BS: True at the sinks. Heads that paid them nothing before are left out.
    """
    return _decay(sink_mass(before_BASS, sinks_BS), sink_mass(after_BASS, sinks_BS))


def _decay(before_BA: Tensor, after_BA: Tensor) -> float:
    paid_BA = before_BA > 0
    return float(1 - (after_BA[paid_BA] / before_BA[paid_BA]).mean()) if bool(paid_BA.any()) else 0.0


@torch.no_grad()
def _sink_masses(model: PreTrainedModel, ids_BS: Tensor, sinks_BS: Tensor) -> list[Tensor | None]:
    rows = []
    for ids_S, sinks_S in zip(ids_BS, sinks_BS, strict=True):  # maps of one text at a time
        maps = model(input_ids=ids_S[None].to(model.device), use_cache=False, output_attentions=True).attentions
        rows.append([None if m is None else sink_mass(m, sinks_S[None]).cpu() for m in maps])
    return [None if None in column else torch.cat(column) for column in zip(*rows, strict=True)]


def measure_sink_decay(
    model: PreTrainedModel, ids_BS: Tensor, pairs: Collection[Pair], sinks_BS: Tensor
) -> dict[int, float]:
    """ASDR of each attention layer when some experts are skipped.

    Args:
        model: a MoE; its attention runs eagerly meanwhile, the only way to see the maps.
        ids_BS: unpadded texts.
        pairs: what is skipped.
        sinks_BS: True at the sinks (`sinks_mask`).
    """
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with evaluating(model):
            before = _sink_masses(model, ids_BS, sinks_BS)
            with without_experts(model, pairs):
                after = _sink_masses(model, ids_BS, sinks_BS)
    finally:
        model.set_attn_implementation(chosen)
    both = enumerate(zip(before, after, strict=True))
    return {layer: _decay(b, a) for layer, (b, a) in both if b is not None and a is not None}


def sink_router_scores(
    model: PreTrainedModel, ids_BS: Tensor, pairs: Collection[Pair], sinks_BS: Tensor
) -> dict[Pair, tuple[float, float]]:
    """Mean router score of each routed expert at the sinks, and at all other tokens.

    Args:
        model: a MoE.
        ids_BS: unpadded texts.
        pairs: the experts.
        sinks_BS: True at the sinks.
    """
    scores: dict[int, Tensor] = {}
    wanted = list(_by_layer(model, [pair for pair in pairs if pair[1] != SHARED]))
    with contextlib.ExitStack() as hooks, evaluating(model):
        for layer, _ in wanted:
            sigmoid = uses_sigmoid(layer)

            def keep(m: nn.Module, args: Any, answer: Any, index: int = layer.index, sigmoid: bool = sigmoid) -> None:
                logits_TE = answer[0].reshape(-1, answer[0].shape[-1]).double().cpu()
                scores[index] = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1)

            hooks.callback(layer.require_router().register_forward_hook(keep).remove)
        model(input_ids=ids_BS.to(model.device), use_cache=False)
    at_T = sinks_BS.flatten()
    return {
        (layer.index, e): (float(scores[layer.index][at_T, e].mean()), float(scores[layer.index][~at_T, e].mean()))
        for layer, experts in wanted
        for e in sorted(experts)
    }
