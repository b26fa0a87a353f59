"""What the options of all jobs have in common: what they read, and what they write beside their folder."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict

from moekit.errors import BadConfig
from moekit.jobs.estimates import ByteSizes, JobEstimate

if TYPE_CHECKING:
    from moekit.catalogue import MethodRecord
    from moekit.jobs.context import JobContext


@dataclass(frozen=True)
class InputKind:
    """Marks a field whose value names something that the job reads.

    Attributes:
        kind: "model", "text", "trace", "plan", "placement", "results", "questions", "experts", "prompts" or
            "expert sets".
    """

    kind: str


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


# A path, written by the job or otherwise no input of it.
PathText = Annotated[str, BeforeValidator(_as_text)]

ModelRef = Annotated[PathText, InputKind("model")]
TextRef = Annotated[PathText, InputKind("text")]
TraceRef = Annotated[PathText, InputKind("trace")]
PlanRef = Annotated[PathText, InputKind("plan")]
PlacementRef = Annotated[PathText, InputKind("placement")]
ResultsRef = Annotated[PathText, InputKind("results")]
ExpertsRef = Annotated[PathText, InputKind("experts")]
SetsRef = Annotated[PathText, InputKind("expert sets")]
PromptsRef = Annotated[PathText, InputKind("prompts")]
QuestionsRef = Annotated[PathText, InputKind("questions")]


@dataclass(frozen=True)
class CommandLine:
    """How a job is called on the command line; the options themselves are the fields.

    Attributes:
        help: what it does, for its --help.
        writes: what OUT is.
        examples: command lines; for a job with a command a method, none.
        arguments: fields that are given as arguments; the others are options, and so is OUT, everywhere `-o OUT`.
        instead: option that may say what to write in OUT's place, such as --plan; OUT may be left out then.
        by_method: the kind whose methods are each a command of their own, such as "place" for `moekit place swap`;
            elsewhere the method is an option and its knobs are `--set KNOB=VALUE`.
        example: with `by_method`, the command line for a method's --help.
        hidden: fields that the command line gives in another way.
        flags: field -> its option, where that is not its name.
        aliases: field -> another option that means the same.
        settings: "module:Class" of what the field `settings` holds, whose fields become options.
        panel: heading of these options.
        overwrite: what --overwrite does.
    """

    help: str
    writes: str
    examples: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    instead: str = ""
    by_method: str = ""
    example: Callable[[MethodRecord], str] | None = None
    hidden: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    panel: str = ""
    overwrite: str = "Replace OUT, at the very end, if it is there."


class JobOptions(BaseModel):
    """Base of the options of all jobs.

    What a job does stands in the module that `job` names, as functions of these options: `run(options, context)` and
    `estimate(options, out, sizes)`, and where there is something to say, `check(options)`, `settle(options, out,
    overwrite)` and `further_inputs(options)`. That module may import torch; this one may not.

    Attributes:
        job: the module.
        needs_out: whether a call must say where to write; elsewhere the result alone may be wanted.
        command: how it is called on the command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    job: ClassVar[str] = ""
    needs_out: ClassVar[bool] = True
    command: ClassVar[CommandLine]

    def check(self) -> None:
        """Refuse what cannot work, before any work.

        Raises:
            BadConfig: naming the option and what was given.
        """
        self._call("check", None)

    def settled(self, out: Path | None, overwrite: bool) -> tuple[Self, Path, bool]:
        """What is to be done, where it is written, and whether that may replace what is there.

        Args:
            out: where to write; None where nothing was said.
            overwrite: whether what is there may be replaced.

        Raises:
            BadConfig: nothing says where to write, or something else is there.
        """
        found: tuple[Self, Path, bool] | None = self._call("settle", None, out, overwrite)
        if found is not None:
            return found
        if out is None:
            raise BadConfig("nothing says where to write", hint="-o OUT, in Python out=")
        return self, out, overwrite

    def wants_out(self) -> bool:
        """Whether this call must say where to write: what it asks for beside the result would be lost otherwise."""
        return self.needs_out

    def estimate(self, out: Path, sizes: ByteSizes) -> JobEstimate:
        """Say what the job would read, write and need, from file sizes and headers alone.

        Args:
            out: where it would write.
            sizes: sizes of what is there or will be.
        """
        found: JobEstimate = self._call("estimate", JobEstimate(), out, sizes)
        return found

    def run(self, context: JobContext) -> dict[str, Any]:
        """Do it.

        Args:
            context: where.

        Returns:
            Figures for reports and for --json: plain values only.
        """
        found: dict[str, Any] = self._call("run", {}, context)
        return found

    def _call(self, name: str, otherwise: Any, *args: Any) -> Any:
        function = getattr(importlib.import_module(self.job), name, None) if self.job else None
        return otherwise if function is None else function(self, *args)

    def inputs(self) -> list[tuple[str, str]]:
        """Pairs of kind and reference of everything the job reads."""
        found: list[tuple[str, str]] = []
        for name, info in type(self).model_fields.items():
            kinds = kinds_of(info)
            value = getattr(self, name)
            if kinds and value:
                found += [(kinds[0], item) for item in _items(value)]
        further: list[tuple[str, str]] = self._call("further_inputs", [])
        return [*found, *further]

    def given(self, *names: str) -> list[str]:
        """Those of some fields that are not as by default.

        Args:
            names: of fields.
        """
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].get_default(call_default_factory=True)]

    def further_outputs(self, out: Path) -> tuple[Path, ...]:
        """Files that the job writes beside its folder.

        Args:
            out: the folder.
        """
        return ()

    def identity(self) -> dict[str, Any]:
        """What makes this the same piece of work when it is called again after a kill."""
        return self.model_dump(mode="json")


def kinds_of(field: Any) -> list[str]:
    """What a field's value names, as its `InputKind` says; empty for a plain option."""
    return [mark.kind for mark in _marks(field) if isinstance(mark, InputKind)]


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


def _items(value: Any) -> list[Any]:
    """What a field names: one thing, several, or several by name."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, tuple | list) else [value]
