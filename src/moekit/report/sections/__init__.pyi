from .c2r import (
    Curve as Curve,
    CurvePoint as CurvePoint,
    curve_findings as curve_findings,
    curve_section as curve_section,
    headline as headline,
    key_figures as key_figures,
)
from .evaluations import comparison_section as comparison_section, generation_section as generation_section
from .placements import PlacementRow as PlacementRow, placement_section as placement_section
from .pruning import (
    inside_section as inside_section,
    layers_section as layers_section,
    pareto_sections as pareto_sections,
    ranking_section as ranking_section,
    tasks_section as tasks_section,
)
from .traces import (
    Coactivations as Coactivations,
    by_layer_section as by_layer_section,
    coactivation_section as coactivation_section,
    load_section as load_section,
)
