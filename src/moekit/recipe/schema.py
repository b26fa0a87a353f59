"""What a recipe may say.

    name: c2r-demo
    out: runs/demo
    vars: {model: smollm2, devices: [2, 4, 8]}
    steps:
      - {use: profile, id: look, model: "${model}", data: demo}
      - {use: place, id: place-${d}, trace: "${steps.look}", method: swap, devices: "${d}", over: {d: "${devices}"}}

Unknown keys are refused, and every complaint names the line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moekit._names import hint_for
from moekit.errors import BadConfig
from moekit.recipe.document import Document, KeyPath, read_document
from moekit.recipe.packaged import find_recipe
from moekit.recipe.steps import STEPS, AnyStep
from moekit.recipe.variables import matching, override, repeated, resolve, step_references, substitute


class Recipe(BaseModel):
    """A list of steps, with all variables filled in.

    Attributes:
        name: of the recipe.
        about: what it is for, one sentence.
        out: run folder; each step writes a folder of its id in it.
        seed: of everything random.
        vars: variables and their values in this run.
        steps: in the order of running.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    about: str = ""
    out: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0)
    vars: dict[str, Any] = Field(default_factory=dict)
    steps: Annotated[tuple[AnyStep, ...], Field(min_length=1)]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out).expanduser()


def load_recipe(
    file: str | Path, overrides: Mapping[str, Any] | None = None, *, out: str | None = None, seed: int | None = None
) -> Recipe:
    """Read a recipe and fill in its variables.

    Args:
        file: YAML file, or the name of a recipe that comes with moekit.
        overrides: new values for its variables.
        out: another run folder.
        seed: another seed.

    Raises:
        BadConfig: unknown keys, wrong values, undefined variables, references to steps that do not come before;
            names file and line.
        UnsafeInput: the file has YAML tags.
    """
    document = read_document(find_recipe(file))
    try:
        variables = resolve(override(_mapping(document, ("vars",)), overrides or {}))
        raw: dict[str, Any] = {
            k: substitute(v, variables) for k, v in document.data.items() if k not in ("vars", "steps")
        }
    except BadConfig as error:
        raise BadConfig(error.message, file=document.file, hint=error.hint) from error
    raw |= {key: value for key, value in (("out", out), ("seed", seed)) if value is not None}
    steps, origins = _expand(document, variables)
    try:
        recipe = Recipe.model_validate({**raw, "vars": variables, "steps": steps})
    except ValidationError as error:
        raise _complaint(document, error, origins) from error
    return recipe.model_copy(update={"steps": _named(document, recipe.steps, origins)})


def _mapping(document: Document, path: KeyPath) -> dict[str, Any]:
    value = document.data.get(str(path[0])) or {}
    if not isinstance(value, dict):
        raise BadConfig(f"line {document.line(path)}: {path[0]} must be a mapping", file=document.file)
    return value


def _expand(document: Document, variables: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """Steps with variables filled in and repeats written out, and the position in the file of each."""
    raw = document.data.get("steps")
    if not isinstance(raw, list):
        raise BadConfig(f"line {document.line(('steps',))}: steps must be a list", file=document.file)
    steps: list[dict[str, Any]] = []
    origins: list[int] = []
    for position, step in enumerate(raw):
        where = f"line {document.line(('steps', position))}"
        if not isinstance(step, dict) or not isinstance(step.get("use"), str) or step["use"] not in STEPS:
            hint = hint_for(str(step.get("use")) if isinstance(step, dict) else "", STEPS)
            raise BadConfig(f"{where}: a step needs a key `use` that names what to do", file=document.file, hint=hint)
        body = {key: value for key, value in step.items() if key != "over"}
        try:
            for combination in repeated(substitute(step.get("over") or {}, variables)):
                steps.append(substitute(body, {**variables, **combination}))
                origins.append(position)
        except BadConfig as error:
            raise BadConfig(f"{where}: {error.message}", file=document.file, hint=error.hint) from error
    return steps, origins


def _complaint(document: Document, error: ValidationError, origins: Sequence[int]) -> BadConfig:
    lines, hint = [], None
    for fault in error.errors(include_url=False):
        path: KeyPath = tuple(
            part for part in fault["loc"] if not (isinstance(part, str) and part.startswith("function-"))
        )
        if path[:1] == ("steps",) and len(path) > 1:
            # The union's tag stands in the path, but not in the file.
            path = ("steps", origins[int(path[1])], *path[3:])
        key = ".".join(map(str, path[2:] if path[:1] == ("steps",) and len(path) > 2 else path)) or "recipe"
        lines.append(f"line {document.line(path)}: {key}: {fault['msg']}")
        if fault["type"] == "extra_forbidden":
            lines[-1] = f"line {document.line(path)}: unknown key {path[-1]!r}"
            hint = hint or _near_key(document, path)
    return BadConfig("; ".join(lines), file=document.file, hint=hint)


def _near_key(document: Document, path: KeyPath) -> str | None:
    known: list[str] = list(Recipe.model_fields)
    if path[:1] == ("steps",):
        known = list(STEPS[document.data["steps"][path[1]]["use"]].model_fields)
    return hint_for(str(path[-1]), known)


def _named(document: Document, steps: Sequence[AnyStep], origins: Sequence[int]) -> tuple[AnyStep, ...]:
    """Give every step its id, and check that ids are unique and references point backwards."""
    named: list[AnyStep] = []
    for step, origin in zip(steps, origins, strict=True):
        where = f"line {document.line(('steps', origin))}"
        name = step.id or step.use
        earlier = [other.id for other in named]
        if name in earlier:
            hint = "give each an id of its own; a repeated step needs its variables in it, e.g. id: tune-${t}"
            raise BadConfig(f"{where}: two steps are called {name!r}", file=document.file, hint=hint)
        for reference in sorted(step_references(step.model_dump())):
            if not matching(reference, earlier):
                hint = f"steps before it: {', '.join(earlier) or 'none'}"
                raise BadConfig(
                    f"{where}: {name} refers to the step {reference!r}, which does not come before it",
                    file=document.file,
                    hint=hint,
                )
        named.append(step.model_copy(update={"id": name}))
    return tuple(named)
