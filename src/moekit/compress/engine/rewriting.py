"""From a plan to the function that makes the new weights of each layer.

Legend: E experts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sparsity import Count, count_zeros
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.weights import LayerWeights
from moekit.errors import UnsupportedModel

_FIELDS = ("up_EIH", "down_EHI", "gate_EIH", "up_bias_EI", "gate_bias_EI", "down_bias_EH")


class PlannedRewrite:
    """Makes a layer's new weights as a plan says, and keeps the figures that the method tells of them.

    Called with a decoder layer and the weights of all its experts, it gives those of what stays, in the order of the
    outcome. Layers that stay as they are come back as they are.

    Args:
        plan: whose method rewrites.
        geometries: decoder layer -> sizes.
        folder: where finished layers are kept, so that work done once is not done again, also after an interruption;
            None keeps nothing.

    Attributes:
        figures: decoder layer -> what the method tells of its rewriting, by name; empty where it tells nothing.
        counts: decoder layer -> zeros counted in what was made of it last, where zeros were asked for.
    """

    def __init__(self, plan: WeightPlan, geometries: dict[int, Geometry], folder: Path | None = None) -> None:
        self.figures: dict[int, dict[str, float]] = {}
        self.counts: dict[int, Count] = {}
        self._plan = plan
        self._method = plan.method
        self._outcomes = plan.outcomes
        self._geometries = geometries
        self._folder = folder

    def __call__(self, layer: int, weights: LayerWeights) -> LayerWeights:
        """New weights of one layer."""
        outcome = self._outcomes[layer]
        made = self._made(layer, outcome, weights)
        if outcome.sparsity is not None:
            self.counts[layer] = count_zeros(made)
        return made

    @property
    def count(self) -> Count:
        """Zeros and weights of all layers."""
        return sum(self.counts.values(), Count())

    def _made(self, layer: int, outcome: LayerOutcome, weights: LayerWeights) -> LayerWeights:
        if outcome.unchanged(weights.experts):
            return weights.select(outcome.keep)
        file = self._file(layer, weights)
        if file is not None and file.is_file():
            known, self.figures[layer] = _read(file)
            return known
        inputs = LayerInputs(
            layer,
            self._geometries[layer],
            self._plan.statistics[layer],
            lambda: weights,
            self._plan.file.seed,
            frozenset(self._plan.file.protected.get(layer, ())),
        )
        made = self._method.transform(weights, outcome, inputs)
        self.figures[layer] = dict(self._method.told(weights, outcome, inputs))
        if file is not None:
            _write(file, made, self.figures[layer])
        return made

    def _file(self, layer: int, weights: LayerWeights) -> Path | None:
        if self._folder is None:
            return None
        kind = str(weights.up_EIH.dtype).removeprefix("torch.")
        return self._folder / f"rewritten-{self._plan.hash[:16]}-{layer}-{kind}.safetensors"


def rewriter(plan: WeightPlan, checkpoint: Checkpoint, *, folder: Path | None = None) -> PlannedRewrite | None:
    """What turns a layer's weights into those that a plan keeps; None where its method only drops experts.

    Args:
        plan: the plan.
        checkpoint: what is to be pruned.
        folder: see `PlannedRewrite`; it is made.

    Raises:
        BadConfig: the plan was made for another model.
        UnsupportedModel: it asks for what is not carried out yet.
    """
    plan.check_model(checkpoint.fingerprint, checkpoint.path)
    if plan.file.rules:
        raise UnsupportedModel(
            f"the plan holds {len(plan.file.rules)} rules for tensors that belong to no expert, which are only counted",
            file=checkpoint.path,
            hint="leave the rules out",
        )
    if not plan.method.rewrites:
        return None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return PlannedRewrite(plan, geometries_of(checkpoint), folder)


def _write(file: Path, weights: LayerWeights, figures: dict[str, float]) -> None:
    tensors = {name: tensor for name in _FIELDS if (tensor := getattr(weights, name)) is not None}
    tensors |= {f"router.{name}": tensor for name, tensor in weights.router.items()}
    tensors |= {f"others.{name}": tensor for name, tensor in weights.others.items()}
    # Copies: parts of one fused tensor share their memory, which the format refuses.
    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    temporary = file.with_suffix(f".{os.getpid()}.part")
    save_file(apart, temporary, metadata={"figures": json.dumps(figures)})
    os.replace(temporary, file)


def _read(file: Path) -> tuple[LayerWeights, dict[str, float]]:
    with safe_open(file, framework="pt") as opened:
        figures: dict[str, float] = json.loads(opened.metadata()["figures"])
        tensors: dict[str, torch.Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def of(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    fields = {name: tensors.get(name) for name in _FIELDS}
    return LayerWeights(**fields, router=of("router."), others=of("others.")), figures  # type: ignore[arg-type]
