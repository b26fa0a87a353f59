"""A text on its way through a model, layer by layer from disk: as it is, or through layers as they become.

All of the text passes through a layer, its statistics are taken, the layer is changed, and the text passes through the
changed layer on to the next: so each layer is judged by what the changed layers before it give. What each layer gets of
the budget is decided beforehand.

Legend: E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import nn

from moekit._progress import Progress
from moekit.anatomy.probe import MoELayer
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.measuring import refuse_damaged
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block, resized_block, resized_config
from moekit.trace.meta import TraceMeta
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed


class TextPass:
    """One way of the text through the model.

    Args:
        checkpoint: the model.
        text: the text.
        request: whose method measures and changes.
        progress: told layer by layer.
    """

    def __init__(
        self, checkpoint: Checkpoint, text: CalibrationText, request: PlanRequest, progress: Progress | None
    ) -> None:
        self._checkpoint = checkpoint
        self._text = text
        self._request = request
        self._progress = progress

    def run(
        self, name: str, outcomes: Mapping[int, LayerOutcome] | None
    ) -> tuple[dict[int, LayerStatistics], TraceMeta]:
        """Statistics of every layer, behind layers as they are, or behind layers changed by these outcomes.

        Args:
            name: of the folder: what an interrupted pass left belongs to this model, text and name.
            outcomes: of each layer; None leaves all layers as they are.
        """
        text, request = self._text, self._request
        with Streamed(
            self._checkpoint,
            text.batches,
            statistics=("load", *request.method.required),
            folder=None if text.folder is None else text.folder / name,
            dtype=text.dtype,
            device=text.device,
        ) as streamed:

            def change(moe: MoELayer, statistics: LayerStatistics) -> nn.Module | None:
                if outcomes is None or outcomes[moe.index].unchanged(moe.geometry.experts):
                    return None
                weights = read_block(moe, streamed.loader.model.config)
                inputs = LayerInputs(moe.index, moe.geometry, statistics, lambda: weights, request.seed)
                outcome = outcomes[moe.index]
                made = request.method.transform(weights, outcome, inputs)
                config = resized_config(streamed.loader.model.config, made.experts, width=outcome.width)
                return resized_block(moe, config, made, outcome)

            streamed.run(self._progress, refuse_damaged if outcomes is None else change)
            meta = streamed.trace(tokenizer=text.tokenizer, source=text.source, seed=request.seed).meta
            return {layer: record.statistics for layer, record in streamed.records.items()}, meta


def pass_name(request: PlanRequest, outcomes: Mapping[int, LayerOutcome]) -> str:
    """What tells a pass behind changed layers from others of the same model and text."""
    told = [repr(request.method), request.seed, sorted((n, o.model_dump_json()) for n, o in outcomes.items())]
    return f"changed-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}"
