"""What a recipe can do: one file per step, each a thin layer over the library."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moekit.recipe.steps.apply import ApplyStep
from moekit.recipe.steps.base import Step
from moekit.recipe.steps.convert import ConvertStep
from moekit.recipe.steps.data import DataStep
from moekit.recipe.steps.evaluate import EvaluateStep
from moekit.recipe.steps.pattern import PatternStep
from moekit.recipe.steps.place import PlaceStep
from moekit.recipe.steps.pretrain_tiny import PretrainTinyStep
from moekit.recipe.steps.profile import ProfileStep
from moekit.recipe.steps.prune import PruneStep
from moekit.recipe.steps.report import ReportStep
from moekit.recipe.steps.route import RouteStep
from moekit.recipe.steps.sparsify import SparsifyStep
from moekit.recipe.steps.super_experts import SuperExpertsStep
from moekit.recipe.steps.train import TrainStep

AnyStep = Annotated[
    DataStep
    | ConvertStep
    | PretrainTinyStep
    | TrainStep
    | ProfileStep
    | SuperExpertsStep
    | PruneStep
    | ApplyStep
    | SparsifyStep
    | PatternStep
    | RouteStep
    | PlaceStep
    | EvaluateStep
    | ReportStep,
    Field(discriminator="use"),
]

# `use:` -> class, in the order of a usual recipe.
STEPS: dict[str, type[Step]] = {
    "data": DataStep,
    "convert": ConvertStep,
    "pretrain-tiny": PretrainTinyStep,
    "train": TrainStep,
    "profile": ProfileStep,
    "super-experts": SuperExpertsStep,
    "prune": PruneStep,
    "apply": ApplyStep,
    "sparsify": SparsifyStep,
    "pattern": PatternStep,
    "route": RouteStep,
    "place": PlaceStep,
    "evaluate": EvaluateStep,
    "report": ReportStep,
}
