"""Method objects from their catalogue record and the options of a recipe or a command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from moekit import catalogue
from moekit.errors import BadConfig


def make(kind: str, name: str, settings: Mapping[str, Any]) -> Any:
    """Build a method with its options.

    Raises:
        BadConfig: there is no such method; or an option is unknown or out of bounds: names each with what was given.
    """
    cls: Any = catalogue.get(kind, name).cls
    try:
        return cls(**settings)
    except ValidationError as error:
        hint = f"its options: {', '.join(cls.model_fields) or 'none'}"
        raise BadConfig(f"{kind} {name}: {faults(error)}", hint=hint) from error


def faults(error: ValidationError) -> str:
    """All that pydantic found, each with the path of its key and what was given."""
    lines = []
    for fault in error.errors(include_url=False):
        path = ".".join(map(str, fault["loc"])) or "value"
        given = "" if fault["type"] in ("missing", "extra_forbidden") else f" (given: {fault.get('input')!r})"
        lines.append(f"{path}: {fault['msg']}{given}"[:300])
    return "; ".join(lines)
