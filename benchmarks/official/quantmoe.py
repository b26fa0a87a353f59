"""QuantMoE-Bench (arXiv:2406.08155): the outlier scorer of UNITES-Lab/moe-quantization."""

from __future__ import annotations

import copy
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

from moekit.compress.sharers.outlier import Outlier, outlier_score

from . import shared
from .shared import EXPERTS, LAYERS, Legacy, Table

NAMES = ("w1", "w3", "w2")
BATCHES = [shared.tokens(4, 32, seed=1)]


def run(checkout: Path) -> Table:
    """All comparisons on one checkout."""
    table = Table(f"QuantMoE-Bench, UNITES-Lab/moe-quantization at {shared.commit(checkout)}")
    with (
        shared.importing(checkout, stubs=("fire",)),
        shared.quiet(),
        tempfile.TemporaryDirectory() as folder,
    ):
        model = shared.tiny("mixtral")
        checkpoint = shared.save(model, Path(folder) / "m")
        legacy = Legacy(copy.deepcopy(model), NAMES, "block_sparse_moe")
        script = shared.by_path(checkout / "dump-mixtral-outlier-metric.py")
        found = _scores(script, legacy, Path(folder))
        ours = {name: outlier_score(module.weight) for name, module in legacy.named_modules() if name in found}
        names = sorted(found)
        table.close(
            f"scores of {len(names)} linear layers in fp32",
            torch.tensor([found[n] for n in names]),
            torch.tensor([ours[n] for n in names]),
        )
        half = _scores(script, copy.deepcopy(legacy).half(), Path(folder))
        apart = max(abs(half[n] - ours[n]) / ours[n] for n in names)
        order = [sorted(names, key=lambda n: -scores[n]) for scores in (half, ours)]
        places = sum(a != b for a, b in zip(*order, strict=True))
        table.tell(
            "the same as their script runs it, in fp16",
            f"up to {100 * apart:.2f} % off, {places} of {len(names)} places in the ranking differ",
            "fp32, whatever the weights are stored in",
            "moekit differs on purpose",
        )
        _experts(table, found, checkpoint)
    return table


def _scores(script: Any, model: Any, folder: Path) -> dict[str, float]:
    script.MixtralForCausalLM = types.SimpleNamespace(from_pretrained=lambda *a, **k: model)
    script.dump_mixtral_linear_weight_outlier_metric(str(folder))
    made: dict[str, float] = torch.load(folder / "mixtral_linear_weight_outlier_metric.pt")
    return made


def _experts(table: Table, found: dict[str, float], checkpoint: Any) -> None:
    looked = shared.seen(checkpoint, BATCHES, Outlier())
    ours, theirs = [], []
    for layer in range(LAYERS):
        ours += Outlier().worth(looked[layer]).tolist()
        for e in range(EXPERTS):
            prefix = f"layers.{layer}.mlp.experts.{e}."
            own = [score for name, score in found.items() if prefix in name]
            assert len(own) == len(NAMES), "three matrices an expert"
            theirs.append(max(own))
    table.close("worth of 24 experts: the worst of their matrices", torch.tensor(theirs), torch.tensor(ours))
    router = sum(name.endswith("gate") for name in found)
    table.tell(
        "what is ranked",
        f"all {len(found)} linear layers, {router} routers and attention among them",
        f"{len(ours)} experts, each by the worst of its matrices",
        "moekit differs on purpose: an expert has one width, routers are not rounded",
    )
