"""How a checkpoint names the runtime parts that live in its model, and their tensors in `moekit.safetensors`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict

Role = Literal["constants", "learned", "shared"]
_ROLES = ("constants", "learned", "shared")


class PartEntry(BaseModel):
    """A runtime part that `moekit.load` restores.

    Attributes:
        name: catalogue name.
        kind: catalogue kind.
        config: its knobs.
        layers: decoder layers it is attached to.
        replaces: whether the shards leave out the matrices of these layers' experts, which the part alone gives.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    config: dict[str, Any] = {}
    layers: list[int] = []
    replaces: bool = False


@dataclass(frozen=True)
class PartTensor:
    """Which tensor of which part: "constants.0.3.partners", "learned.1.3.delta", "shared.1.weight_ih".

    Attributes:
        role: decided once ("constants"), learned by a layer, or learned by all layers together.
        part: position in the record's `parts`.
        layer: decoder layer; None for what is shared.
        name: the constant's name, or the learned state's key.
    """

    role: Role
    part: int
    layer: int | None
    name: str

    def __str__(self) -> str:
        place = "" if self.layer is None else f"{self.layer}."
        return f"{self.role}.{self.part}.{place}{self.name}"

    @classmethod
    def parse(cls, text: str) -> PartTensor | None:
        """Read such a name; None if it is none, so that other extra tensors may lie beside."""
        role, _, rest = text.partition(".")
        number, _, rest = rest.partition(".")
        if role not in _ROLES or not number.isdecimal():
            return None
        layer, _, name = rest.partition(".") if role != "shared" else ("", "", rest)
        if role != "shared" and not layer.isdecimal():
            return None
        return cls(cast(Role, role), int(number), int(layer) if layer else None, name) if name else None


def is_reserved(name: str) -> bool:
    """Whether an extra tensor's name is one that parts use."""
    return name.partition(".")[0] in _ROLES
