"""What rounding each expert alone to each of a few widths does to its layer's output, measured on a text in one pass.

The text goes through the model as it is, or as it was rounded before, layer by layer from disk. Where it stands at a
layer, all experts are rounded to one width after the other, and each expert is run on the tokens that chose it: what it
gives differently, times its gate weight, is what the block gives differently, since all others are as they were.

Legend: n tokens of one expert, N tokens of a batch, H hidden, E experts, C widths, ascending.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moekit._progress import Progress
from moekit.anatomy.probe import MoELayer
from moekit.anatomy.swap import replaced
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.bits import PART_NAMES
from moekit.compress.engine.block_pairs import BlockPairs
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.loss_gradients import loss_gradients
from moekit.compress.engine.measuring import refuse_damaged
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import make_method
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block, resized_block, resized_config
from moekit.compress.engine.rewriting import PlannedRewrite
from moekit.compress.engine.sharing import BitSharer, CostSharer, WidthErrors
from moekit.compress.weights import LayerWeights
from moekit.errors import UnsupportedModel
from moekit.streaming.states import States
from moekit.trace.batch import widest
from moekit.trace.each_expert import OneExpert, plain_expert
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Change, Streamed

Measured = tuple[dict[int, LayerStatistics], dict[int, WidthErrors]]


def measure(
    checkpoint: Checkpoint,
    text: CalibrationText,
    request: PlanRequest,
    sharer: BitSharer,
    widths: Sequence[int],
    progress: Progress | None = None,
    behind: PlannedRewrite | None = None,
) -> Measured:
    """Statistics of every layer, and where the sharer asks for them errors of every width.

    Args:
        checkpoint: the model.
        text: to measure on.
        request: whose method rounds.
        sharer: says what is to be measured.
        widths: C, ascending.
        progress: told layer by layer.
        behind: what the model becomes before it is measured: the text passes through such layers, and gradients are
            those of such a model; errors are distances from experts as they are on disk. None takes it as it is.

    Raises:
        UnsupportedModel: this family's experts do not follow the plain formula.
        NumericFault: weights that are not finite.
    """
    gradients = loss_gradients(checkpoint, text, progress, behind) if sharer.measures == "loss" else {}
    method = request.method
    if isinstance(sharer, CostSharer) and sharer.rounding == "nearest":
        method = make_method("quantize", "rtn", {"group": getattr(method, "group", 0)})
    folder = None if text.folder is None else text.folder / _name(method, sharer, widths, behind)
    wanted = sharer.measures != "nothing"
    with Streamed(
        checkpoint,
        text.batches,
        statistics=tuple(dict.fromkeys(("load", *sharer.required))),
        folder=folder,
        dtype=text.dtype,
        device=text.device,
        keep_inputs=wanted,
    ) as streamed:
        layers = _Layers(streamed, method, widths, gradients, folder, behind)
        change: Change = layers.measure if wanted else refuse_damaged
        if sharer.looks_at is not None:
            pairs = streamed.looker = BlockPairs(sharer.looks_at[0], streamed.tokens, sharer.looks_at[1])
            change = partial(_finding, pairs, sharer, request.seed, change)
        streamed.run(progress, change)
        statistics = {layer: record.statistics for layer, record in streamed.records.items()}
        found = {layer: layers.of(layer) for layer in statistics} if wanted else {}
    for states in gradients.values():
        states.close()
    return statistics, found


def _finding(
    pairs: BlockPairs, sharer: BitSharer, seed: int, then: Change, moe: MoELayer, statistics: LayerStatistics
) -> nn.Module | None:
    """Keep what the sharer finds of a layer; what is not finite is told by the change, which comes first."""
    block = then(moe, statistics)
    generator = LayerInputs(moe.index, moe.geometry, statistics, seed=seed).generator("blocks")
    statistics.keep(sharer.finds(pairs.given_NH, pairs.cosine_N, generator))
    return block


def _name(method: Any, sharer: BitSharer, widths: Sequence[int], behind: PlannedRewrite | None) -> str:
    told_by = [] if behind is None else [behind.hash]
    told = json.dumps([repr(method), repr(sharer), type(sharer).__name__, list(widths), *told_by])
    return f"widths-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


class _Layers:
    """Measures layer by layer; what was measured is kept on disk where the text is, for a run that is interrupted."""

    def __init__(
        self,
        streamed: Streamed,
        method: Any,
        widths: Sequence[int],
        gradients: Mapping[int, States],
        folder: Path | None,
        behind: PlannedRewrite | None = None,
    ) -> None:
        self._streamed, self._method, self._widths, self._behind = streamed, method, widths, behind
        self._gradients, self._folder = gradients, folder
        self._found: dict[int, WidthErrors] = {}

    def of(self, layer: int) -> WidthErrors:
        """What was measured of a layer, now or before an interruption."""
        if layer not in self._found:
            known = load_file(self._file(layer))
            self._found[layer] = WidthErrors(known["squared"], float(known["energy"]))
        return self._found[layer]

    def _file(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"errors-{layer}.safetensors"

    @torch.no_grad()
    def measure(self, moe: MoELayer, statistics: LayerStatistics) -> nn.Module | None:
        """Every width of every expert of the layer that the text stands at.

        Returns:
            The block that the text goes on through; None for the layer as it is.
        """
        refuse_damaged(moe, statistics)
        squared_EC = torch.zeros(moe.geometry.experts, len(self._widths), dtype=torch.float64)
        energy = 0.0
        for c, width in enumerate(self._widths):
            squared_EC[:, c], energy = self._one_width(moe, statistics, width)
        # Rounding finer can hurt by chance, of few tokens: no sharer is to pay for more bits.
        errors = WidthErrors(squared_EC.cummin(dim=1).values, energy)
        self._found[moe.index] = errors
        if self._folder is not None:
            told = {"squared": errors.squared_EC.contiguous(), "energy": torch.tensor(energy, dtype=torch.float64)}
            save_file(told, self._file(moe.index))
        if self._behind is None:
            return None
        weights = read_block(moe, self._streamed.loader.model.config)
        return self._block(moe, self._behind(moe.index, weights), self._behind.outcomes[moe.index])

    def _block(self, moe: MoELayer, made: LayerWeights, outcome: LayerOutcome) -> nn.Module:
        """The layer's block with other weights of its experts."""
        loader = self._streamed.loader
        made = made.map(lambda t: t.to(loader.dtype), router=False)
        return resized_block(moe, resized_config(loader.model.config, moe.geometry.experts), made, outcome)

    def _one_width(self, moe: MoELayer, statistics: LayerStatistics, width: int) -> tuple[Tensor, float]:
        inputs, experts = self._streamed.inputs, moe.geometry.experts
        assert inputs is not None
        one, wide = self._rounded(moe, statistics, width), widest(self._streamed.loader.device)
        squared_E, energy = torch.zeros(experts, dtype=torch.float64), 0.0
        for expert in range(experts):
            for number, token_n, batch in inputs.placed(expert):
                given_nH = batch.outputs_nH.to(wide)
                gap_nH = one(expert, batch.hidden_nH.to(self._streamed.loader.dtype))[1].to(wide) - given_nH
                if not moe.geometry.weighs_inputs:
                    gap_nH, given_nH = (t * batch.weights_n.to(wide)[:, None] for t in (gap_nH, given_nH))
                if self._gradients:
                    gap_nH = gap_nH * self._gradient(moe.index, number, token_n).to(gap_nH)
                squared_E[expert] += float(gap_nH.square().sum())
                energy += float(given_nH.square().sum())
        return squared_E, energy

    def _rounded(self, moe: MoELayer, statistics: LayerStatistics, width: int) -> OneExpert:
        """Runs one expert of the layer as it is with all of them rounded to a width.

        Raises:
            UnsupportedModel: this family's experts do not follow the plain formula.
        """
        loader, experts = self._streamed.loader, moe.geometry.experts
        assert self._streamed.inputs is not None
        parts = [part for part in PART_NAMES if part != "gate" or moe.geometry.has_gate]
        outcome = LayerOutcome(keep=tuple(range(experts)), bits={part: (width,) * experts for part in parts})
        inputs = LayerInputs(moe.index, moe.geometry, statistics, read_moments=self._streamed.inputs.moments)
        stored = read_block(moe, loader.model.config).map(lambda t: t.to(loader.stored), router=False)
        block = self._block(moe, self._method.transform(stored, outcome, inputs), outcome)
        with replaced(loader.model, moe.name, block):
            changed = self._streamed.walk.moe(moe.index)
            one = None if changed is None else plain_expert(changed.experts)
        if one is None:
            raise UnsupportedModel(
                "the experts do not follow the plain formula, so one cannot be run alone",
                layer=moe.index,
                hint="share the bits without measuring errors (--share frequency)",
            )
        return one

    def _gradient(self, layer: int, number: int, token_n: Tensor) -> Tensor:
        current = self._streamed.passes[number]
        gradient_NH = current.keep(self._gradients[layer].get(number).flatten(0, 1))
        return gradient_NH[token_n.cpu()]
