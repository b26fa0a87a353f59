"""What the options of all jobs have in common: what they read, and what they write beside their folder."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


@dataclass(frozen=True)
class InputKind:
    """Marks a field whose value names something that the job reads.

    Attributes:
        kind: "model", "text", "trace", "plan", "placement", "results", "questions" or "experts".
    """

    kind: str


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


_Text = Annotated[str, BeforeValidator(_as_text)]

ModelRef = Annotated[_Text, InputKind("model")]
TextRef = Annotated[_Text, InputKind("text")]
TraceRef = Annotated[_Text, InputKind("trace")]
PlanRef = Annotated[_Text, InputKind("plan")]
PlacementRef = Annotated[_Text, InputKind("placement")]
ResultsRef = Annotated[_Text, InputKind("results")]
ExpertsRef = Annotated[_Text, InputKind("experts")]
QuestionsRef = Annotated[_Text, InputKind("questions")]


class JobOptions(BaseModel):
    """Base of the options of all jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def inputs(self) -> list[tuple[str, str]]:
        """Pairs of kind and reference of everything the job reads."""
        found: list[tuple[str, str]] = []
        for name, info in type(self).model_fields.items():
            kinds = [mark.kind for mark in _marks(info) if isinstance(mark, InputKind)]
            value = getattr(self, name)
            if kinds and value:
                found += [(kinds[0], item) for item in (value if isinstance(value, tuple | list) else [value])]
        return found

    def further_outputs(self) -> tuple[Path, ...]:
        """Files that the job writes beside its folder."""
        return ()

    def identity(self) -> dict[str, Any]:
        """What makes this the same piece of work when it is called again after a kill."""
        return self.model_dump(mode="json")


def _marks(field: Any) -> list[Any]:
    """Annotations of a field, also inside optional and sequence types."""
    marks = list(field.metadata)
    queue = [field.annotation]
    while queue:
        annotation = queue.pop()
        marks += getattr(annotation, "__metadata__", ())
        queue += [
            a for a in typing.get_args(annotation) if typing.get_origin(a) is not None or hasattr(a, "__metadata__")
        ]
    return marks
