"""MoNE (arXiv:2507.00390): statistics, scores, novices and choice of zxgx/mode-pd on OLMoE.

Legend: N tokens, E experts, H hidden.
"""

from __future__ import annotations

import copy
import sys
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
    parts = ("", ".pruning", ".model", ".model.olmoe", ".model.deepseek_v2", ".model.moonshotai")
    bare = [f"modepd{name}" for name in parts]
    with (
        shared.importing(checkout, bare=bare, stubs=STUBS) as load,
        shared.quiet(),
        shared.on_cpu(),
        tempfile.TemporaryDirectory() as folder,
    ):
        module = load("modepd.pruning.expert_prune")
        vars(module)["OlmoeMLP"] = Novice
        model = shared.tiny("olmoe", norm_topk_prob=False)
        checkpoint = shared.save(model, Path(folder) / "m")
        _statistics(table, module, model, checkpoint)
        _weight(table, module, model)
        _ties(table, module, model, Path(folder) / "dead")
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

    sys.setprofile(watch)
    try:
        with torch.no_grad():
            module.expert_prune_by_mone(args, legacy, [{"input_ids": ids} for ids in batches])
    finally:
        sys.setprofile(None)
    return legacy, ends


def _statistics(table: Table, module: Any, model: Any, checkpoint: Any) -> None:
    ids = shared.tokens(20, 24, seed=1)
    reference = _spread(model, ids)
    for parts in (1, 2, 5, 20):
        batches = list(ids.chunk(parts))
        _, ends = _run(module, model, batches)
        looked = shared.seen(checkpoint, batches, MoNE())
        layers = [looked[n].statistics for n in range(LAYERS)]
        spreads = torch.stack(
            [spread_of_outputs(seen.load_E, seen["output_sum"], seen["output_channel_square"]) for seen in layers]
        )
        own = ends["bias_stats"]
        names = [[f"layers.{n}.experts.{e}" for e in range(EXPERTS)] for n in range(LAYERS)]
        fluctuation = torch.stack([torch.stack([own[name]["fluc_out"].sqrt().norm() for name in row]) for row in names])
        if parts == 5:
            means = torch.stack([mean_rows(seen["output_sum"], seen.load_E) for seen in layers])
            theirs = torch.stack([torch.stack([own[name]["baseline_out"] for name in row]) for row in names])
            table.close("mean output of 24 experts (5 batches)", theirs, means)
            gates = torch.stack([seen["gate_mass"].double() / seen.tokens for seen in layers])
            found = torch.stack([ends["routing_stats"][n]["scores"] for n in range(LAYERS)])
            table.close("mean gate over all tokens", found, gates)
        ratios = [found / reference for found in (fluctuation, spreads)]
        one, two = (f"{float(ratio.min()):.2f} to {float(ratio.max()):.2f}" for ratio in ratios)
        table.tell(
            f"spread of 24 experts' outputs over torch.std's, 480 tokens in {parts} batch{'es' if parts > 1 else ''}",
            one,
            two,
            "official errs: the first batch is left out, and later ones stand against the wrong count",
        )
    _novices(table, module, model, ids, means)


@torch.no_grad()
def _spread(model: Any, ids: Tensor) -> Tensor:
    """Norm of the sample standard deviation of each expert's outputs, of all tokens at once."""
    legacy = Legacy(copy.deepcopy(model), NAMES)
    outputs: dict[tuple[int, int], Tensor] = {}
    for n, layer in enumerate(legacy.layers()):
        for e, expert in enumerate(layer.mlp.experts):
            expert.register_forward_hook(lambda m, a, o, key=(n, e): outputs.update({key: o.double()}))
    legacy(input_ids=ids)
    return torch.tensor([[float(outputs[n, e].std(0).norm()) for e in range(EXPERTS)] for n in range(LAYERS)])


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


def _ties(table: Table, module: Any, model: Any, folder: Path) -> None:
    """Four experts that put out nothing: their scores are 0, all alike."""
    dead = copy.deepcopy(model)
    with torch.no_grad():
        for layer in dead.model.layers:
            layer.mlp.experts.down_proj[:4] = 0
    ids = shared.tokens(20, 24, seed=1)
    legacy, _ = _run(module, dead, list(ids.chunk(5)), preserve_n_experts=6)
    made = shared.plan(shared.save(dead, folder), [ids], MoNE(), 6)
    table.tell(
        "experts kept of 8 at 6 a layer, 4 of which put out nothing",
        [sum(not isinstance(e, Novice) for e in layer.mlp.experts) for layer in legacy.layers()],
        [len(made.outcomes[n].keep) for n in range(LAYERS)],
        "official errs: keeps what is strictly above the next value, so ties lose experts",
    )
