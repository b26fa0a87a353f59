"""The settings of a run as the command line offers them: those of `TrainConfig`, and one for each objective."""

from __future__ import annotations

from typing import Any

from pydantic import Field, create_model

from moekit import catalogue
from moekit.training.config import TrainConfig


def _flags() -> type[TrainConfig]:
    """`TrainConfig` with a field for each objective, our own and those of installed packages."""
    fields: dict[str, Any] = {}
    for record in catalogue.methods("objective"):
        name = record.name.replace("-", "_")
        # A name that a setting of the run has already is given under --objectives.
        if name not in TrainConfig.model_fields:
            settings = ", ".join(f"{setting}: ..." for setting in record.cls.model_fields)  # type: ignore[attr-defined]
            help = f"objective: {record.summary} A weight, or {{{settings}}}"
            fields[name] = (float | dict[str, Any] | None, Field(default=None, description=help))
    return create_model("TrainFlags", __base__=TrainConfig, **fields)


def __getattr__(name: str) -> Any:
    if name == "TrainFlags":
        return _flags()
    raise AttributeError(name)
