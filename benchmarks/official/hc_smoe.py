"""HC-SMoE (arXiv:2410.08589): features, clustering and merge of wazenmai/HC-SMoE.

Legend: E experts, H hidden.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from scipy.cluster import hierarchy
from torch import Tensor

from moekit.catalogue import make
from moekit.compress.maths.clustering.agglomerative import Linkage, agglomerate
from moekit.compress.maths.clustering.distances import euclidean
from moekit.compress.merge.hc_smoe import HCSMoE
from moekit.errors import BadConfig

from . import shared
from .shared import LAYERS, Legacy, Table

NAMES = ("w1", "w3", "w2")
KEEP, SETS, ITEMS, FEATURES, CLUSTERS = 4, 10, 24, 16, 9
BATCHES = [shared.tokens(4, 32, seed=1), shared.tokens(3, 32, seed=2)]
MISSING = {"transformers.models.mixtral.modeling_mixtral": ["MixtralBlockSparseTop2MLP"]}


def run(checkout: Path) -> Table:
    """All comparisons on one checkout."""
    table = Table(f"HC-SMoE, wazenmai/HC-SMoE at {shared.commit(checkout)}")
    packages = ("hcsmoe", "hcsmoe.utils", "hcsmoe.merging", "hcsmoe.models", "hcsmoe.models.mixtral")
    with (
        shared.importing(checkout, bare=packages, missing=MISSING) as load,
        shared.quiet(),
        shared.on_cpu(),
        tempfile.TemporaryDirectory() as folder,
    ):
        module, clustering = load("hcsmoe.merging.grouping_mixtral"), load("hcsmoe.merging.clustering")
        model = shared.tiny("mixtral")
        _pipeline(table, module, model, shared.save(model, Path(folder) / "m"))
        _top_four(table, load("hcsmoe.merging.grouping_qwen"), Path(folder))
        _linkages(table, clustering)
        _dispatch(table, checkout, clustering)
    return table


def _name(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe"


def _pipeline(table: Table, module: Any, model: Any, checkpoint: Any) -> None:
    legacy = Legacy(copy.deepcopy(model), NAMES, "block_sparse_moe")
    batches = [{"input_ids": ids} for ids in BATCHES]
    grouper = module.ExpertsGrouperForMixtral(
        model.config, similarity_base="expert-output", cluster="hierarchical", linkage="average"
    )
    grouper.compute_all_usages(legacy, batches)
    grouper.cluster_experts(legacy, batches, KEEP)
    method = HCSMoE(router="redirect")
    made = shared.plan(checkpoint, BATCHES, method, KEEP)
    labels = grouper.group_state_dict()
    table.same(
        "clusters of 8 experts in 3 layers, spelt `hierarchical`, average linkage",
        [shared.partition(labels[_name(n)].tolist()) for n in range(LAYERS)],
        [shared.groups_of(made.outcomes[n]) for n in range(LAYERS)],
    )
    merged = module.merge_by_groups_with_usage_weighted(legacy, grouper)
    official = copy.deepcopy(model)
    for layer, old in zip(official.model.layers, merged.layers(), strict=True):
        shared.fill(layer.mlp, [tuple(getattr(e, name).weight for name in NAMES) for e in old.mlp.experts])
    ids = shared.tokens(2, 24, seed=9)
    with torch.no_grad():
        ours = shared.changed(copy.deepcopy(model), made, checkpoint)
        apart = float((official(ids).logits - model(ids).logits).abs().max())
        table.close(
            f"logits of the merged model (merging moves them by {apart:.2f})", official(ids).logits, ours(ids).logits
        )


def _top_four(table: Table, module: Any, folder: Path) -> None:
    """Uses by their class for Qwen1.5-MoE, which chooses four."""
    model = shared.tiny("qwen3_moe", num_experts_per_tok=4)
    checkpoint = shared.save(model, folder / "four")
    grouper = module.ExpertsGrouperForQwen2MoE(model.config)
    names = ("gate_proj", "up_proj", "down_proj")
    grouper.compute_all_usages(Legacy(copy.deepcopy(model), names), [{"input_ids": BATCHES[0]}])
    method = HCSMoE()
    ours = method.score(shared.seen(checkpoint, BATCHES[:1], method)[0])
    theirs = grouper.usage_frequency_state_dict()["model.layers.0.mlp"]
    counted = int(ours.sum()) / BATCHES[0].numel()
    apart = (theirs.double() - ours / ours.sum()).abs().max()
    table.tell(
        "uses of a layer in which a token chooses 4, by the class for Qwen1.5-MoE",
        f"2 choices a token counted, shares up to {float(apart):.2f} off",
        f"{counted:g} choices a token counted",
        "official errs: always the two largest logits",
    )


def _features(seed: int) -> Tensor:
    return torch.randn(ITEMS, FEATURES, generator=torch.Generator().manual_seed(seed))


def _linkages(table: Table, clustering: Any) -> None:
    linkages: tuple[Linkage, ...] = ("average", "single", "complete", "ward")
    for linkage in linkages:
        theirs, ours, checked = [], [], []
        for seed in range(SETS):
            rows = _features(seed)
            labels, _ = clustering.hierarchical_clustering(rows.clone(), CLUSTERS, linkage)
            theirs.append(shared.partition(labels.tolist()))
            ours.append(frozenset(map(frozenset, agglomerate(euclidean(rows), linkage).leaving(CLUSTERS))))
            cut = hierarchy.fcluster(hierarchy.linkage(rows.double().numpy(), linkage), CLUSTERS, "maxclust")
            checked.append(shared.partition(cut.tolist()))
        what = f"{linkage} linkage, {SETS} sets of {ITEMS} points to {CLUSTERS} clusters"
        if linkage in ("average", "single"):
            table.same(what, theirs, ours)
            continue
        right = [sum(a == b for a, b in zip(found, checked, strict=True)) for found in (theirs, ours)]
        reason = {
            "complete": "joins the farthest pair of clusters, not the nearest",
            "ward": "weighs the distance of means, not its square",
        }[linkage]
        table.tell(what, f"{right[0]} equal scipy's", f"{right[1]} equal scipy's", f"official errs: {reason}")


def _dispatch(table: Table, checkout: Path, clustering: Any) -> None:
    scripts = sorted(checkout.glob("scripts/*/run.sh"))
    spelt = sum('--cluster="hirarchical"' in script.read_text() for script in scripts)
    equal, failed = 0, 0
    for seed in range(SETS):
        rows = _features(seed)
        torch.manual_seed(0)
        _, tree = _clustered(clustering, rows, "hierarchical")
        try:
            _, found = _clustered(clustering, rows, "hirarchical")
        except (RuntimeError, IndexError):
            failed += 1
            continue
        equal += shared.partition(tree.tolist()) == shared.partition(found.tolist())
    table.tell(
        f'`cluster="hirarchical"`, as {spelt} of {len(scripts)} run scripts spell it, {SETS} sets',
        f"{equal} clusterings are those of the tree, {failed} end in an error",
        _refused(),
        "official errs: every other spelling runs k-means from a random start",
    )


def _refused() -> str:
    try:
        make("merge", "hc-smoe", {"linkage": "hirarchical"})
    except BadConfig:
        return "an unknown linkage is refused"
    return "an unknown linkage is taken"


def _clustered(clustering: Any, rows: Tensor, name: str) -> Any:
    return clustering.group_experts_by_clustering(
        model="mixtral",
        num_groups=CLUSTERS,
        cluster=name,
        linkage="average",
        hierarchical_stopping_metric="silhouette",
        num_experts=ITEMS,
        experts=rows,
    )
