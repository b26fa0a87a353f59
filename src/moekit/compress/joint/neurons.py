"""What the neurons of each layer's experts are worth, and the second moments that repair narrower experts.

Both are seen where the text stands at a layer and are kept in a file a layer, since every recipe that narrows the layer
asks for them again: while it is priced, while its plan is measured, and when it is written. Gradients at a block's
output g (see `moekit.compress.joint.gradients`) say what the loss makes of each neuron: an expert's output counts w
times in the block's, so that dL/dy = w g, and dL/dh = W_down^T dL/dy.

Legend: N tokens of a batch, n tokens of one expert, E experts, M experts that stay, H hidden, I expert width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekit._progress import Progress, track
from moekit.anatomy.probe import MoELayer
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.narrowing import SlimMethod
from moekit.compress.engine.resize import read_block
from moekit.compress.joint.gradients import BlockGradients
from moekit.errors import UnsupportedModel
from moekit.trace.batch import widest
from moekit.trace.expert_batch import ExpertBatch, ExpertGradients
from moekit.trace.expert_inputs import ExpertInputs
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed
from moekit.trace.vocabulary import get

_MOMENT = "moment."


class NeuronStore:
    """Scores and moments of layers, a file each.

    Args:
        folder: where; None for a temporary one, which is gone with this object.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="moekit-neurons-") if folder is None else None
        self._folder = Path(self._own.name) if self._own is not None else Path(str(folder))
        self._folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, layer: int) -> bool:
        return self._file(layer).is_file()

    def put(self, layer: int, scores: dict[str, Tensor], moments: Sequence[Tensor]) -> None:
        """Keep a layer: name of a statistic -> [E, I], and each expert's gated second moment [I, I], in float32."""
        tensors = {name: value.cpu() for name, value in scores.items()}
        tensors |= {f"{_MOMENT}{e}": moment_II.float().cpu().contiguous() for e, moment_II in enumerate(moments)}
        temporary = self._file(layer).with_suffix(f".{os.getpid()}.part")
        save_file(tensors, temporary)
        os.replace(temporary, self._file(layer))

    def moment(self, layer: int, expert: int) -> Tensor:
        """Sum of w^2 h h^T over one expert's tokens, [I, I]."""
        with safe_open(self._file(layer), framework="pt") as opened:
            moment_II: Tensor = opened.get_tensor(f"{_MOMENT}{expert}")
        return moment_II

    def scores(self, layer: int) -> dict[str, Tensor]:
        """Name of a statistic -> its rows, [E, I]."""
        with safe_open(self._file(layer), framework="pt") as opened:
            names = [name for name in opened.keys() if not name.startswith(_MOMENT)]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}

    def standing(self, inputs: LayerInputs, stands_on: Sequence[int]) -> LayerInputs:
        """What is known of the experts that stay, each by the old one that it stands on, whose neurons it has.

        Args:
            inputs: of the layer as it was.
            stands_on: old numbers.
        """
        index_M = torch.tensor(list(stands_on), dtype=torch.int64)
        values = {name: rows_EI[index_M] for name, rows_EI in self.scores(inputs.layer).items()}
        values["load"] = inputs.statistics["load"].cpu()[index_M]
        tokens, width = inputs.statistics.tokens, inputs.geometry.width
        return LayerInputs(
            inputs.layer,
            dataclasses.replace(inputs.geometry, experts=len(index_M)),
            LayerStatistics(len(index_M), inputs.geometry.hidden, tokens=tokens, values=values, width=width),
            seed=inputs.seed,
            read_gated=lambda expert: self.moment(inputs.layer, stands_on[expert]),
        )

    def _file(self, layer: int) -> Path:
        return self._folder / f"neurons-{layer}.safetensors"


@torch.no_grad()
def see_neurons(
    streamed: Streamed,
    narrow: SlimMethod,
    store: NeuronStore,
    layers: Collection[int],
    *,
    gradients: BlockGradients | None = None,
    progress: Progress | None = None,
) -> None:
    """Let the text pass through the model once more, and keep what a method needs to narrow each layer.

    Args:
        streamed: the text on its way through the model.
        narrow: the method.
        store: where it goes; layers that are there are not measured again.
        layers: decoder layers.
        gradients: at the blocks' outputs; for methods that look at them.
        progress: told layer by layer.

    Raises:
        UnsupportedModel: this family's experts do not follow the plain formula.
    """
    missing = [layer for layer in layers if layer not in store]
    if not missing:
        return
    walk, loader = streamed.walk, streamed.loader
    inputs = ExpertInputs(streamed.passes, walk.hidden, loader.dtype)
    passes = walk.passes("neurons")
    try:
        passes.begin_loaded()
        for index in track(range(max(missing) + 1), "seeing neurons", progress):
            with loader.loaded(index):
                moe = walk.moe(index) if index in missing else None
                watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
                if moe is not None:
                    watching = inputs.watching(moe)
                with watching:
                    for number in range(len(passes)):
                        passes.run(index, number)
                        passes.go_on(index, number)
                if moe is not None:
                    _see(streamed, moe, narrow, inputs, store, gradients)
    finally:
        passes.close()
        inputs.close()


def _see(
    streamed: Streamed,
    moe: MoELayer,
    narrow: SlimMethod,
    inputs: ExpertInputs,
    store: NeuronStore,
    gradients: BlockGradients | None,
) -> None:
    down_EHI = read_block(moe, streamed.loader.model.config).down_EHI
    device, dtype = down_EHI.device, widest(down_EHI.device)
    width, experts = moe.geometry.width, moe.geometry.experts
    names = [name for name in narrow.scored_by if get(name).of_expert is not None]
    scores = {name: torch.zeros(experts, width, dtype=dtype, device=device) for name in names}
    moments = []
    for expert in range(experts):
        moment_II = torch.zeros(width, width, dtype=dtype, device=device)
        for number, token_n, batch in inputs.placed(expert):
            gated_nI = batch.inner_nI.to(dtype)
            if not moe.geometry.weighs_inputs:
                gated_nI = gated_nI * batch.weights_n.to(dtype)[:, None]
            moment_II += gated_nI.T @ gated_nI
            seen = batch
            if gradients is not None:
                mask_T = streamed.passes[number].mask_T
                gradient_NH = gradients.get(moe.index, number).flatten(0, 1)[mask_T]
                seen = _with_gradients(moe, batch, gradient_NH[token_n].to(device), down_EHI[expert])
            for name in names:
                scores[name][expert] += _measured(name, seen, moe).to(dtype)
        moments.append(moment_II)
    store.put(moe.index, scores, moments)


def _with_gradients(moe: MoELayer, batch: ExpertBatch, gradient_nH: Tensor, down_HI: Tensor) -> ExpertBatch:
    """The batch with what the loss makes of the expert's outputs and neurons."""
    output_nH = gradient_nH.to(batch.inner_nI.dtype)
    if not moe.geometry.weighs_inputs:
        output_nH = output_nH * batch.weights_n.to(output_nH)[:, None]
    found = ExpertGradients(output_nH, output_nH @ down_HI.to(output_nH.dtype), {})
    return dataclasses.replace(batch, gradients=found)


def _measured(name: str, seen: ExpertBatch, moe: MoELayer) -> Tensor:
    measure: Any = get(name).of_expert
    try:
        row_I: Tensor = measure(seen)
    except LookupError as error:
        raise UnsupportedModel(
            f"{name} looks at gradients, and there are none",
            layer=moe.index,
            hint="score neurons without them: --set narrow='{score: output-norm}'",
        ) from error
    return row_I
