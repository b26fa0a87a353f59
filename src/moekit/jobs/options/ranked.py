"""How ranks share the experts of a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moekit.jobs.options.base import JobOptions, PlacementRef


class RankedOptions(JobOptions):
    """How ranks share the experts of a model."""

    ep: int = Field(default=1, ge=1, description="ranks that share each layer's experts; start them with torchrun")
    nodes: int = Field(default=1, ge=1, description="nodes that these ranks stand in, for hierarchical dispatch")
    dispatch: str = Field(default="once-per-rank", description="how tokens travel; see moekit methods dispatch")
    placement: PlacementRef | None = Field(default=None, description="placement file: which rank holds which expert")
    codec: Literal["none", "int8"] = Field(default="none", description="int8 sends hidden states in 8 bits; lossy")
