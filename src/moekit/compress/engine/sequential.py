"""From a checkpoint and a text to a plan of sparsity, layer by layer from disk, and from the plan to the zeros.

All of the text passes through a layer, its statistics are taken, the layer is made sparse, and the text passes through
the sparse layer on to the next: so each layer is judged by what the sparse layers before it give. How many zeros a
layer gets is decided beforehand, on the model as it is.

Legend: E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moekit import catalogue
from moekit._progress import Progress
from moekit.anatomy.probe import Geometry, MoELayer
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.parents import expert_weights
from moekit.compress.budget.sparsity import Count, count_zeros
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.planning import geometries_of, weights_reader
from moekit.compress.engine.resize import read_block, resized_block, resized_config
from moekit.compress.engine.sparsity_plan import LayerShare, SparsityFile, SparsityPlan
from moekit.compress.engine.weights import LayerWeights
from moekit.compress.engine.zeroing import SparsifyMethod, check_sparsity
from moekit.errors import BadConfig
from moekit.trace.meta import TraceMeta
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Attributes:
        method: the method.
        sparsity: share of zeros among the weights that are there.
        total: share of `original` that is to be gone; for the reader of the plan.
        original: routed experts' weights before any experts were removed; None where unknown.
        seed: of everything random.
    """

    method: SparsifyMethod
    sparsity: float
    total: float | None = None
    original: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Calibration:
    """A text, and how it passes through the model.

    Attributes:
        batches: as `moekit.trace.record` takes them; they are gone through once or twice.
        folder: where states and finished layers are kept, so that a run that was interrupted goes on; None for memory.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
        tokenizer: that made the batches.
        source: what to call the text.
    """

    batches: Sequence[Any]
    folder: Path | None = None
    dtype: torch.dtype | None = None
    device: str = "auto"
    tokenizer: PreTrainedTokenizerBase | None = None
    source: str = ""


def plan_sparsity(
    checkpoint: Checkpoint, text: Calibration | None, request: Request, progress: Progress | None = None
) -> SparsityPlan:
    """Share the sparsity among the layers and measure what says where each layer's zeros go.

    A method that shares by what it measures takes one pass through the model as it is; one that looks at activations
    takes a pass through the model as it becomes sparse. Magnitudes take none.

    Args:
        checkpoint: what is to become sparse; its layers may hold different numbers of experts.
        text: to calibrate on; None for methods that need nothing.
        request: method, sparsity and the rest.
        progress: told layer by layer.

    Raises:
        BadConfig: an impossible sparsity, or a method that needs a text and got none.
        BadData: no token reached the experts.
        NumericFault: a weight is NaN or infinite; names layer and expert.
        UnsupportedModel: no Mixture of Experts, or quantized.
    """
    method = request.method
    check_sparsity(request.sparsity, method.fixed_sparsity)
    if text is None and (method.required or method.sequential):
        raise BadConfig(
            f"{catalogue.of(type(method)).name} decides from {', '.join(method.required) or 'activations'}",
            hint="give text (--data)",
        )
    geometries = geometries_of(checkpoint)
    read = weights_reader(checkpoint) if method.reads_weights else None
    found = {layer: LayerStatistics(g.experts, g.hidden, width=g.width) for layer, g in geometries.items()}
    meta: TraceMeta | None = None
    shares_differently = type(method).allocate is not SparsifyMethod.allocate
    if text is not None and method.required and (shares_differently or not method.sequential):
        found, meta = _Pass(checkpoint, text, request, progress).run("plain", None)
    inputs = InputsByLayer(geometries, found, read, request.seed)
    shares = _checked(method.allocate(inputs, request.sparsity), geometries)
    if text is not None and method.sequential:
        found, meta = _Pass(checkpoint, text, request, progress).run(_key(request, shares), shares)
        inputs = InputsByLayer(geometries, found, read, request.seed)
    layers = {
        layer: LayerShare(
            experts=g.experts,
            hidden=g.hidden,
            width=g.width,
            sparsity=shares[layer],
            never_routed=tuple(found[layer].never_routed),
            figures=method.figures(inputs[layer]) if method.required else {},
        )
        for layer, g in geometries.items()
    }
    return SparsityPlan(_file(checkpoint, request, layers, expert_weights(geometries), meta), found)


def _file(
    checkpoint: Checkpoint, request: Request, layers: dict[int, LayerShare], weights: int, meta: TraceMeta | None
) -> SparsityFile:
    return SparsityFile(
        method=catalogue.of(type(request.method)).name,
        settings=request.method.model_dump(mode="json"),
        sparsity=request.sparsity,
        total=request.total,
        original=request.original,
        weights=weights,
        seed=request.seed,
        model=str(checkpoint.path),
        fingerprint=checkpoint.fingerprint,
        data=() if meta is None else tuple(meta.data),
        tokens=0 if meta is None else meta.tokens,
        layers=layers,
        warnings=tuple(_warnings(layers, meta)),
    )


class InputsByLayer(Mapping[int, LayerInputs]):
    """What a method sees of every layer, made anew each time it is asked: no layer's weights stay in memory."""

    def __init__(
        self,
        geometries: Mapping[int, Geometry],
        statistics: Mapping[int, LayerStatistics],
        read: Callable[[int], LayerWeights] | None,
        seed: int,
    ) -> None:
        self._geometries = geometries
        self._statistics = statistics
        self._read = read
        self._seed = seed

    def __getitem__(self, layer: int) -> LayerInputs:
        read = self._read
        return LayerInputs(
            layer,
            self._geometries[layer],
            self._statistics[layer],
            None if read is None else lambda: read(layer),
            self._seed,
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self._geometries)

    def __len__(self) -> int:
        return len(self._geometries)


class _Pass:
    """One way of the text through the model."""

    def __init__(self, checkpoint: Checkpoint, text: Calibration, request: Request, progress: Progress | None) -> None:
        self._checkpoint = checkpoint
        self._text = text
        self._request = request
        self._progress = progress

    def run(self, name: str, shares: Mapping[int, float] | None) -> tuple[dict[int, LayerStatistics], TraceMeta]:
        """Statistics of every layer, behind layers as they are, or behind layers made sparse by these shares.

        Args:
            name: of the folder: what an interrupted pass left belongs to this model, text and name.
            shares: decoder layer -> sparsity; None leaves all layers as they are.
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
                if shares is None or not shares[moe.index]:
                    return None
                weights = read_block(moe)
                inputs = LayerInputs(moe.index, moe.geometry, statistics, lambda: weights, request.seed)
                made = request.method.transform(weights, inputs, shares[moe.index])
                return resized_block(moe, resized_config(streamed.loader.model.config, made.experts), made)

            streamed.run(self._progress, None if shares is None else change)
            meta = streamed.trace(tokenizer=text.tokenizer, source=text.source, seed=request.seed).meta
            return {layer: record.statistics for layer, record in streamed.records.items()}, meta


def _key(request: Request, shares: Mapping[int, float]) -> str:
    """What tells a pass behind sparse layers from others of the same model and text."""
    told = [repr(request.method), request.seed, sorted(shares.items())]
    return f"sparse-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}"


def _checked(shares: Mapping[int, float], geometries: Mapping[int, Geometry]) -> dict[int, float]:
    for layer in geometries:
        if layer not in shares:
            raise BadConfig("the method gave this layer no sparsity", layer=layer, hint="allocate must name all layers")
        check_sparsity(shares[layer], layer=layer)
    return {layer: shares[layer] for layer in geometries}


def _warnings(layers: Mapping[int, LayerShare], meta: TraceMeta | None) -> Iterator[str]:
    for layer, told in layers.items():
        if told.never_routed:
            yield (
                f"layer {layer}: {len(told.never_routed)} of {told.experts} experts were never routed in the "
                "calibration text: nothing says which of their weights matter"
            )
    if meta is not None and sum(entry.documents for entry in meta.data) == 1:
        yield "the calibration text is a single document: its inputs may be those of that document alone"


class PlannedZeros:
    """Makes a layer sparse as a plan says: a `Rewrite` for disk, for models in memory, and for the proof.

    Args:
        plan: the plan.
        geometries: decoder layer -> sizes, of the checkpoint that the plan was made for.

    Attributes:
        counts: decoder layer -> zeros counted in what was made of it last.
    """

    def __init__(self, plan: SparsityPlan, geometries: Mapping[int, Geometry]) -> None:
        self.counts: dict[int, Count] = {}
        self._plan = plan
        self._method = plan.method
        self._geometries = geometries

    def __call__(self, layer: int, weights: LayerWeights) -> LayerWeights:
        """The layer with its zeros."""
        statistics, share = self._plan.statistics[layer], self._plan.file.layers[layer].sparsity
        inputs = LayerInputs(layer, self._geometries[layer], statistics, lambda: weights, self._plan.file.seed)
        made = self._method.transform(weights, inputs, share)
        self.counts[layer] = count_zeros(made)
        return made

    @property
    def count(self) -> Count:
        """Zeros and weights of all layers."""
        return sum(self.counts.values(), Count())


def zeros_of(plan: SparsityPlan, checkpoint: Checkpoint) -> PlannedZeros:
    """What turns the layers of a checkpoint into those of a plan.

    Raises:
        BadConfig: the plan was made for another model.
    """
    plan.check_model(checkpoint.fingerprint, checkpoint.path)
    return PlannedZeros(plan, geometries_of(checkpoint))
