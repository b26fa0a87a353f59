"""Page sections from results: traces, placements, evaluations, and C2R's curve of quality against rows."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Coactivations": "traces",
        "Curve": "c2r",
        "CurvePoint": "c2r",
        "PlacementRow": "placements",
        "by_layer_section": "traces",
        "coactivation_section": "traces",
        "comparison_section": "evaluations",
        "curve_findings": "c2r",
        "curve_section": "c2r",
        "generation_section": "evaluations",
        "headline": "c2r",
        "inside_section": "pruning",
        "key_figures": "c2r",
        "layers_section": "pruning",
        "load_section": "traces",
        "pareto_sections": "pruning",
        "placement_section": "placements",
        "ranking_section": "pruning",
        "tasks_section": "pruning",
    },
)
