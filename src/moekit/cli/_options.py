"""Command-line options from the pydantic fields of a method, with their units and bounds."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

import typer
import yaml
from pydantic_core import PydanticUndefined

from moekit.errors import BadConfig

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def fields_of(cls: type) -> dict[str, Any]:
    """The pydantic fields of a method's class, or none."""
    fields = getattr(cls, "model_fields", {})
    return dict(fields)


def option_parameters(
    cls: type,
    taken: Collection[str] = (),
    *,
    without: Collection[str] = (),
    arguments: Collection[str] = (),
    panel: str | None = "Method",
    flags: Mapping[str, str] | None = None,
) -> list[inspect.Parameter]:
    """One keyword parameter per field, to be handed to typer.

    Args:
        cls: a pydantic model.
        taken: names that the command uses itself; a field of such a name gets the prefix `method_`.
        without: fields to leave out.
        arguments: fields that become arguments instead of options, in this order, before the others.
        panel: heading of the options in --help.
        flags: field -> its option, where that is not its name.

    Returns:
        Parameters whose default is None where the field has one, so that pydantic's own default holds.
    """
    fields = fields_of(cls)
    parameters = [_argument(name, fields[name]) for name in arguments]
    for name, field in fields.items():
        if name in without or name in arguments:
            continue
        kind = _cli_type(field.annotation)
        flag = name.replace("_", "-")
        safe = f"method_{name}" if name in taken else name
        names = (f"--method-{flag}",) if name in taken else ((flags or {}).get(name, f"--{flag}"),)
        if kind is bool:
            names = (f"{names[0]}/--no-{names[0][2:]}",)
        option = typer.Option(
            *names, help=describe(field), metavar=_metavar(field.annotation), rich_help_panel=panel, show_default=False
        )
        required = field.is_required()
        annotation: Any = Annotated[kind if required else typing.Optional[kind], option]  # noqa: UP045
        default = inspect.Parameter.empty if required else None
        parameters.append(inspect.Parameter(safe, _KEYWORD, default=default, annotation=annotation))
    return parameters


def keyword_parameter(name: str, kind: Any, option: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """A parameter of a command that is no field of a class.

    Args:
        name: of the parameter.
        kind: its type.
        option: typer's option or argument.
        default: its value where it is not given; without one it must be given.
    """
    return inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, option])


def out_option(help: str, *, show_default: bool = False) -> Any:
    """How every command that writes is told where, whatever else it takes: `-o OUT`, or `--out OUT`.

    Args:
        help: what OUT is.
        show_default: whether --help shows the default.
    """
    return typer.Option("--out", "-o", metavar="OUT", help=help, show_default=show_default)


def _argument(name: str, field: Any) -> inspect.Parameter:
    argument = typer.Argument(help=describe(field), show_default=False)
    if field.is_required():
        return inspect.Parameter(name, _KEYWORD, annotation=Annotated[str, argument])
    return inspect.Parameter(name, _KEYWORD, default=None, annotation=Annotated[str | None, argument])


def read_options(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Field values from what typer read; options that were not given are left out.

    Raises:
        BadConfig: a structured value is no YAML.
    """
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key.removeprefix("method_") if key not in fields_of(cls) else key
        if value is None:
            continue
        structured = isinstance(value, str) and _cli_type(fields_of(cls)[name].annotation) is str
        annotation = fields_of(cls)[name].annotation
        if structured and not _is_text(annotation):
            value = parse_value(value, option=name)
            if _is_sequence(annotation) and not isinstance(value, list):
                # `2,4,8` and `2` are as good as `[2, 4, 8]` and `[2]`.
                value = [yaml.safe_load(part) for part in value.split(",")] if isinstance(value, str) else [value]
        values[name] = value
    return values


def parse_value(text: str, option: str = "") -> Any:
    """A value as YAML reads it: numbers, lists, mappings, text.

    Raises:
        BadConfig: the text is not YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadConfig(
            f"--{option.replace('_', '-')}: {text!r} cannot be read", hint="give it as YAML, e.g. [1, 2]"
        ) from error


def describe(field: Any) -> str:
    """A field's help: description, bounds, the settings that it holds, and its default."""
    bounds = []
    for rule in field.metadata:
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "multiple of")):
            value = getattr(rule, attribute, None)
            if value is not None:
                bounds.append(f"{sign} {value:g}" if isinstance(value, int | float) else f"{sign} {value}")
    parts = [field.description or ""]
    if bounds:
        parts.append(f"({', '.join(bounds)})")
    parts += [f"(such as {_example(cls)})" for cls in _members(field.annotation) if fields_of(cls)]
    if not field.is_required():
        default = field.get_default(call_default_factory=False)
        # With a factory, what it makes says little.
        shown = "" if default is None or default is PydanticUndefined else _as_given(default)
        parts.append(f"(default: {shown})" if shown else "")
    return " ".join(part for part in parts if part)


def _as_given(value: Any) -> str:
    """A value as it is written on the command line or in a recipe; nothing for an empty one."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ",".join(map(_as_given, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _example(cls: type) -> str:
    """A group of settings in YAML, with their defaults."""
    found = {n: f.get_default(call_default_factory=True) for n, f in fields_of(cls).items() if not f.is_required()}
    values = {name: value for name, value in found.items() if value is not None}
    told = [f"{n}: [{_as_given(v)}]" if isinstance(v, tuple) else f"{n}: {_as_given(v)}" for n, v in values.items()]
    return "{" + ", ".join(told) + "}"


def type_name(annotation: Any) -> str:
    """A type as a reader wants it: `int`, `one of list, device`."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("nothing" if a is type(None) else type_name(a) for a in typing.get_args(annotation))
    if origin is Annotated:
        return type_name(typing.get_args(annotation)[0])
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else type_name(a) for a in typing.get_args(annotation))
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _cli_type(annotation: Any) -> Any:
    """The type that typer is told: simple ones as they are, all others as text in YAML."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _cli_type(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        kinds = [_cli_type(a) for a in typing.get_args(annotation) if a is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    if origin is Literal and all(isinstance(a, str) for a in typing.get_args(annotation)):
        return annotation
    return annotation if annotation in (int, float, bool, str) else str


def _metavar(annotation: Any) -> str | None:
    """What --help calls the value, where its type alone would not say how it is written."""
    members = _members(annotation)
    if any(typing.get_origin(kind) is dict or fields_of(kind) for kind in members):
        return "YAML"
    return "A,B,..." if _is_sequence(annotation) else None


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that a union is made of, without None; else the type itself."""
    if typing.get_origin(annotation) is Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(kind for a in typing.get_args(annotation) if a is not type(None) for kind in _members(a))
    return (annotation,)


def _is_text(annotation: Any) -> bool:
    """Whether a field takes text as it is, so that `--note 1` stays text."""
    return all(kind is str for kind in _members(annotation))


def _is_sequence(annotation: Any) -> bool:
    return any(typing.get_origin(kind) in (list, tuple) for kind in _members(annotation))
