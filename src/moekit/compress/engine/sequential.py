"""A text on its way through a model, layer by layer from disk: as it is, or through layers as they become.

All of the text passes through a layer, its statistics are taken, the layer is changed, and the text passes through the
changed layer on to the next: so each layer is judged by what the changed layers before it give. What each layer gets of
the budget is decided beforehand; what becomes of it, too, or there, from the statistics just taken.

Legend: E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from moekit._progress import Progress
from moekit.anatomy.probe import MoELayer
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.grouped import routing_groups
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.made_layers import MadeLayers
from moekit.compress.engine.measuring import as_stored, refuse_damaged
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.redirected_block import redirected_block
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block, resized_block, resized_config
from moekit.trace.meta import TraceMeta
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed

# What becomes of a layer, from what it shows where it stands.
Decide = Callable[[LayerInputs], LayerOutcome]


class TextPass:
    """One way of the text through the model.

    Args:
        checkpoint: the model.
        text: the text.
        request: whose method measures and changes.
        progress: told layer by layer.

    Attributes:
        made: the changed layers of the last run, where the method's weights can be made nowhere else.
    """

    def __init__(
        self, checkpoint: Checkpoint, text: CalibrationText, request: PlanRequest, progress: Progress | None
    ) -> None:
        self._checkpoint = checkpoint
        self._text = text
        self._request = request
        self._progress = progress
        self.made: MadeLayers | None = None

    def run(
        self, name: str, decide: Decide | None, *, dropped: bool = False
    ) -> tuple[dict[int, LayerStatistics], TraceMeta]:
        """Statistics of every layer, behind layers as they are, or behind layers changed by these outcomes.

        Args:
            name: of the folder: what an interrupted pass left belongs to this model, text and name.
            decide: says what becomes of each layer, and the same when it is asked again; None leaves all as they are.
            dropped: whether any layer loses experts: then all of them give up routing groups, unless these stay.
        """
        text, request = self._text, self._request
        folder = None if text.folder is None else text.folder / name
        keeps = request.method.reads_moments and decide is not None
        self.made = MadeLayers(None if folder is None else folder / "made") if keeps else None
        looks = request.method.reads_inner and decide is not None
        with Streamed(
            self._checkpoint,
            text.batches,
            statistics=("load", *request.method.required),
            folder=folder,
            dtype=text.dtype,
            device=text.device,
            keep_inputs=keeps or looks,
        ) as streamed:
            change = refuse_damaged if decide is None else partial(self._change, streamed, decide, dropped)
            streamed.run(self._progress, change)
            meta = streamed.trace(tokenizer=text.tokenizer, source=text.source, seed=request.seed).meta
            return {layer: record.statistics for layer, record in streamed.records.items()}, meta

    def _change(
        self, streamed: Streamed, decide: Decide, dropped: bool, moe: MoELayer, statistics: LayerStatistics
    ) -> nn.Module | None:
        """The block that the text goes on through; None for the layer as it is."""
        refuse_damaged(moe, statistics)
        request, config = self._request, streamed.loader.model.config
        weights, read_moments, read_inner = read_block(moe, config), None, None
        if self.made is not None and streamed.inputs is not None:
            weights = as_stored(self._checkpoint, streamed.loader, moe.index, weights)
            read_moments = streamed.inputs.moments
        if request.method.reads_inner and streamed.inputs is not None:
            read_inner = streamed.inputs.inner
        protected = frozenset((request.protected or {}).get(moe.index, ()))
        inputs = LayerInputs(
            moe.index,
            moe.geometry,
            statistics,
            lambda: weights,
            request.seed,
            protected,
            read_moments=read_moments,
            read_inner=read_inner,
        )
        outcome = decide(inputs)
        regrouped = dropped and request.groups == "free" and routing_groups(config.to_dict()) > 1
        if outcome.unchanged(moe.geometry.experts) and request.top_k is None and not regrouped:
            return None
        statistics.keep(request.method.finds(weights, outcome, inputs))
        new = request.method.transform(weights, outcome, inputs)
        if self.made is not None:
            self.made.put(moe.index, new)
            new = new.map(lambda t: t.to(streamed.loader.dtype), router=False)
        if outcome.redirect is not None:
            experts, width = moe.geometry.experts, outcome.width
            whole = resized_config(config, experts, top_k=request.top_k, groups="equal", width=width)
            return redirected_block(moe, whole, weights, new, outcome, request.method.novices(inputs, outcome))
        sized = resized_config(
            config,
            new.experts,
            top_k=request.top_k,
            groups=request.groups,
            dropped=dropped or new.experts != moe.geometry.experts,
            width=outcome.width,
        )
        return resized_block(moe, sized, new, outcome)


def pass_name(request: PlanRequest, decided: Mapping[int, LayerOutcome] | Mapping[int, float]) -> str:
    """What tells a pass behind changed layers from others of the same model and text.

    Args:
        request: method, seed and the rest.
        decided: outcomes of all layers; or what each layer gets of the budget, where they are decided on the way.
    """
    told = [repr(request.method), request.seed, request.top_k, request.groups]
    told += [sorted((n, sorted(experts)) for n, experts in (request.protected or {}).items())]
    told += [sorted((n, o.model_dump_json() if isinstance(o, LayerOutcome) else o) for n, o in decided.items())]
    return f"changed-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}"
