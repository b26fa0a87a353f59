"""Reports: one self-contained HTML page, and the same numbers as JSON."""

from moekit._lazy import attach

_PARTS = [
    "Axis",
    "BarGroup",
    "BarSeries",
    "Column",
    "HeatmapPanel",
    "Interval",
    "LineChart",
    "Matrix",
    "Part",
    "Point",
    "Reference",
    "Series",
    "Table",
]
_SECTIONS = [
    "BarsSection",
    "Finding",
    "HeatmapsSection",
    "KeyFigure",
    "LinesSection",
    "ReportData",
    "RunInfo",
    "Section",
    "TableSection",
    "TextSection",
]

__getattr__, __dir__ = attach(
    __name__,
    {name: "parts" for name in _PARTS}
    | {name: "data" for name in _SECTIONS}
    | {"build": "page", "describe_run": "run_info", "degenerate": "verdict", "flat": "verdict", "to_html": "page"},
)
