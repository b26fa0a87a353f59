"""A prompt scored by a model in memory: what the scores from disk are held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.anatomy import find_moe_layers
from moekit.compress.engine.dropping import PruneMethod
from moekit.serving.expert_sets.scoring import score_layers
from moekit.trace.recorder import record


def query(model: PreTrainedModel, ids: Sequence[int], *, method: PruneMethod, layers: int = 1) -> Tensor:
    """Score a prompt as a task is scored, on its own tokens, at the first MoE layers: [layers, E]."""
    geometries = {layer.index: layer.geometry for layer in find_moe_layers(model)[:layers]}
    trace = record(
        model,
        [torch.tensor([list(ids)])],
        statistics=method.required,
        keep_choices=False,
        layers=list(geometries),
        fingerprint="",
    )
    scores = score_layers(method, trace.require(method.required), geometries)
    return torch.stack([scores[layer].double().cpu() for layer in geometries])
