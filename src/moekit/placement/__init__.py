"""Which device holds which expert: cost model, topology, solvers, replay of a trace."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Comparison": "comparison",
        "Cost": "cost_model",
        "PairedRows": "paired",
        "Payload": "cost_model",
        "Placement": "plan",
        "ReplayResult": "result",
        "Simulation": "simulation",
        "Solution": "solver",
        "Solver": "solver",
        "Topology": "topology",
        "apply_placement": "apply",
        "balanced_sizes": "objective",
        "compare": "comparison",
        "compare_solvers": "comparison",
        "constraint_gain": "paired",
        "cost": "cost_model",
        "expected_devices": "result",
        "intra_share": "objective",
        "make_solver": "planning",
        "paired_rows": "paired",
        "parse_bandwidth": "topology",
        "place": "planning",
        "place_checkpoint": "apply",
        "place_trace": "simulation",
        "replay": "replaying",
        "routing_groups": "apply",
        "rows_per_document": "paired",
        "simulate": "simulation",
        "token_sets": "tokensets",
    },
)
