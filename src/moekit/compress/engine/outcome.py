"""What a method decides about one layer, as a person can read it: one form for dropping, merging, growing and the rest.

Legend: E experts before, M experts after, I expert width.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Part = Literal["gate", "up", "down"]
PARTS: tuple[Part, ...] = ("gate", "up", "down")
# Part of an expert -> bits a weight of each expert.
Widths = dict[Part, tuple[int, ...]]


class LayerOutcome(BaseModel):
    """What becomes of the routed experts of one layer.

    Attributes:
        keep: for each new expert the old one that it stands on, ascending; the position is the new number. Dropping
            leaves experts out, growing names one more than once.
        sources: for each new expert all old ones that go into it, the one it stands on among them; None where nothing
            is merged.
        shares: for each new expert the weights of its sources; they sum to 1.
        redirect: for each old expert the new one that takes its tokens, None for nobody, where the router goes on
            choosing among the old ones; None where the router chooses among the new ones.
        width: neurons of every expert from now on; None as before.
        shared_width: neurons of the shared experts from now on; None as before.
        bits: part of an expert -> bits a weight of each new expert; parts that are not named stay as they are.
        rank: part of an expert -> rank of each new expert's matrix; parts that are not named stay whole.
        sparsity: share of zeros among the experts' weights; None where no zeros are put in.
        figures: what else is worth telling, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...] | None = None
    shares: tuple[tuple[float, ...], ...] | None = None
    redirect: tuple[int | None, ...] | None = None
    width: int | None = Field(default=None, ge=1)
    shared_width: int | None = Field(default=None, ge=1)
    bits: Widths = {}
    rank: dict[Part, tuple[int, ...]] = {}
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    figures: dict[str, float | list[float]] = {}

    @model_validator(mode="after")
    def _consistent(self) -> LayerOutcome:
        if not self.keep or self.keep[0] < 0 or list(self.keep) != sorted(self.keep):
            raise ValueError("keep must be ascending, from 0 up, and not empty")
        self._check_sources()
        for name, named in (("bits", self.bits), ("rank", self.rank)):
            for part, values in named.items():
                if len(values) != len(self.keep) or min(values) < 1:
                    raise ValueError(f"{name} of {part} must be 1 or more, for each of {self.experts} experts")
        self._check_redirect()
        return self

    def _check_redirect(self) -> None:
        if self.redirect is None:
            return
        if any(e is not None and not 0 <= e < len(self.keep) for e in self.redirect):
            raise ValueError("redirect names a new expert that is not there")
        if any(old >= len(self.redirect) or self.redirect[old] != new for new, old in enumerate(self.keep)):
            raise ValueError("redirect must give an expert that stays its own tokens")

    def _check_sources(self) -> None:
        if self.sources is not None:
            aligned = len(self.sources) == len(self.keep)
            if not aligned or any(k not in members for k, members in zip(self.keep, self.sources, strict=True)):
                raise ValueError("sources must name, for each new expert, the one it stands on and all others")
            if any(len(set(members)) != len(members) for members in self.sources):
                raise ValueError("an expert goes into a new one once")
        if self.shares is None:
            return
        if [len(share) for share in self.shares] != [len(members) for members in self.sources or ()]:
            raise ValueError("shares must follow the sources")
        for share in self.shares:
            if not all(map(math.isfinite, share)) or abs(sum(share) - 1) > 1e-6:
                raise ValueError(f"the shares {share} do not sum to 1")

    @property
    def experts(self) -> int:
        """M."""
        return len(self.keep)

    @property
    def merges(self) -> bool:
        """Whether any new expert has more than one source."""
        return any(len(members) > 1 for members in self.sources or ())

    @property
    def grows(self) -> bool:
        """Whether an old expert is there more than once."""
        return len(set(self.keep)) < len(self.keep)

    @property
    def rewrites(self) -> bool:
        """Whether weights of experts are asked to become others than those of the experts they stand on."""
        return self.merges or bool(self.width or self.bits or self.rank) or self.sparsity is not None

    def keeps_all(self, experts: int) -> bool:
        """Whether all of a layer's experts stay, each once.

        Args:
            experts: E of the layer.
        """
        return self.keep == tuple(range(experts))

    def unchanged(self, experts: int) -> bool:
        """Whether a layer stays as it is.

        Args:
            experts: E of the layer.
        """
        return self.keeps_all(experts) and not self.rewrites
