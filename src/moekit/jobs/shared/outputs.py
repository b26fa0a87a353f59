"""Where a job may not write: over what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self, TypeVar

from moekit.checkpoint.atomic import check_apart
from moekit.errors import BadConfig
from moekit.jobs.options.base import JobOptions
from moekit.jobs.shared.hashes import local_parts


def check_output(options: JobOptions, out: Path) -> None:
    """Refuse a job whose output would replace, hold or change something that it reads.

    Args:
        options: with inputs and further files.
        out: its folder or file.

    Raises:
        BadConfig: naming both.
    """
    for target in (out, *options.further_outputs(out)):
        for _, reference in options.inputs():
            for source in local_parts(reference):
                check_apart(target, source)


P = TypeVar("P", bound="PlanWriter")


class PlanWriter(Protocol):
    """Options of a job that writes a model, a plan, or both."""

    @property
    def plan(self) -> str | None:
        """File of the plan."""

    def model_copy(self, *, update: dict[str, object]) -> Self:
        """The same with other values."""


def model_or_plan(options: P, out: Path | None, overwrite: bool) -> tuple[P, Path, bool]:
    """A job that writes a model to `out`, a plan to the file `plan`, or both.

    Raises:
        BadConfig: neither was said, or the file is no place for a plan.
    """
    if options.plan is None and out is None:
        raise BadConfig("nothing says what to write", hint="-o OUT for a model, --plan FILE for a plan, or both")
    if options.plan is not None and Path(options.plan).suffix != ".json":
        name = Path(options.plan).name
        raise BadConfig(f"a plan is a .json file, not {name!r}", hint=f"--plan {name}.json")
    if out is None:
        return options.model_copy(update={"write": "plan", "plan": None}), Path(str(options.plan)), overwrite
    return options, out, overwrite
