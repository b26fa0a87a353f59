"""What a method decides about one layer, as a person can read it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator


class LayerDecision(BaseModel):
    """Which experts a layer keeps, and who goes into whom.

    Attributes:
        keep: experts that stay, ascending; position in this list is their new number.
        groups: for each kept expert all experts that go into it, itself among them; None where the others are dropped.
        shares: for each kept expert the weights of its group's members; they sum to 1.
        figures: what else is worth telling, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...] | None = None
    shares: tuple[tuple[float, ...], ...] | None = None
    figures: dict[str, float | list[float]] = {}

    @model_validator(mode="after")
    def _consistent(self) -> LayerDecision:
        if list(self.keep) != sorted(set(self.keep)) or not self.keep:
            raise ValueError("keep must be ascending, each expert once, and not empty")
        if self.groups is not None:
            aligned = len(self.groups) == len(self.keep)
            if not aligned or any(k not in g for k, g in zip(self.keep, self.groups, strict=True)):
                raise ValueError("there must be one group for each kept expert, which is in it")
            members = [e for group in self.groups for e in group]
            if len(members) != len(set(members)):
                raise ValueError("an expert goes into one group only")
        if self.shares is not None:
            sizes = [len(g) for g in self.groups or ()]
            if [len(s) for s in self.shares] != sizes:
                raise ValueError("shares must follow the groups")
        return self

    @property
    def merges(self) -> bool:
        """Whether any group has more than one member."""
        return self.groups is not None and any(len(group) > 1 for group in self.groups)
