"""What a bench of pruning methods is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moekit import catalogue
from moekit.anatomy.probe import Geometry
from moekit.catalogue import MethodRecord
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.dropping import FewerMethod
from moekit.errors import BadConfig

Keep = int | float | str
# The controls that every other method is held against.
RANDOM, FREQUENCY = "random", "frequency"


def same_keep(a: Keep, b: Keep) -> bool:
    """Whether two budgets are one: 1 is one expert and 1.0 all of them, although Python holds them for equal."""
    return type(a) is type(b) and a == b


class Entry(BaseModel):
    """One method with its knobs.

    Attributes:
        method: name in the catalogue.
        settings: knobs that differ from the defaults.
        label: what to call it; by default the name with those knobs.
        seeds: how often it is run, each time with another seed; None runs it once, or as often as the bench says if
            it draws numbers to decide.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    settings: dict[str, Any] = Field(default_factory=dict, description="knobs that differ from the defaults")
    label: str = ""
    seeds: int | None = Field(default=None, ge=1, description="how often it is run; None: as needed")

    @property
    def name(self) -> str:
        """What tables and charts call it."""
        knobs = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return self.label or (f"{self.method} ({knobs})" if knobs else self.method)

    def make(self, geometry: Geometry) -> FewerMethod:
        """The method; one whose knobs have no defaults is made as in its own examples.

        Raises:
            BadConfig: unknown name, or knobs it refuses.
        """
        record = record_of(self.method)
        if not self.settings and issubclass(record.cls, FewerMethod):
            try:
                plain: FewerMethod = record.cls()
                return plain
            except ValidationError:
                example: FewerMethod = record.cls.examples(geometry)[0]
                return example
        made: FewerMethod = catalogue.make(record.kind, self.method, self.settings)
        return made


class PruneBenchSetting(BaseModel):
    """What a bench is asked for.

    Attributes:
        entries: the methods.
        keep: budgets: fractions of the experts, counts, or bytes of the whole checkpoint.
        seeds: how often a method that draws numbers is run.
        domains: tasks: each method also decides from the text of one of these domains alone.
        seq_len: tokens a row of the calibration text.
        batch_size: rows a forward pass.
        window: longest context of the held-out text.
        search_tokens: calibration tokens, at most, for methods that decide by trying.
        top_k: choices a token makes afterwards; None as before.
        seed: of everything random.
        memory_bytes: about what changed layers and states of variants that are measured together may take.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    entries: tuple[Entry, ...] = Field(min_length=1)
    keep: tuple[Keep, ...] = Field(default=(0.75, 0.5), min_length=1)
    seeds: int = Field(default=5, ge=1, description="runs of a method that draws numbers")
    domains: tuple[str, ...] = ()
    seq_len: int = Field(default=512, ge=2, description="tokens a row of the calibration text")
    batch_size: int = Field(default=4, ge=1, description="rows a forward pass")
    window: int = Field(default=512, ge=2, description="longest context of the held-out text, in tokens")
    search_tokens: int = Field(default=4096, ge=2, description="tokens for methods that decide by trying")
    top_k: int | None = Field(default=None, ge=1)
    seed: int = 0
    memory_bytes: int = Field(default=2 << 30, ge=1)

    @field_validator("keep", mode="after")
    @classmethod
    def _budgets(cls, value: tuple[Keep, ...]) -> tuple[Keep, ...]:
        read = tuple(Budget(keep=keep).keep for keep in value)
        if len(set(map(str, read))) < len(read):
            raise ValueError("a budget is named twice")
        return read

    @field_validator("entries", mode="after")
    @classmethod
    def _distinct(cls, value: tuple[Entry, ...]) -> tuple[Entry, ...]:
        names = [entry.name for entry in value]
        if len(set(names)) < len(names):
            raise ValueError("two entries have one name: give one of them a label")
        return value


def record_of(name: str) -> MethodRecord:
    """The record of a method that leaves fewer experts: one that prunes, or one that merges.

    Raises:
        BadConfig: no such method.
    """
    merging = {record.name: record for record in catalogue.methods("merge")}
    return merging[name] if name in merging else catalogue.get("prune", name)


def default_entries(
    methods: Sequence[str] | None = None, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Entry, ...]:
    """An entry for each method, random and frequency among them.

    Args:
        methods: names, of merging methods too; None takes all that prune, those of other packages too.
        settings: knobs by method.

    Raises:
        BadConfig: a name that is not registered, or knobs for a method that takes no part.
    """
    names = [record.name for record in catalogue.methods("prune")] if methods is None else list(methods)
    names = list(dict.fromkeys([RANDOM, FREQUENCY, *names]))
    unused = set(settings or {}) - set(names)
    if unused:
        raise BadConfig(f"knobs for {', '.join(sorted(unused))}, which takes no part", hint="name it among the methods")
    for name in names:
        record_of(name)
    return tuple(Entry(method=name, settings=dict((settings or {}).get(name, {})), label=name) for name in names)
