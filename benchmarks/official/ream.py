"""REAM (arXiv:2604.04356): saliency, groups, alignment and the whole merger of SamsungSAILMontreal/ream.

Legend: N tokens, E experts, I width, H hidden.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moekit.compress.maths.clustering.pseudo_pruning import pseudo_pruning
from moekit.compress.maths.neurons.align import align_experts
from moekit.compress.merge.ream import REAM, gate_similarity
from moekit.compress.weights import LayerWeights

from . import shared
from .shared import HIDDEN, LAYERS, Table

KEEP = 5
# Their weights go through a PCA to 64 numbers a neuron, so there must be that many.
NEURONS = 64
IDS = shared.tokens(8, 32, seed=1)


def run(checkout: Path) -> Table:
    """All comparisons on one checkout."""
    table = Table(f"REAM, SamsungSAILMontreal/ream at {shared.commit(checkout)}")
    with (
        shared.importing(checkout, bare=("data",), stubs=("data.calibration_data",)) as load,
        shared.quiet(),
        shared.on_cpu(),
        tempfile.TemporaryDirectory() as folder,
    ):
        merger = load("ream.merger")
        vars(merger)["print_seq_stats"] = lambda *a, **k: None
        _rename(load("ream.moe_utils"))
        model = shared.tiny("qwen3_moe", norm_topk_prob=False)
        checkpoint = shared.save(model, Path(folder) / "m")
        for group_size in (3, 0):
            _pipeline(table, merger, model, checkpoint, Path(folder), group_size)
        _saliency(table, load("ream.saliency"), load("ream.moe_utils"), model, checkpoint)
        _groups(table, load("ream.ream"))
        _token_similarity(table, load("ream.ream"))
        _alignment(table, merger, load("ream.moe_utils"), load("ream.weight_utils"))
    return table


def _rename(module: Any) -> None:
    """Transformers has renamed an argument, and dropped one, of what makes causal masks."""
    make = module.create_causal_mask
    known = inspect.signature(make).parameters

    def masked(**given: Any) -> Any:
        if "inputs_embeds" in known:
            given["inputs_embeds"] = given.pop("input_embeds")
        return make(**{name: value for name, value in given.items() if name in known})

    module.create_causal_mask = masked


@contextlib.contextmanager
def _standing(folder: Path) -> Iterator[None]:
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def _merged(module: Any, model: Any, folder: Path, **settings: Any) -> Any:
    """Their whole run, on a batch that lies where they look for one."""
    (folder / "data").mkdir(exist_ok=True)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    torch.save(batch, folder / "data" / f"own_b{len(IDS)}_seq{IDS.shape[1]}_qwen3_seed42.pt")
    with _standing(folder), torch.no_grad():
        return module.Merger(
            copy.deepcopy(model),
            **{"merge_size": KEEP, "dataset": "own", "mix_ratio": "1.0", "verbose": False, "batch_size": len(IDS)},
            **{"calibration_data_size": len(IDS), "calibration_data_seq_len": IDS.shape[1]},
            **settings,
        ).fit()


def _pipeline(table: Table, module: Any, model: Any, checkpoint: Any, folder: Path, group_size: int) -> None:
    official = _merged(module, model, folder, group_size=group_size, merging="avg_freq")
    method = REAM(gate_power=2, similarity="mean", group_size=group_size, align="none")
    made = shared.plan(checkpoint, [IDS], method, KEEP)
    ours = shared.changed(copy.deepcopy(model), made, checkpoint)
    rows = [layer.mlp.gate.weight for layer in official.model.layers]
    kept = [
        tuple(int((layer.mlp.gate.weight == row).all(-1).nonzero()[0]) for row in found)
        for layer, found in zip(model.model.layers, rows, strict=True)
    ]
    told = f"groups of {group_size} at most" if group_size else "nearest centroid"
    table.same(
        f"experts that stay of 8 in 3 layers, decided one behind the other, {told}",
        kept,
        [made.outcomes[n].keep for n in range(LAYERS)],
    )
    ids = shared.tokens(2, 24, seed=9)
    with torch.no_grad():
        apart = float((official(ids).logits - model(ids).logits).abs().max())
        table.close(
            f"logits of the merged model, {told}, not aligned (merging moves them by {apart:.2f})",
            official(ids).logits,
            ours(ids).logits,
        )


def _saliency(table: Table, module: Any, utils: Any, model: Any, checkpoint: Any) -> None:
    """On the first layer, whose input no merge has changed, all tokens at once and row by row."""
    given: list[Tensor] = []
    block = model.model.layers[0].mlp
    hook = block.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    whole, *parts = (
        module.reap(logits, outputs, top_k=model.config.num_experts_per_tok)
        for logits, outputs, _ in (utils.run_all_experts(block, x) for x in (given[0], *given[0].split(1)))
    )
    ours = {}
    for power in (1, 2):
        method = REAM(gate_power=power, mode="layerwise")
        ours[power] = [method.score(shared.seen(checkpoint, ids, method)[0]) for ids in ([IDS], list(IDS.split(1)))]
    table.close("saliency of layer 0, its gate twice (`gate_power=2`)", whole, ours[2][0])
    order = [scores.argsort(descending=True).tolist() for scores in (whole, ours[1][0])]
    table.tell(
        f"the {KEEP} most salient of layer 0",
        sorted(order[0][:KEEP]),
        f"{sorted(order[1][:KEEP])} with the gate once, as in the paper (`gate_power=1`, the default)",
        "official errs: outputs come gated and are gated again",
    )
    split = torch.stack(parts).mean(0)
    moved = [float(((a - b).abs() / a).max()) for a, b in ((whole, split), ours[2])]
    table.tell(
        "how far a saliency moves when 8 rows come in 8 batches",
        f"up to {100 * moved[0]:.0f} %",
        f"up to {100 * moved[1]:.0g} %",
        "official errs: a mean of batch means, in which batches without the expert count 0",
    )


def _groups(table: Table, module: Any) -> None:
    theirs: list[Any] = []
    ours: list[Any] = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        saliency = torch.rand(16, generator=generator)
        outputs, logits = torch.randn(16, 1, 8, generator=generator), torch.randn(40, 16, generator=generator)
        z = logits.double()
        alike = torch.nn.functional.cosine_similarity(outputs.transpose(0, 1), outputs, dim=-1).double()
        distance = 1 - (gate_similarity(z.T @ z) + (alike + 1) / 2) / 2
        for keep, size in ((8, 4), (12, 3), (6, 0)):
            labels, _ = module.pseudo_group(saliency, outputs, keep, logits, size)
            theirs.append(shared.partition(labels.tolist()))
            ours.append(frozenset(map(frozenset, pseudo_pruning(saliency, distance, keep, size))))
    table.same("groups of 16 experts, 60 draws of three sizes", theirs, ours)


def _token_similarity(table: Table, module: Any) -> None:
    """Their function gives the paper's mean over tokens, but the merger hands it one mean output an expert."""
    first, second = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    gates = torch.tensor([[0.8, 0.1], [0.1, 0.7]])
    token = module.expert_similarity(first, second)
    gated = [(rows * gates[i][:, None]).mean(0, keepdim=True) for i, rows in enumerate((first, second))]
    mean = module.expert_similarity(*gated)
    table.tell(
        "output similarity of two experts on two tokens",
        f"{mean:.4f} as the merger calls it (gated means)",
        f"{token:.4f} with `similarity=token`, the paper's; {mean:.4f} with `similarity=mean`",
        "moekit differs on purpose: the paper's by default",
    )


def _alignment(table: Table, merger: Any, utils: Any, weights_of: Any) -> None:
    """How many neurons of a permuted, noisy copy find their partner."""
    rounds = 5
    for noise in (0.0, 4.0):
        found = dict.fromkeys(("activations", "weights", "both", "activations, paired", "both, paired", "moekit"), 0.0)
        for seed in range(rounds):
            weights, order = _copies(seed, noise)
            block = _block(weights)
            x = torch.randn(1, 2048, HIDDEN, generator=torch.Generator().manual_seed(100 + seed))
            np.random.seed(seed)
            _, _, unpaired = utils.run_all_experts(block, x, act_samples=512)
            _, _, every = utils.run_all_experts(block, x)
            unit = merger.normalize_rows(weights_of.experts_weight_matrix(block.experts)).flatten(0, 1)
            small = weights_of.pca_reduce(unit, r=64).reshape(2, NEURONS, 64)
            for name, merging, act in (
                ("activations", "logits", unpaired),
                ("weights", "weights", unpaired),
                ("both", "logits+weights", unpaired),
                ("activations, paired", "logits", every),
                ("both, paired", "logits+weights", every),
            ):
                found[name] += _recovered(merger, block, merging, small, act, order) / rounds
            ours = align_experts(weights, 0, 1, distance="directions").order_I
            found["moekit"] += float((ours == order).float().mean()) / rounds
        told = {name: f"{100 * value:.0f} %" for name, value in found.items()}
        table.tell(
            f"neurons of a permuted copy that find their partner, {rounds} experts of {NEURONS}, noise {noise:g} x",
            f"activations {told['activations']}, weights {told['weights']}, both (their default) {told['both']}",
            f"weights {told['moekit']}",
            "official errs: each expert's activations are of other tokens; of the same tokens activations find "
            f"{told['activations, paired']}, both {told['both, paired']}",
        )


def _copies(seed: int, noise: float) -> tuple[LayerWeights, Tensor]:
    first = shared.layer_weights(2, NEURONS, HIDDEN, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(NEURONS, generator=generator)
    assert first.gate_EIH is not None
    for stack, axis in ((first.gate_EIH, 0), (first.up_EIH, 0), (first.down_EHI, 1)):
        noisy = stack[0] + noise * torch.randn(stack[0].shape, generator=generator)
        stack[1].copy_(noisy.index_select(axis, order))
    return first, order.argsort()


def _block(weights: LayerWeights) -> Any:
    experts = nn.Module()
    assert weights.gate_EIH is not None
    experts.gate_up_proj = nn.Parameter(torch.cat([weights.gate_EIH, weights.up_EIH], 1) / HIDDEN**0.5)
    experts.down_proj = nn.Parameter(weights.down_EHI / NEURONS**0.5)
    experts.num_experts, experts.intermediate_dim, experts.act_fn = 2, NEURONS, nn.SiLU()
    gate = nn.Linear(HIDDEN, 2, bias=False)
    return types.SimpleNamespace(experts=experts, gate=gate)


def _recovered(merger: Any, block: Any, merging: str, small: Tensor, act: Tensor, order: Tensor) -> float:
    """Their merge, with what it permutes looked at."""
    seen: list[Any] = []
    apply = merger.apply_perm_to_ffn

    def watched(ffn: Any, perm: Any, **given: Any) -> Any:
        seen.append(perm)
        return apply(ffn, perm, **given)

    merger.apply_perm_to_ffn = watched
    try:
        me = types.SimpleNamespace(merging=merging, device="cpu")
        merger.Merger._merge(me, block.experts, np.array([0, 1]), np.array([0.7, 0.3]), small, act)
    finally:
        merger.apply_perm_to_ffn = apply
    return float((torch.as_tensor(seen[0]) == order).float().mean())
