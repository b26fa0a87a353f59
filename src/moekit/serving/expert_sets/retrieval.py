"""Find the task a prompt belongs to: its scores at the first layers against those of stored expert sets.

The expert set's own scores, not the prompt's, then say which experts to load (arXiv:2505.17639).

Legend: E experts, Q layers compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moekit._progress import Progress
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.dropping import PruneMethod
from moekit.errors import BadData, NumericFault
from moekit.serving.expert_sets.expert_set import ExpertSet
from moekit.serving.expert_sets.recording import GroupedText
from moekit.serving.expert_sets.scoring import score_layers

Metric = Literal["l2", "cosine"]


def queries_from_disk(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    method: PruneMethod,
    layers: int = 1,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Tensor]:
    """Score prompts as `query` does, reading no more of a checkpoint than its first layers, one at a time.

    Args:
        checkpoint: opened and verified.
        prompts: token ids of each.
        method: the one that scored the expert sets.
        layers: how many MoE layers from the first.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
        progress: told layer by layer.

    Returns:
        For each prompt [layers, E] fp64.

    Raises:
        BadConfig: the model has fewer MoE layers, or does not embed a token.
        BadData: no prompts, or an empty one.
        UnsupportedModel: weights quantized in a way that is not read here.
    """
    if not prompts or not all(prompts):
        raise BadData("a prompt has no tokens, or there is none", hint="leave empty prompts out")
    texts = {str(number): [torch.tensor([list(ids)])] for number, ids in enumerate(prompts)}
    reading = GroupedText(checkpoint, texts, statistics=method.required, layers=layers, dtype=dtype, device=device)
    found = []
    for statistics in reading.run(progress).values():
        scores = score_layers(method, statistics, reading.geometries)
        found.append(torch.stack([scores[layer].double().cpu() for layer in sorted(scores)]))
    return found


@dataclass(frozen=True)
class Retrieval:
    """Which task a prompt belongs to.

    Attributes:
        task: the nearest, or the fallback (None without one) where even that is too far.
        distance: of the nearest.
        ranked: all tasks with their distances, nearest first.
    """

    task: str | None
    distance: float
    ranked: tuple[tuple[str, float], ...]


def retrieve(
    expert_sets: Mapping[str, ExpertSet],
    scores: Tensor,
    *,
    metric: Metric = "l2",
    limit: float | None = None,
    fallback: str | None = None,
) -> Retrieval:
    """The task whose scores are nearest to a prompt's.

    Args:
        expert_sets: by task.
        scores: what `query` gave, [E] or [Q, E]: the mean of the distances at the first Q layers counts.
        metric: "l2", as the paper, or "cosine": 1 - cosine, which no layer's scale dominates.
        limit: a prompt farther than this from all tasks is none of them.
        fallback: task to name then, such as the generalist; it is not compared.

    Raises:
        BadData: nothing to compare with, scores of another model, or more layers than expert sets hold.
        NumericFault: the scores are not finite.
    """
    query_QE = (scores[None] if scores.dim() == 1 else scores).detach().double().cpu()
    if not bool(query_QE.isfinite().all()):
        raise NumericFault("the prompt's scores are not finite", hint="see `moekit check`")
    distances = []
    for task, expert_set in expert_sets.items():
        if task == fallback:
            continue
        stored_QE = expert_set.scores(len(query_QE))
        if stored_QE.shape != query_QE.shape:
            raise BadData(
                f"the prompt was scored by {query_QE.shape[1]} experts, {task!r} by {stored_QE.shape[1]}",
                hint="score the prompt with the model the expert sets are of",
            )
        if metric == "l2":
            far_Q = torch.linalg.vector_norm(query_QE - stored_QE, dim=1)
        else:
            far_Q = 1.0 - torch.nn.functional.cosine_similarity(query_QE, stored_QE, dim=1)
        distances.append((task, float(far_Q.mean())))
    if not distances:
        raise BadData("there are no expert sets to compare with", hint="store at least one task")
    distances.sort(key=lambda pair: pair[1])
    nearest, distance = distances[0]
    near = limit is None or distance <= limit
    return Retrieval(nearest if near else fallback, distance, tuple(distances))
