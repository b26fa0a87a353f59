"""Measure what each recipe costs in each layer: the text passes through the model once, one layer in memory at a time.

A layer's block runs on what the unchanged model gives it, as it is and under every recipe; nothing of a recipe goes on
to the next layer. Finished layers are kept in a folder, so that an interrupted run goes on.

Legend: N tokens of a batch, H hidden.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moekit._files import read_text
from moekit._progress import Progress, track
from moekit.anatomy.probe import MoELayer, flat_output
from moekit.checkpoint.atomic import atomic_write
from moekit.compress.engine.calls import BlockCalls, see_block
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.resize import read_block, resized_block, resized_config
from moekit.compress.joint.composing import Composer
from moekit.compress.joint.costs import CostRow
from moekit.compress.joint.gradients import BlockGradients
from moekit.compress.joint.recipe import LayerRecipe
from moekit.compress.joint.sizes import ModelSizes
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault
from moekit.streaming.passes import Passes
from moekit.streaming.states import States
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed


@dataclass
class Error:
    """Sums over the text of what a change does to a block's output.

    Attributes:
        square: sum |D|^2.
        fisher: sum over tokens of (g . D)^2; None where no gradient is known.
    """

    square: float = 0.0
    fisher: float | None = None

    def add(self, change_NH: Tensor, gradient_NH: Tensor | None) -> None:
        """Add some tokens.

        Args:
            change_NH: D.
            gradient_NH: g.
        """
        self.square += float(change_NH.double().square().sum())
        if gradient_NH is not None:
            slope_N = (change_NH.double() * gradient_NH.double()).sum(-1)
            self.fisher = (self.fisher or 0.0) + float(slope_N.square().sum())


def measure(
    streamed: Streamed,
    statistics: Mapping[int, LayerStatistics],
    composer: Composer,
    wanted: Mapping[int, Sequence[LayerRecipe]],
    sizes: ModelSizes,
    *,
    gradients: BlockGradients | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> list[CostRow]:
    """Costs of recipes.

    Args:
        streamed: the text on its way through the model.
        statistics: decoder layer -> what the composer's methods need.
        composer: carries recipes out.
        wanted: decoder layer -> recipes.
        sizes: of the layers under recipes.
        gradients: at the blocks' outputs; None leaves Fisher errors out.
        seed: of random methods.
        folder: where finished layers are kept; None keeps none.
        progress: told layer by layer.

    Raises:
        UnsupportedModel: a block does not stand alone, so it cannot be run alone.
        NumericFault: a recipe's output is not finite; names the layer.
    """
    return _Measuring(streamed, statistics, composer, wanted, sizes, gradients, seed, folder).run(progress)


@dataclass
class _Measuring:
    streamed: Streamed
    statistics: Mapping[int, LayerStatistics]
    composer: Composer
    wanted: Mapping[int, Sequence[LayerRecipe]]
    sizes: ModelSizes
    gradients: BlockGradients | None
    seed: int
    folder: Path | None
    _merged: tuple[tuple[str, int | None], LayerWeights] | None = None

    @torch.no_grad()
    def run(self, progress: Progress | None) -> list[CostRow]:
        walk, loader, rows = self.streamed.walk, self.streamed.loader, list[CostRow]()
        passes = walk.passes("costs")
        self.calls, self.outputs = BlockCalls(walk.new_states("cost-inputs")), walk.new_states("cost-outputs")
        last = max(self.wanted, default=-1)
        try:
            passes.begin_loaded()
            for index in track(range(last + 1), "pricing", progress):
                known = self._known(index)
                with loader.loaded(index):
                    moe = walk.moe(index) if index in self.wanted and known is None else None
                    if moe is not None:
                        known = self._layer(moe, passes)
                        self._keep(index, known)
                    else:
                        for number in range(len(passes)):
                            passes.run(index, number)
                            passes.go_on(index, number)
                rows += known or []
        finally:
            passes.close()
            self.calls.states.close()
            self.outputs.close()
        return rows

    def _layer(self, moe: MoELayer, passes: Passes) -> list[CostRow]:
        see_block(moe, passes, self.calls, self.outputs)
        output, stream = 0.0, 0.0
        for number, current in enumerate(self.streamed.passes):
            mask_T = current.mask_T
            output += _square(self.outputs, number, mask_T)
            stream += float(flat_output(passes.get(number)).cpu()[mask_T].double().square().sum())
            passes.go_on(moe.index, number)
        weights = read_block(moe, self.streamed.loader.model.config)
        inputs = LayerInputs(
            moe.index, moe.geometry, self.statistics[moe.index], lambda: self._stored(weights), self.seed
        )
        # Merging aligns neurons, which takes longer than all else: recipes that share its result follow one another.
        order = sorted(self.wanted[moe.index], key=lambda recipe: (recipe.way, recipe.keep or 0, str(recipe)))
        self._merged = None
        rows = {recipe: self._row(moe, recipe, weights, inputs, output, stream) for recipe in order}
        self._merged = None
        return [rows[recipe] for recipe in self.wanted[moe.index]]

    def _stored(self, weights: LayerWeights) -> LayerWeights:
        """As on disk, whatever the layer computes in: what is measured is what will be written."""
        stored = self.streamed.loader.stored
        return weights.map(lambda t: t.to(stored), router=False)

    def _row(
        self,
        moe: MoELayer,
        recipe: LayerRecipe,
        weights: LayerWeights,
        inputs: LayerInputs,
        output: float,
        stream: float,
    ) -> CostRow:
        error, size = Error(), self.sizes.of(recipe, moe.index)
        if self.gradients is not None:
            error.fisher = 0.0
        if not recipe.unchanged:
            self._run(moe, recipe, weights, inputs, error)
        return CostRow(
            layer=moe.index,
            recipe=recipe,
            bytes=size.stored,
            weights=size.weights,
            rho=error.square / output if output else 0.0,
            change=error.square / stream if stream else 0.0,
            fisher=None if error.fisher is None else error.fisher / (2 * self.streamed.tokens),
        )

    def _run(
        self, moe: MoELayer, recipe: LayerRecipe, weights: LayerWeights, inputs: LayerInputs, error: Error
    ) -> None:
        outcome = self.composer.outcome(recipe, inputs)
        key = recipe.way, recipe.keep
        if self._merged is None or self._merged[0] != key:
            self._merged = key, self.composer.fewer(recipe, outcome, self._stored(weights), inputs)
        made = self.composer.finished(recipe, outcome, self._merged[1], inputs)
        made = made.map(lambda t: t.to(weights.up_EIH.dtype), router=False)
        config = self.streamed.loader.model.config
        block = resized_block(moe, resized_config(config, made.experts, width=recipe.width), made, outcome)
        device = weights.up_EIH.device
        for number, current in enumerate(self.streamed.passes):
            mask_T = current.mask_T
            args, kwargs = self.calls.get(number, device)
            made_NH = flat_output(block(*args, **kwargs)).cpu()[mask_T]
            if not bool(made_NH.isfinite().all()):
                raise NumericFault(f"the layer's output is NaN or infinite under {recipe}", layer=moe.index)
            change_NH = made_NH.double() - self.outputs.get(number).flatten(0, 1)[mask_T].double()
            gradient_NH = None
            if self.gradients is not None:
                gradient_NH = self.gradients.get(moe.index, number).flatten(0, 1)[mask_T]
            error.add(change_NH, gradient_NH)

    def _file(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"costs-{index}.json"

    def _known(self, index: int) -> list[CostRow] | None:
        """Rows that an interrupted run has measured, if they are all that is wanted."""
        file = self._file(index)
        if file is None or index not in self.wanted:
            return None
        with contextlib.suppress(OSError, ValueError):
            rows = [CostRow.model_validate(row) for row in json.loads(read_text(file))]
            # One may have run where the model did not fit in memory, the other where it does.
            alike = all((row.fisher is None) == (self.gradients is None) for row in rows)
            if alike and [row.recipe for row in rows] == list(self.wanted[index]):
                return rows
        return None

    def _keep(self, index: int, rows: Sequence[CostRow]) -> None:
        file = self._file(index)
        if file is not None:
            atomic_write(file, json.dumps([row.model_dump(mode="json") for row in rows]))


def _square(states: States, number: int, mask_T: Tensor) -> float:
    return float(states.get(number).flatten(0, 1)[mask_T].double().square().sum())
