"""A change of a model's MoE layers, and what it does to one layer beside the layer as it is.

Legend: T positions of a batch, H hidden, K choices, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, flat_output
from moekit.compress.engine.carrying import carried_out
from moekit.compress.engine.dense_cuts import InputCut, mask
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.redirected_block import redirected_block
from moekit.compress.engine.redirecting import NovicesByLayer
from moekit.compress.engine.resize import Groups, resized_block, resized_config
from moekit.compress.weights import LayerWeights
from moekit.trace.seam import see_choices

Rewrite = Callable[[int, LayerWeights], LayerWeights]


@dataclass(frozen=True, eq=False)
class Variant:
    """A change of every MoE layer.

    Attributes:
        name: what to call it.
        outcomes: decoder layer -> which experts stay.
        rewrite: (layer, all experts' weights) -> weights of what stays; None keeps those as they are.
        top_k: choices a token makes; None as before.
        groups: "free" or "equal"; see `moekit.compress.engine.resize.resized_config`.
        novices: decoder layer -> constants of experts whose tokens go to nobody.
        cuts: name of a matrix outside of routed experts -> which of its inputs stay; the others count as zero.
    """

    name: str
    outcomes: Mapping[int, LayerOutcome]
    rewrite: Rewrite | None = None
    top_k: int | None = None
    groups: Groups = "free"
    novices: NovicesByLayer = field(default_factory=dict)
    cuts: Mapping[str, InputCut] = field(default_factory=dict)

    def cuts_at(self, layer: int) -> dict[str, InputCut]:
        """Those of one decoder layer."""
        return {name: cut for name, cut in self.cuts.items() if cut.layer == layer}


@dataclass
class ChangedLayer:
    """One variant's block of one layer, and sums over batches of what it does.

    Attributes:
        block: that runs in the layer's place.
        keep: whether an expert stays, and True behind the last for choices of no expert: [E + 1].
        difference: squared distance from the unchanged block's outputs.
        lost_tokens: tokens that had chosen an expert which is gone.
        lost_choices: choices of such experts.
    """

    block: nn.Module
    keep: Tensor
    difference: float = 0.0
    lost_tokens: int = 0
    lost_choices: int = 0


class Seen:
    """What a block was given, chose and gave in one pass."""

    def __init__(self, device: torch.device) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.output_TH = torch.zeros(0, device=device)
        self.index_TK = torch.zeros(0, dtype=torch.int64, device=device)

    def on_block(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Keep what went into the block and came out."""
        self.args, self.kwargs = args, kwargs
        self.output_TH = flat_output(output)

    def on_choices(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        """Keep which experts the tokens chose."""
        self.index_TK = index_TK


@contextlib.contextmanager
def watched(moe: MoELayer | None, device: torch.device) -> Iterator[Seen]:
    """See what a block is given, chooses and gives; nothing where there is none."""
    seen = Seen(device)
    if moe is None:
        yield seen
        return
    handles = [moe.block.register_forward_hook(seen.on_block, with_kwargs=True), see_choices(moe, seen.on_choices)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def as_written(variant: Variant, stored: torch.dtype) -> Variant:
    """The variant with weights rewritten in the type of the checkpoint, as on disk, whatever the layer computes in."""
    own = variant.rewrite
    if own is None:
        return variant

    def rewrite(layer: int, weights: LayerWeights) -> LayerWeights:
        made = own(layer, weights.map(lambda t: t.to(stored), router=False))
        return made.map(lambda t: t.to(weights.up_EIH.dtype), router=False)

    return replace(variant, rewrite=rewrite)


def changed_layer(variant: Variant, moe: MoELayer, weights: LayerWeights, config: Any) -> ChangedLayer:
    """A variant's block beside the unchanged one.

    Args:
        variant: the change.
        moe: the layer as it is.
        weights: of all its experts.
        config: the unchanged model's.
    """
    outcome = variant.outcomes[moe.index]
    own = variant.rewrite
    made = carried_out(weights, outcome, moe.index) if own is None else own(moe.index, weights)
    keep = torch.zeros(moe.geometry.experts + 1, dtype=torch.bool)
    keep[list(outcome.keep)] = True
    keep[-1] = True  # no expert, no loss
    if outcome.redirect is not None:
        whole = resized_config(config, moe.geometry.experts, top_k=variant.top_k, groups="equal", width=outcome.width)
        block = redirected_block(moe, whole, weights, made, outcome, variant.novices.get(moe.index))
        return ChangedLayer(block, keep)
    # Where any layer loses experts, all of them give up routing groups, also one that keeps all of its own.
    dropped = {len(d.keep) for d in variant.outcomes.values()} != {moe.geometry.experts}
    resized = resized_config(
        config, outcome.experts, top_k=variant.top_k, groups=variant.groups, dropped=dropped, width=outcome.width
    )
    block = resized_block(moe, resized, made, outcome)
    for name, cut in variant.cuts_at(moe.index).items():
        if name.startswith(f"{moe.name}."):
            mask(block.get_submodule(name.removeprefix(f"{moe.name}.")), cut)
    return ChangedLayer(block, keep)


def compare_layer(layer: ChangedLayer, seen: Seen, output_TH: Tensor, index_TK: Tensor, mask_T: Tensor) -> None:
    """Run a variant's block on what the unchanged one saw, and add up how they differ."""
    changed_TH = flat_output(layer.block(*seen.args, **seen.kwargs))[mask_T]
    layer.difference += float((changed_TH.double() - output_TH.double()).square().sum())
    gone_TK = ~layer.keep.to(index_TK.device)[index_TK.long()]
    layer.lost_tokens += int(gone_TK.any(1).sum())
    layer.lost_choices += int(gone_TK.sum())
