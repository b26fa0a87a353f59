"""What a recipe's steps may say: the options of a job, a name and a seed. Made from the table of jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, create_model

from moekit.jobs.options.base import JobOptions
from moekit.jobs.table import jobs


class Step(JobOptions):
    """Base of all steps.

    Attributes:
        use: name of the job.
        id: name of the step in its recipe; its output folder is called so.
        seed: overrides the recipe's seed for this step.
    """

    use: str
    id: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$", description="name of the step; its folder is called so")
    seed: int | None = Field(default=None, ge=0, description="seed of this step; the recipe's by default")


def step_of(name: str, options: type[JobOptions]) -> type[Step]:
    """The step that does a job.

    Args:
        name: of the job, under `use`.
        options: the job's.
    """
    make: Any = create_model
    made: type[Step] = make(
        f"{options.__name__.removesuffix('Options')}Step",
        __base__=(options, Step),
        __module__=__name__,
        __doc__=options.__doc__,
        use=(Literal[name], name),
    )
    return made


# `use:` -> class.
STEPS: dict[str, type[Step]] = {name: step_of(name, job.load()) for name, job in jobs().items()}

if TYPE_CHECKING:
    AnyStep = Step
else:
    AnyStep = Annotated[Union[tuple(STEPS.values())], Field(discriminator="use")]  # noqa: UP007
