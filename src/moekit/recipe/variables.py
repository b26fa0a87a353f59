"""`${name}` in a recipe: variables, overrides from the command line, and steps repeated over lists of values.

References to other steps, `${steps.ID}`, are left alone here: the runner replaces them by folders.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from moekit._names import hint_for
from moekit.errors import BadConfig

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
STEP_PREFIX = "steps."
MAX_REPEATS = 256


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` words; values as YAML reads them, so that `devices=[2, 4]` is a list.

    Raises:
        BadConfig: a word without `=`, or a value that is no YAML.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.isidentifier():
            raise BadConfig(f"{pair!r} is no override", hint="write key=value, e.g. model=allenai/OLMoE-1B-7B-0924")
        try:
            values[name] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise BadConfig(f"the value of {name} cannot be read: {text!r}", hint="give it as YAML") from error
    return values


def override(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Variables after the command line had its say.

    Raises:
        BadConfig: the recipe has no variable of that name; names near matches.
    """
    for name in given:
        if name not in known:
            raise BadConfig(f"the recipe has no variable {name!r}", hint=hint_for(name, known))
    return {**known, **given}


def resolve(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables that use each other, in the order of the recipe."""
    done: dict[str, Any] = {}
    for name, value in variables.items():
        done[name] = substitute(value, done)
    return done


def substitute(value: Any, variables: Mapping[str, Any]) -> Any:
    """Replace `${name}` in all strings of a value; a string that is one reference takes the variable's own type.

    Raises:
        BadConfig: no such variable; names near matches.
    """
    if isinstance(value, Mapping):
        return {key: substitute(item, variables) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [substitute(item, variables) for item in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole and not whole[1].startswith(STEP_PREFIX):
        return _look_up(whole[1], variables)

    def text(match: re.Match[str]) -> str:
        return match[0] if match[1].startswith(STEP_PREFIX) else str(_look_up(match[1], variables))

    return _REFERENCE.sub(text, value)


def _look_up(name: str, variables: Mapping[str, Any]) -> Any:
    if name in variables:
        return variables[name]
    way_out = "define it under vars, or write ${steps.ID} for a step"
    raise BadConfig(f"${{{name}}} is not defined", hint=hint_for(name, variables, otherwise=way_out))


def repeated(over: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of `over: {t: [3, 7], mode: [list, device]}`, the last varying fastest.

    Raises:
        BadConfig: a value is no list, or there are too many combinations.
    """
    if not isinstance(over, Mapping):
        raise BadConfig(f"over is {over!r}, no mapping of names to lists", hint="e.g. over: {t: [3, 7, 15]}")
    count = 1
    for name, values in over.items():
        if not isinstance(values, list | tuple) or not values:
            raise BadConfig(f"over.{name} must be a list of values", hint="e.g. over: {t: [3, 7, 15]}")
        count *= len(values)
    if count > MAX_REPEATS:
        raise BadConfig(f"over asks for {count} steps; at most {MAX_REPEATS} are made")
    for combination in itertools.product(*over.values()):
        yield dict(zip(over, combination, strict=True))


def step_references(value: Any) -> set[str]:
    """Ids of the steps that a value refers to; `*` in an id matches any."""
    return set(_references(value))


def _references(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)
    elif isinstance(value, str):
        for match in _REFERENCE.finditer(value):
            if match[1].startswith(STEP_PREFIX):
                yield match[1].removeprefix(STEP_PREFIX)


def resolve_steps(value: Any, folders: Mapping[str, str]) -> Any:
    """Replace `${steps.ID}` by the step's folder; in a list, a pattern `${steps.c2r-*}` by all that match, in order."""
    if isinstance(value, Mapping):
        return {key: resolve_steps(item, folders) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items: list[Any] = []
        for item in value:
            items += _expand(item, folders) if isinstance(item, str) else [resolve_steps(item, folders)]
        return items
    if not isinstance(value, str):
        return value
    return _REFERENCE.sub(lambda match: folders[match[1].removeprefix(STEP_PREFIX)], value)


def matching(pattern: str, ids: Iterable[str]) -> list[str]:
    """Ids that a reference means, in order."""
    if "*" not in pattern:
        return [name for name in ids if name == pattern]
    shape = re.compile(".*".join(map(re.escape, pattern.split("*"))))
    return [name for name in ids if shape.fullmatch(name)]


def _expand(item: str, folders: Mapping[str, str]) -> list[str]:
    match = _REFERENCE.fullmatch(item)
    if match and "*" in match[1]:
        return [folders[name] for name in matching(match[1].removeprefix(STEP_PREFIX), folders)]
    return [str(resolve_steps(item, folders))]
