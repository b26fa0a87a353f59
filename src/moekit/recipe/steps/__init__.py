"""What a recipe can do: one file per step, each a thin layer over the library."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moekit.recipe.steps.base import Step
from moekit.recipe.steps.convert import ConvertStep
from moekit.recipe.steps.data import DataStep
from moekit.recipe.steps.profile import ProfileStep
from moekit.recipe.steps.route import RouteStep

AnyStep = Annotated[DataStep | ConvertStep | ProfileStep | RouteStep, Field(discriminator="use")]

# `use:` -> class, in the order of a usual recipe.
STEPS: dict[str, type[Step]] = {"data": DataStep, "convert": ConvertStep, "profile": ProfileStep, "route": RouteStep}
