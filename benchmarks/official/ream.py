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
from .shared import EXPERTS, HIDDEN, LAYERS, Table

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
        merger.print_seq_stats = lambda *a, **k: None
        _rename(load("ream.moe_utils"))
        model = shared.tiny("qwen3_moe", norm_topk_prob=False)
        checkpoint = shared.save(model, Path(folder) / "m")
        for group_size in (3, 0):
            _pipeline(table, merger, model, checkpoint, Path(folder), group_size)
        _saliency(table, load("ream.saliency"))
        _batches(table, load("ream.saliency"))
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


def _saliency(table: Table, module: Any) -> None:
    """A has p = .2 on two tokens of norm 8, B p = .5 on two of norm 3; the third takes the rest."""
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(2, 3)
    outputs = torch.zeros(3, 2, 1)
    outputs[0], outputs[1], outputs[2] = 8.0, 3.0, 1.0
    gated = outputs * logits.exp().T[..., None]
    once, twice = (module.reap(logits[None], given, top_k=3) for given in (outputs, gated))
    table.tell(
        "saliency of A (p .2, norm 8) and B (p .5, norm 3)",
        f"{float(twice[0]):.2f} and {float(twice[1]):.2f} as the merger calls it: B stays",
        f"{float(once[0]):.2f} and {float(once[1]):.2f} with `gate_power=1`: A stays",
        "official errs: outputs come gated and are gated again; `gate_power=2` is theirs",
    )


def _batches(table: Table, module: Any) -> None:
    """The same tokens in one batch and in eight, an expert that two of the eight never choose."""
    generator = torch.Generator().manual_seed(0)
    logits, outputs = torch.randn(64, EXPERTS, generator=generator), torch.randn(EXPERTS, 64, 4, generator=generator)
    logits[:48, 0] = -9
    whole = module.reap(logits[None], outputs, top_k=2)
    parts = [module.reap(logits[None, i : i + 8], outputs[:, i : i + 8], top_k=2) for i in range(0, 64, 8)]
    split = torch.stack(parts).mean(0)
    table.tell(
        "saliency of an expert chosen in the last quarter of the text only",
        f"{float(whole[0]):.3f} in one batch, {float(split[0]):.3f} in eight",
        f"{float(whole[0]):.3f} however batched (sums over all tokens)",
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
    saliency = torch.rand(7, generator=torch.Generator().manual_seed(0))
    outputs = torch.randn(7, 1, 8, generator=torch.Generator().manual_seed(1))
    try:
        labels, _ = module.pseudo_group(saliency, outputs, 3, None, 2)
        told = f"{len(set(labels.tolist()))} groups"
    except (AssertionError, ValueError) as error:
        told = type(error).__name__
    table.tell("7 experts in 3 groups of 2, which hold 6", told, "refused with sizes that do", "both refuse")


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
    """How many neurons of a permuted, slightly noisy copy find their partner."""
    found = {"weights": 0.0, "logits": 0.0, "logits+weights": 0.0, "paired": 0.0, "moekit": 0.0}
    rounds = 5
    for seed in range(rounds):
        weights, order = _copies(seed)
        block = _block(weights)
        x = torch.randn(1, 2048, HIDDEN, generator=torch.Generator().manual_seed(100 + seed))
        np.random.seed(seed)
        _, _, unpaired = utils.run_all_experts(block, x, act_samples=512)
        _, _, every = utils.run_all_experts(block, x)
        matrix = weights_of.experts_weight_matrix(block.experts)
        unit = merger.normalize_rows(matrix).flatten(0, 1)
        small = weights_of.pca_reduce(unit, r=64).reshape(2, NEURONS, 64)
        for merging in ("weights", "logits", "logits+weights"):
            found[merging] += _recovered(merger, block, merging, small, unpaired, order)
        found["paired"] += _recovered(merger, block, "logits", small, every if every is not None else unpaired, order)
        ours = align_experts(weights, 0, 1, distance="directions").order_I
        found["moekit"] += float((ours == order).float().mean())
    told = {name: f"{100 * value / rounds:.0f} %" for name, value in found.items()}
    table.tell(
        f"neurons of a noisy permuted copy that find their partner, {rounds} experts of {NEURONS}, tokens drawn as theirs",
        f"activations {told['logits']}, weights {told['weights']}, both (their default) {told['logits+weights']}",
        f"weights {told['moekit']}",
        f"official errs: each expert's activations are of other tokens; of the same tokens they find {told['paired']}",
    )


def _copies(seed: int) -> tuple[LayerWeights, Tensor]:
    first = shared.layer_weights(2, NEURONS, HIDDEN, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(NEURONS, generator=generator)
    assert first.gate_EIH is not None
    for stack, axis in ((first.gate_EIH, 0), (first.up_EIH, 0), (first.down_EHI, 1)):
        noisy = stack[0] + 0.5 * torch.randn(stack[0].shape, generator=generator)
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
    merger.apply_perm_to_ffn = lambda ffn, perm, **k: (seen.append(perm), apply(ffn, perm, **k))[1]
    try:
        me = types.SimpleNamespace(merging=merging, device="cpu")
        merger.Merger._merge(me, block.experts, np.array([0, 1]), np.array([0.7, 0.3]), small, act)
    finally:
        merger.apply_perm_to_ffn = apply
    return float((torch.as_tensor(seen[0]) == order).float().mean())
