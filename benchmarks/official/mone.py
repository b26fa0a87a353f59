"""MoNE (arXiv:2507.00390): statistics, scores, novices and choice of zxgx/mode-pd on OLMoE.

Legend: N tokens, E experts, H hidden.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.compress.prune.mone import MoNE, mean_rows, spread_of_outputs

from . import shared
from .shared import EXPERTS, LAYERS, Legacy, Table

NAMES = ("gate_proj", "up_proj", "down_proj")
KEEP = 5
STUBS = (
    *("modepd.model.deepseek_v2.modeling_deepseek", "modepd.model.moonshotai.modeling_deepseek"),
    "modepd.model.olmoe.modeling_olmoe",
)


class Novice(nn.Module):
    """What their function puts in an expert's place, with nothing of it but the constant that it writes."""

    def __init__(self, config: Any, **given: Any) -> None:
        super().__init__()
        self.approx_value = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)


def run(checkout: Path) -> Table:
    """All comparisons on one checkout."""
    table = Table(f"MoNE, zxgx/mode-pd at {shared.commit(checkout)}")
    bare = ("modepd", "modepd.pruning", "modepd.model", "modepd.model.olmoe")
    bare += ("modepd.model.deepseek_v2", "modepd.model.moonshotai")
    with (
        shared.importing(checkout, bare=bare, stubs=STUBS) as load,
        shared.quiet(),
        shared.on_cpu(),
        tempfile.TemporaryDirectory() as folder,
    ):
        module = load("modepd.pruning.expert_prune")
        module.OlmoeMLP = Novice
        model = shared.tiny("olmoe", norm_topk_prob=False)
        checkpoint = shared.save(model, Path(folder) / "m")
        _statistics(table, module, model, checkpoint)
        _weight(table, module, model)
        _ties(table, module, model)
    return table


def _run(module: Any, model: Any, batches: list[Tensor], **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Their function, and the variables it ends with."""
    legacy = Legacy(copy.deepcopy(model), NAMES)
    args = types.SimpleNamespace(
        **{"mone_ranking_metric": "fusion", "fusion_io_weight": 0.5, "expert_ranking_scope": "layer"}
        | {"preserve_n_experts": KEEP, "enable_novice_evolving": False, "zero_out_novice": False}
        | {"max_steps": len(batches)}
        | settings
    )
    ends: dict[str, Any] = {}

    def watch(frame: Any, event: str, given: Any) -> None:
        if event == "return" and frame.f_code.co_name == "expert_prune_by_mone":
            ends.update(frame.f_locals)

    import sys

    sys.setprofile(watch)
    try:
        with torch.no_grad():
            module.expert_prune_by_mone(args, legacy, [{"input_ids": ids} for ids in batches])
    finally:
        sys.setprofile(None)
    return legacy, ends


def _statistics(table: Table, module: Any, model: Any, checkpoint: Any) -> None:
    ids = shared.tokens(20, 24, seed=1)
    method = MoNE()
    looked = shared.seen(checkpoint, [ids], method)
    layers = [looked[n].statistics for n in range(LAYERS)]
    means = torch.stack([mean_rows(seen["output_sum"], seen.load_E) for seen in layers])
    spreads = torch.stack(
        [spread_of_outputs(seen.load_E, seen["output_sum"], seen["output_channel_square"]) for seen in layers]
    )
    gates = torch.stack([seen["gate_mass"].double() / seen.tokens for seen in layers])
    for parts in (1, 2, 5, 20):
        batches = list(ids.chunk(parts))
        _, ends = _run(module, model, batches)
        own = ends["bias_stats"]
        names = [[f"layers.{n}.experts.{e}" for e in range(EXPERTS)] for n in range(LAYERS)]
        theirs = torch.stack([torch.stack([own[name]["baseline_out"] for name in row]) for row in names])
        fluctuation = torch.stack([torch.stack([own[name]["fluc_out"].sqrt().norm() for name in row]) for row in names])
        if parts == 5:
            table.close("mean output of 24 experts (5 batches)", theirs, means)
            found = torch.stack([ends["routing_stats"][n]["scores"] for n in range(LAYERS)])
            table.close("mean gate over all tokens", found, gates)
        ratio = fluctuation / spreads
        table.tell(
            f"spread of outputs over that of all tokens, 480 tokens in {parts} batches",
            f"{float(ratio.min()):.2f} to {float(ratio.max()):.2f}",
            "1 (pooled sums)",
            "official errs: the first batch is left out, and later ones stand against the wrong count",
        )
    _novices(table, module, model, ids, means)


def _novices(table: Table, module: Any, model: Any, ids: Tensor, means: Tensor) -> None:
    legacy, _ = _run(module, model, list(ids.chunk(5)))
    theirs, ours = [], []
    for n, layer in enumerate(legacy.layers()):
        for e, expert in enumerate(layer.mlp.experts):
            if isinstance(expert, Novice):
                theirs.append(expert.approx_value.float())
                ours.append(means[n, e].bfloat16().float())
    table.close(f"{len(theirs)} novices, as bf16", torch.stack(theirs), torch.stack(ours), bound=1e-2)


def _weight(table: Table, module: Any, model: Any) -> None:
    batches = list(shared.tokens(20, 24, seed=1).chunk(5))
    kept = {}
    for weight in (0.2, 0.5, 0.8, 0.0, 1.0):
        legacy, _ = _run(module, model, batches, fusion_io_weight=weight)
        kept[weight] = [
            tuple(e for e, expert in enumerate(layer.mlp.experts) if not isinstance(expert, Novice))
            for layer in legacy.layers()
        ]
    table.tell(
        "experts kept by `fusion_io_weight`",
        f"0.2, 0.5 and 0.8 alike: {kept[0.2] == kept[0.5] == kept[0.8]}; at 0 and 1 "
        f"{[len(own) for own in kept[0.0]]} and {[len(own) for own in kept[1.0]]} of {KEEP} asked",
        "no such knob",
        "official errs: w and 1 - w multiply one product, which ranks alike at any w and is 0 at the ends",
    )


def _ties(table: Table, module: Any, model: Any) -> None:
    """Four experts alike in weights and router row: their scores are equal."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer, e in itertools.product(twin.model.layers, (1, 2, 3)):
            layer.mlp.gate.weight[e] = layer.mlp.gate.weight[0] - 100
            layer.mlp.experts.gate_up_proj[e] = layer.mlp.experts.gate_up_proj[0]
        for layer in twin.model.layers:
            layer.mlp.gate.weight[0] -= 100
    batches = list(shared.tokens(20, 24, seed=1).chunk(5))
    legacy, ends = _run(module, twin, batches, preserve_n_experts=6)
    counts = [sum(not isinstance(e, Novice) for e in layer.mlp.experts) for layer in legacy.layers()]
    unused = [sum(float(s) == 0 for s in ends["metric_list"][n]) for n in range(LAYERS)]
    table.tell(
        f"experts kept of 8 at 6 a layer, {unused} of them with a score of 0",
        counts,
        [6] * LAYERS,
        "official errs: keeps what is strictly above the next value, so ties lose experts",
    )


