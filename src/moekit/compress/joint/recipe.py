"""A choice of the planner: a complete recipe for one layer, since kinds of compression inside one layer interact.

Half the width and half the bits together cost less than the sum of both, half the experts and half the width much less:
so what is measured and priced is the recipe as a whole, never its parts.

Legend: E experts, I expert width.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Way = Literal["", "drop", "merge"]


class LayerRecipe(BaseModel):
    """What is done to one layer, in this order: fewer experts, then narrower ones, then fewer bits.

    Attributes:
        keep: experts that stay; None for all.
        way: how the others go: dropped, or merged into those that stay; "" where all stay.
        width: neurons of each expert; None as before.
        bits: of each weight of the experts; None as stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: int | None = Field(default=None, ge=1)
    way: Way = ""
    width: int | None = Field(default=None, ge=1)
    bits: int | None = Field(default=None, ge=1, le=8)

    @model_validator(mode="after")
    def _consistent(self) -> LayerRecipe:
        if (self.keep is None) != (self.way == ""):
            raise ValueError("a recipe that keeps fewer experts says how, and no other does")
        return self

    @property
    def unchanged(self) -> bool:
        """Whether the layer stays as it is."""
        return self == AS_IT_IS

    @property
    def kinds(self) -> int:
        """How many kinds of compression it combines."""
        return (self.keep is not None) + (self.width is not None) + (self.bits is not None)

    def experts(self, before: int) -> int:
        """Experts that stay of so many."""
        return before if self.keep is None else min(self.keep, before)

    def fitted(self, experts: int, width: int) -> LayerRecipe:
        """The same for a layer of this size: what asks for nothing less than it has is left out."""
        fewer = self.keep is not None and self.keep < experts
        return LayerRecipe(
            keep=self.keep if fewer else None,
            way=self.way if fewer else "",
            width=self.width if self.width is not None and self.width < width else None,
            bits=self.bits,
        )

    def __str__(self) -> str:
        parts = []
        if self.keep is not None:
            parts.append(f"{self.way} to {self.keep}")
        if self.width is not None:
            parts.append(f"width {self.width}")
        if self.bits is not None:
            parts.append(f"{self.bits} bit")
        return ", ".join(parts) or "as it is"


AS_IT_IS = LayerRecipe()
