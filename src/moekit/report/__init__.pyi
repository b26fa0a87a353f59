from .data import (
    BarsSection as BarsSection,
    Finding as Finding,
    HeatmapsSection as HeatmapsSection,
    KeyFigure as KeyFigure,
    LinesSection as LinesSection,
    ReportData as ReportData,
    RunInfo as RunInfo,
    Section as Section,
    TableSection as TableSection,
    TextSection as TextSection,
)
from .page import build as build, to_html as to_html
from .parts import (
    Axis as Axis,
    BarGroup as BarGroup,
    BarSeries as BarSeries,
    Column as Column,
    HeatmapPanel as HeatmapPanel,
    Interval as Interval,
    LineChart as LineChart,
    Matrix as Matrix,
    Part as Part,
    Point as Point,
    Reference as Reference,
    Series as Series,
    Table as Table,
)
from .run_info import describe_run as describe_run
from .verdict import degenerate as degenerate, flat as flat
