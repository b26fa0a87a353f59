"""What a report says, as plain typed numbers: the page and the JSON beside it are made from the same object.

Nothing here knows of traces, placements or methods; `moekit.report.sections` turns their results into these types, and
a new feature adds a page section by building one of the five kinds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moekit.report.parts import (
    Axis,
    BarGroup,
    HeatmapPanel,
    LineChart,
    Part,
    Reference,
    Table,
)


class _Section(Part):
    title: str
    lead: str = ""
    note: str = ""


class TextSection(_Section):
    """Paragraphs."""

    kind: Literal["text"] = "text"
    paragraphs: tuple[str, ...]


class TableSection(_Section):
    """One or more tables."""

    kind: Literal["table"] = "table"
    tables: tuple[Table, ...] = Field(min_length=1)


class LinesSection(_Section):
    """One or more charts of lines or points, with a legend for all."""

    kind: Literal["lines"] = "lines"
    charts: tuple[LineChart, ...] = Field(min_length=1)


class BarsSection(_Section):
    """Groups of bars, of which a selector shows one.

    Attributes:
        categories: name of each bar's place.
        groups: such as layers.
        x: label below.
        y: axis of the values, which begins at zero.
        reference: a dashed line.
    """

    kind: Literal["bars"] = "bars"
    categories: tuple[str, ...] = Field(min_length=1)
    groups: tuple[BarGroup, ...] = Field(min_length=1)
    x: str
    y: Axis
    reference: Reference | None = None

    @model_validator(mode="after")
    def _rectangular(self) -> BarsSection:
        for group in self.groups:
            for series in group.series:
                if len(series.values) != len(self.categories):
                    raise ValueError(f"{group.name}, {series.name}: {len(series.values)} values")
        return self


class HeatmapsSection(_Section):
    """Heat maps beside each other; a selector shows one layer.

    Attributes:
        layers: name of each layer.
        panels: such as before and after.
        unit: "%" shows fractions as per cent.
        meaning: what a cell says, with {row} and {column} for the names.
        down: label of the vertical axis.
        across: label of the horizontal axis.
    """

    kind: Literal["heatmaps"] = "heatmaps"
    layers: tuple[str, ...] = Field(min_length=1)
    panels: tuple[HeatmapPanel, ...] = Field(min_length=1)
    unit: str = ""
    meaning: str = ""
    down: str = ""
    across: str = ""

    @model_validator(mode="after")
    def _all_layers(self) -> HeatmapsSection:
        for panel in self.panels:
            if len(panel.layers) != len(self.layers):
                raise ValueError(f"{panel.name} has {len(panel.layers)} layers, not {len(self.layers)}")
        return self


Section = Annotated[
    TextSection | TableSection | LinesSection | BarsSection | HeatmapsSection, Field(discriminator="kind")
]


class Finding(Part):
    """What the numbers say, in plain words.

    Attributes:
        text: one sentence with its interval.
        status: "failure" means that the measurement shows nothing and the run has to be repeated.
        detail: how it was measured.
    """

    text: str = Field(min_length=1)
    status: Literal["good", "neutral", "bad", "failure"] = "neutral"
    detail: str = ""


class KeyFigure(Part):
    """A number for the head of the page."""

    label: str
    value: str
    note: str = ""


class RunInfo(Part):
    """What was run.

    Attributes:
        date: ISO 8601, UTC.
        seed: of everything random.
        commands: as typed.
        machine: processor, memory, system.
        versions: of packages.
        hashes: fingerprint of each input and output, by name.
    """

    date: str
    seed: int | None = None
    commands: tuple[str, ...] = ()
    machine: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    hashes: dict[str, str] = Field(default_factory=dict)


class ReportData(Part):
    """A whole report.

    Attributes:
        title: what was studied.
        subtitle: on what.
        headline: the first line of the page.
        findings: what else the numbers say.
        figures: numbers for the head of the page.
        sections: in order.
        run: what was run.
        format: of this JSON.
    """

    format: Literal[1] = 1
    title: str
    subtitle: str = ""
    headline: Finding
    findings: tuple[Finding, ...] = ()
    figures: tuple[KeyFigure, ...] = ()
    sections: tuple[Section, ...]
    run: RunInfo

    @property
    def failures(self) -> tuple[str, ...]:
        """Findings that say the measurement shows nothing."""
        return tuple(f.text for f in (self.headline, *self.findings) if f.status == "failure")
