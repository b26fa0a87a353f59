"""Which device holds which expert: cost model, topology, solvers, replay of a trace."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Comparison": "compare",
        "Cost": "cost",
        "PairedRows": "paired",
        "Payload": "cost",
        "Placement": "plan",
        "ReplayResult": "result",
        "Simulation": "simulate",
        "Solution": "solver",
        "Solver": "solver",
        "Topology": "topology",
        "apply_placement": "apply",
        "balanced_sizes": "objective",
        "compare": "compare",
        "compare_solvers": "compare",
        "constraint_gain": "paired",
        "cost": "cost",
        "expected_devices": "result",
        "intra_share": "objective",
        "make_solver": "place",
        "paired_rows": "paired",
        "parse_bandwidth": "topology",
        "place": "place",
        "place_checkpoint": "apply",
        "place_trace": "simulate",
        "replay": "replay",
        "routing_groups": "apply",
        "rows_per_document": "paired",
        "simulate": "simulate",
        "token_sets": "tokensets",
    },
)
