"""M-SMoE (arXiv:2310.01334): usage, similarity, dominant experts, groups and merge of UNITES-Lab/MC-SMoE.

Their script for Mixtral does not align neurons; alignment is compared on the function that their script for Switch
Transformers calls. Legend: E experts, I width, H hidden.
"""

from __future__ import annotations

import copy
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import Geometry
from moekit.compress.budget.sizes import Budget, ByteSizes
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.maths.neurons.align import align_experts
from moekit.compress.maths.neurons.merging import member_shares, merge_groups
from moekit.compress.merge.m_smoe import MSMoE
from moekit.compress.weights import LayerWeights
from moekit.trace.statistics import LayerStatistics

from . import shared
from .shared import HIDDEN, LAYERS, WIDTH, Legacy, Table

NAMES = ("w1", "w3", "w2")
KEEP = 4
BATCHES = [shared.tokens(4, 32, seed=1), shared.tokens(3, 32, seed=2)]


def run(checkout: Path) -> Table:
    """All comparisons on one checkout."""
    table = Table(f"MC-SMoE, UNITES-Lab/MC-SMoE at {shared.commit(checkout)}")
    with (
        shared.importing(
            checkout,
            bare=("mcsmoe", "mcsmoe.utils", "mcsmoe.merging", "mcsmoe.models"),
            stubs=("mcsmoe.models.fsgpt_moe",),
        ) as load,
        shared.quiet(),
        shared.on_cpu(),
        tempfile.TemporaryDirectory() as folder,
    ):
        mixtral = load("mcsmoe.merging.grouping_mixtral")
        model = shared.tiny("mixtral")
        checkpoint = shared.save(model, Path(folder) / "m")
        _pipeline(table, mixtral, model, checkpoint)
        _unused(table, mixtral)
        _ties(table, mixtral)
        _padding(table, mixtral, model, checkpoint)
        _alignment(table, load("mcsmoe.merging.permutation"))
    return table


def _grouper(module: Any, model: Legacy, batches: list[dict[str, Tensor]]) -> Any:
    grouper = module.ExpertsGrouperForMixtral(model.config, similarity_base="router-logits")
    grouper.compute_all_usages(model, batches)
    grouper.compute_all_similarities(model, batches)
    return grouper


def _name(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe"


def _pipeline(table: Table, module: Any, model: Any, checkpoint: Any) -> None:
    legacy = Legacy(copy.deepcopy(model), NAMES, "block_sparse_moe")
    # Their loop stacks the logits of batches: all of one length.
    grouper = _grouper(module, legacy, [{"input_ids": ids} for ids in BATCHES])
    method = MSMoE(align="none", router="redirect")
    looked = shared.seen(checkpoint, BATCHES, method)
    usage, similarity = grouper.usage_frequency_state_dict(), grouper.similarity_state_dict()
    layers = range(LAYERS)
    table.close(
        "usage A, 3 layers of 8 experts",
        torch.stack([usage[_name(n)] for n in layers]),
        torch.stack([method.score(looked[n]) for n in layers]),
    )
    # Theirs is (cos + 1) / 2.
    table.close(
        "cosine of router logits",
        torch.stack([2 * similarity[_name(n)] - 1 for n in layers]),
        torch.stack([torch.from_numpy(method.alike(looked[n])) for n in layers]),
    )
    made = shared.plan(checkpoint, BATCHES, method, KEEP, scope="global", least=2)
    dominant = grouper.group_experts_globally_from_dominant_experts(KEEP, list(layers))
    table.same(
        "dominant experts, 12 of 24 over all layers",
        [tuple(sorted(dominant[_name(n)])) for n in layers],
        [made.outcomes[n].keep for n in layers],
    )
    labels = grouper.group_state_dict()
    table.same(
        "groups of each layer",
        [shared.partition(labels[_name(n)].tolist()) for n in layers],
        [shared.groups_of(made.outcomes[n]) for n in layers],
    )
    merged = module.merge_by_groups_with_usage_weighted(legacy, grouper)
    official = copy.deepcopy(model)
    for layer, block in zip(official.model.layers, merged.layers(), strict=True):
        shared.fill(layer.mlp, [tuple(getattr(e, name).weight for name in NAMES) for e in block.mlp.experts])
    with torch.no_grad():
        ids = shared.tokens(2, 24, seed=9)
        ours = shared.changed(copy.deepcopy(model), made, checkpoint)
        apart = float((official(ids).logits - model(ids).logits).abs().max())
        table.close(
            f"logits of the merged model (merging moves them by {apart:.2f})", official(ids).logits, ours(ids).logits
        )


def _state(module: Any, usage: Sequence[Sequence[float]]) -> Any:
    config = types.SimpleNamespace(num_local_experts=len(usage[0]), hidden_size=4, num_hidden_layers=len(usage))
    grouper = module.ExpertsGrouperForMixtral(config)
    for layer, own in enumerate(usage):
        grouper._usage_frequency_state_dict[_name(layer)] = torch.tensor(own) / sum(own)
    return grouper


def dominant_counts(usage: Sequence[Sequence[float]], keep: int) -> list[int]:
    """How many experts moekit keeps of each layer, by their uses."""
    looked = {}
    for number, own in enumerate(usage):
        values = {"load": torch.tensor(own), "logit_gram": torch.eye(len(own))}
        geometry = _geometry(len(own))
        looked[number] = LayerInputs(number, geometry, LayerStatistics(len(own), 4, tokens=100, values=values))
    method = MSMoE()
    scores = {n: method.score(one) for n, one in looked.items()}
    sizes = ByteSizes({n: len(own) for n, own in enumerate(usage)}, 1, dict.fromkeys(looked, 1), 0)
    found = method.allocate(looked, scores, Budget(keep=keep, scope="global", least=1), sizes)
    return [found[n] for n in looked]


def _geometry(experts: int) -> Geometry:
    return Geometry(4, experts, 1, 8, 0, True, False, False, True)


def _ties(table: Table, module: Any) -> None:
    for usage, keep in (
        ([[50, 30, 15, 5], [26, 25, 25, 24]], 2),
        ([[97, 1, 1, 1], [25, 25, 25, 25]], 2),
    ):
        counts = list(_state(module, usage)._assign_num_groups_per_layer(keep, [0, 1]).values())
        table.tell(
            f"dominant experts at {keep} a layer, uses {usage[0]} and {usage[1]}",
            f"{counts}, {sum(counts)} in all",
            f"{dominant_counts(usage, keep)}, {sum(dominant_counts(usage, keep))} in all",
            "official errs: keeps what is strictly above the next value, so ties lose experts",
        )


def _unused(table: Table, module: Any) -> None:
    weights = shared.layer_weights(4, 6, 4, seed=3)
    block = _block(weights)
    labels, usage = torch.tensor([0, 0, 1, 1]), torch.tensor([0.7, 0.3, 0.0, 0.0])
    module._merge_mlp_experts_by_usage_frequency_weighting(block, labels, usage)
    groups = [[0, 1], [2, 3]]
    ours = merge_groups(weights, [0, 2], groups, member_shares(usage, groups))
    theirs = block.experts[0].w1.weight
    assert ours.gate_EIH is not None
    table.close("merged expert, shares .7 and .3", theirs, ours.gate_EIH[0])
    table.tell(
        "norm of a group that no token chose",
        f"{float(block.experts[2].w1.weight.norm()):.3g}",
        f"{float(ours.gate_EIH[1].norm()):.3g}",
        "official errs: divides 0 by 1e-7, and the merged expert is all zeros; moekit takes equal shares",
    )


def _block(weights: LayerWeights) -> Any:
    assert weights.gate_EIH is not None
    stacks = zip(weights.gate_EIH, weights.up_EIH, weights.down_EHI, strict=True)
    experts = nn.ModuleList([shared.LegacyExpert(*matrices, NAMES) for matrices in stacks])
    return types.SimpleNamespace(experts=experts)


def _padding(table: Table, module: Any, model: Any, checkpoint: Any) -> None:
    ids, mask = shared.tokens(4, 32, seed=4), torch.ones(4, 32, dtype=torch.long)
    ids[1:, 8:], mask[1:, 8:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    grouper = _grouper(module, Legacy(copy.deepcopy(model), NAMES, "block_sparse_moe"), [batch])
    method = MSMoE()
    ours = method.score(shared.seen(checkpoint, [batch], method)[0])
    theirs = grouper.usage_frequency_state_dict()[_name(0)]
    table.tell(
        "usage of layer 0, 128 positions of which 72 are padding",
        f"[{', '.join(f'{a:.2f}' for a in theirs.tolist())}]",
        f"[{', '.join(f'{a:.2f}' for a in ours.tolist())}]",
        "official errs: padding counts as text",
    )


def _alignment(table: Table, module: Any) -> None:
    equal, moved = [], []
    for seed in range(20):
        weights = shared.layer_weights(2, WIDTH, HIDDEN, seed)
        weights = LayerWeights(up_EIH=weights.up_EIH, down_EHI=weights.down_EHI, router=weights.router)
        pair = [
            types.SimpleNamespace(
                wi=types.SimpleNamespace(weight=weights.up_EIH[e]), wo=types.SimpleNamespace(weight=weights.down_EHI[e])
            )
            for e in range(2)
        ]
        order = module.compute_switch_permutation_by_weight_matching(*pair, include_wo=True)
        equal.append(order.tolist())
        moved.append(align_experts(weights, 0, 1).order_I.tolist())
    table.same("order of neurons, 20 pairs of experts of two matrices", equal, moved)
