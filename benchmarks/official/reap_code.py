"""REAP (arXiv:2510.13999): saliency, M-SMoE's groups, alignment and merge of CerebrasResearch/reap.

Legend: N tokens, E experts, I width, H hidden.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.compress.maths.neurons.align import align_experts
from moekit.compress.maths.neurons.merging import member_shares, merge_groups
from moekit.compress.prune.ean import EAN
from moekit.compress.prune.reap import REAP
from moekit.compress.weights import LayerWeights

from . import shared
from .mc_smoe import dominant_counts
from .shared import EXPERTS, HIDDEN, LAYERS, WIDTH, Legacy, Table

NAMES = ("gate_proj", "up_proj", "down_proj")
BATCHES = [shared.tokens(4, 32, seed=1), shared.tokens(3, 32, seed=2)]
ATTRS = {**dict(zip(NAMES, NAMES, strict=True)), "experts": "experts", "fused": False, "router": "gate"}


def run(checkout: Path) -> Table:
    """All comparisons on one checkout."""
    table = Table(f"REAP, CerebrasResearch/reap at {shared.commit(checkout)}")
    with (
        shared.importing(checkout / "src", bare=("reap",), stubs=()) as load,
        shared.quiet(),
        tempfile.TemporaryDirectory() as folder,
    ):
        metrics = load("reap.pruning_metrics")
        for normal in (True, False):
            model = shared.tiny("qwen3_moe", norm_topk_prob=normal)
            checkpoint = shared.save(model, Path(folder) / str(normal))
            _saliency(table, metrics, model, checkpoint, normal)
        _groups(table, load("reap.cluster"))
        _merge(table, load("reap.merge"), load("reap.permute"))
    return table


def _observed(metrics: Any, model: Any, *, renormalise: bool) -> list[dict[str, Any]]:
    """Their state of each layer, fed as their hook feeds it: every expert on every token."""
    legacy = Legacy(copy.deepcopy(model), NAMES)
    states = [metrics.initialize_pruning_state(EXPERTS) for _ in legacy.layers()]
    inputs: dict[int, Tensor] = {}
    for n, layer in enumerate(legacy.layers()):
        layer.mlp.register_forward_hook(lambda m, a, o, n=n: inputs.update({n: a[0].reshape(-1, HIDDEN)}))
    with torch.no_grad():
        for ids in BATCHES:
            logits = legacy(input_ids=ids).router_logits
            for n, layer in enumerate(legacy.layers()):
                metrics.update_pruning_state(
                    states[n],
                    activations=torch.stack([expert(inputs[n]) for expert in layer.mlp.experts]),
                    selected_experts=logits[n].topk(model.config.num_experts_per_tok, -1).indices,
                    router_logits=logits[n],
                    num_experts=EXPERTS,
                    renormalize_router_weights=renormalise,
                )
    return states


def _saliency(table: Table, metrics: Any, model: Any, checkpoint: Any, normal: bool) -> None:
    told = "normalises" if normal else "does not normalise"
    methods = {True: REAP(renormalise=True), False: REAP(renormalise=False)}
    looked = {r: shared.seen(checkpoint, BATCHES, method) for r, method in methods.items()}
    ours = {r: torch.stack([m.score(looked[r][n]) for n in range(LAYERS)]) for r, m in methods.items()}
    states = {r: _observed(metrics, model, renormalise=r) for r in (True, False)}
    theirs = {r: torch.stack([s["reap"].mean for s in states[r]]) for r in (True, False)}
    table.close(f"saliency of a model that {told}, renormalised", theirs[True], ours[True])
    if normal:
        mean = torch.stack([s["ean_sum"] for s in states[True]])
        seen = shared.seen(checkpoint, BATCHES, EAN())
        table.close("EAN, the sum of output norms", mean, torch.stack([EAN().score(seen[n]) for n in range(LAYERS)]))
        apart = float((theirs[False] - ours[False]).abs().max() / ours[False].max())
        table.tell(
            "the same model, their renormalisation off",
            f"gates that the model does not use, up to {100 * apart:.0f} % off",
            "`renormalise=false` takes gates as they multiply outputs: here the same as renormalised",
            "moekit differs on purpose",
        )
    else:
        table.close(f"saliency of a model that {told}, as the model weighs", theirs[False], ours[False])
        order = [scores.argsort(descending=True).tolist() for scores in (theirs[False], theirs[True])]
        places = sum(a != b for one, two in zip(*order, strict=True) for a, b in zip(one, two, strict=True))
        table.tell(
            "what renormalising does to such a model's ranking",
            f"{places} of {LAYERS * EXPERTS} places change; `main.py` does not do it here, `layerwise_prune.py` does",
            "on by default (`renormalise`), as in `layerwise_prune.py`",
            "official errs: its two entries give different scores",
        )


def _groups(table: Table, cluster: Any) -> None:
    equal: list[Any] = []
    ours: list[Any] = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        use = torch.randperm(400, generator=generator)[:24].reshape(3, 8) + 1
        shares = {n: use[n] / use[n].sum() for n in range(3)}
        distances = {n: torch.zeros(8, 8) for n in range(3)}
        found = cluster.mc_smoe_clustering(distances, shares, 12)
        equal.append([len(found[n].unique()) for n in range(3)])
        ours.append(dominant_counts(use.tolist(), 4))
    table.same("M-SMoE's dominant experts of 3 layers, 20 draws", equal, ours)


def _merge(table: Table, merge: Any, permute: Any) -> None:
    groups, labels, proba = [[0, 1, 3], [2]], torch.tensor([0, 0, 1, 0]), torch.tensor([0.2, 0.4, 0.3, 0.1])
    cheaper, dearer, whole = 0, 0, 0
    theirs: list[Tensor] = []
    ours: list[Tensor] = []
    for seed in range(20):
        weights = shared.layer_weights(4, WIDTH, HIDDEN, seed)
        block = nn.Module()
        block.experts = nn.ModuleList([shared.LegacyExpert(*matrices, names=NAMES) for matrices in _stacks(weights)])
        moved = copy.deepcopy(block.experts)
        permute.WeightMatchingPermuter(ATTRS).permute(moved, groups[0], 1)
        costs = [(_distance(moved[e], block.experts[1]), align_experts(weights, 1, e).cost) for e in (0, 3)]
        less = [one > two * (1 + 1e-9) for one, two in costs]
        cheaper += sum(less)
        dearer += sum(one < two * (1 - 1e-9) for one, two in costs)
        merge.MoEExpertMerger(
            moe=block, cluster_label=labels, expert_proba=proba, model_attrs=ATTRS, permute="wm"
        ).merge_experts()
        orders = {e: align_experts(weights, 1, e).order_I for e in (0, 3)}
        shares = member_shares(proba, groups)
        made = merge_groups(weights, [1, 2], groups, shares, match=lambda _, member, found=orders: found[member])
        if any(less):
            continue
        whole += 1
        for position, expert in enumerate((0, 2)):
            theirs += [matrix.flatten() for matrix in _matrices(block.experts[expert])]
            ours += [matrix.flatten() for matrix in next(iter(_stacks(made, position)))]
    table.tell(
        "order of neurons, 40 pairs of experts of three matrices",
        f"{cheaper} cost more than moekit's",
        f"{dearer} cost more than theirs",
        "official errs slightly: costs are rounded to fp16 before the assignment",
    )
    what = f"merged experts of the {whole} layers of 20 whose orders are equal"
    table.close(what, torch.cat(theirs), torch.cat(ours))


def _stacks(weights: LayerWeights, start: int = 0) -> Any:
    assert weights.gate_EIH is not None
    return zip(weights.gate_EIH[start:], weights.up_EIH[start:], weights.down_EHI[start:], strict=True)


def _matrices(expert: Any) -> list[Tensor]:
    return [getattr(expert, name).weight for name in NAMES]


def _distance(one: Any, other: Any) -> float:
    pairs = zip(_matrices(one), _matrices(other), strict=True)
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
