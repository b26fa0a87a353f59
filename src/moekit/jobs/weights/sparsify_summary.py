"""What is told of zeros, asked for and counted."""

from __future__ import annotations

from typing import Any

from moekit.compress.budget.sparsity import SparsityBudget
from moekit.compress.engine.plan import WeightPlan, budget_as
from moekit.compress.engine.rewriting import PlannedRewrite
from moekit.jobs.weights.inplace_job import settings_told


def summary_of(plan: WeightPlan, zeros: PlannedRewrite | None) -> dict[str, Any]:
    """What a plan says and, once it was carried out, the zeros counted, as plain values.

    Args:
        plan: the plan.
        zeros: what carried it out; None where nothing did.
    """
    file = plan.file
    budget = budget_as(SparsityBudget, file.budget)
    count = None if zeros is None else zeros.count
    gone = None if count is None or budget.original is None else count.gone_of(budget.original)
    return {
        **settings_told(plan),
        "sparsity": budget.sparsity,
        "total": budget.total,
        "weights": {
            "original": budget.original,
            "present": budget.weights,
            "zeros": None if count is None else count.zeros,
            "sparsity": None if count is None else count.sparsity,
            "total": gone,
        },
        "layers": [
            {
                "layer": layer,
                "experts": told.experts,
                "sparsity": told.outcome.sparsity,
                "zeros": None if zeros is None else zeros.counts[layer].sparsity,
                "never_routed": list(told.never_routed),
                "figures": dict(told.outcome.figures),
            }
            for layer, told in file.layers.items()
        ],
    }
