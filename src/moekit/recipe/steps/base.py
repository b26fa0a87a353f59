"""What a step is: a frozen config that can say what it would do, and do it."""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from moekit._progress import Progress
from moekit.recipe.plan import Forecast, Sizes


@dataclass(frozen=True)
class Reads:
    """Marks a field whose value names something that the step reads.

    Attributes:
        kind: "model", "text", "trace", "plan", "placement", "results", "questions" or "experts".
    """

    kind: str


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


_Text = Annotated[str, BeforeValidator(_as_text)]

ModelRef = Annotated[_Text, Reads("model")]
TextRef = Annotated[_Text, Reads("text")]
TraceRef = Annotated[_Text, Reads("trace")]
PlanRef = Annotated[_Text, Reads("plan")]
PlacementRef = Annotated[_Text, Reads("placement")]
ResultsRef = Annotated[_Text, Reads("results")]
ExpertsRef = Annotated[_Text, Reads("experts")]
QuestionsRef = Annotated[_Text, Reads("questions")]


@dataclass(frozen=True)
class Finished:
    """A step that is done, as later steps see it."""

    id: str
    use: str
    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]


@dataclass
class Workplace:
    """Where a step works.

    Attributes:
        out: the folder it writes, under its final name; the step writes it whole or not at all.
        scratch: a folder of its own that survives a kill, for work that can resume; removed when the step is done.
        seed: of everything random in it.
        progress: told how far it is.
        command: what the record of a written checkpoint says made it.
        overwrite: whether `out` may be replaced.
        finished: steps of the same run that are done, by id.
    """

    out: Path
    scratch: Path
    seed: int = 0
    progress: Progress | None = None
    command: str = ""
    overwrite: bool = True
    finished: Mapping[str, Finished] = field(default_factory=dict)


class Step(BaseModel, ABC):
    """Base of all steps.

    Attributes:
        id: name of the step in its recipe; its output folder is called so.
        seed: overrides the recipe's seed for this step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    id: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$", description="name of the step; its folder is called so")
    seed: int | None = Field(default=None, ge=0, description="seed of this step; the recipe's by default")

    def inputs(self) -> list[tuple[str, str]]:
        """Pairs of kind and reference of everything the step reads."""
        found: list[tuple[str, str]] = []
        for name, info in type(self).model_fields.items():
            kinds = [mark.kind for mark in _marks(info) if isinstance(mark, Reads)]
            value = getattr(self, name)
            if kinds and value:
                found += [(kinds[0], item) for item in (value if isinstance(value, tuple | list) else [value])]
        return found

    def further_outputs(self) -> tuple[Path, ...]:
        """Files that the step writes beside its folder."""
        return ()

    def check(self) -> None:
        """Refuse what cannot work, before any step runs.

        Raises:
            BadConfig: naming the option and what was given.
        """

    def identity(self) -> dict[str, Any]:
        """What makes this the same piece of work when it is called again after a kill."""
        return self.model_dump(mode="json")

    @abstractmethod
    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """Say what the step would read, write and need, from file sizes and headers alone.

        Args:
            out: where it would write.
            sizes: sizes of what is there or will be.
        """

    @abstractmethod
    def run(self, work: Workplace) -> dict[str, Any]:
        """Do it.

        Returns:
            Figures for the report and for --json: plain values only.
        """


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
