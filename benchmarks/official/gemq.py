"""GEMQ (arXiv:2605.23078): the global solver of jndeng/GEMQ, and the quantizer that its costs are taken with.

Needs Gurobi (`pip install gurobipy`: its free licence is enough here). Legend: L layers, E experts, C widths.
"""

from __future__ import annotations

import importlib.util
import pickle
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import Room, WidthErrors
from moekit.compress.maths.rounding import round_to_nearest
from moekit.compress.sharers.gemq import Gemq
from moekit.trace.statistics import LayerStatistics

from . import shared
from .shared import Table

WIDTHS, EXPERTS, LAYERS = (1, 2, 3), 8, 6
SETS, MEANS = 10, (1.5, 2.0, 2.5)


def run(checkout: Path) -> Table:
    """All comparisons on one checkout."""
    table = Table(f"GEMQ, jndeng/GEMQ at {shared.commit(checkout)}")
    packages, solves = ("gemq", "gemq.allocation", "gemq.quantizers"), importlib.util.find_spec("gurobipy") is not None
    if not solves:
        table.tell("the solver", "gurobipy is not installed", "-", "skipped")
    with shared.importing(checkout, bare=packages) as load, shared.quiet(), tempfile.TemporaryDirectory() as folder:
        if solves:
            _solver(table, load("gemq.allocation.ilp_solvers"), Path(folder) / "costs.pkl")
        _rounding(table, load("gemq.quantizers.rtn"))
    return table


def _costs(seed: int) -> dict[int, Tensor]:
    """Costs that fall with the width and differ by orders of magnitude, as squared gradients do."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(LAYERS):
        size_E1 = (2 * torch.randn(EXPERTS, 1, generator=generator)).exp()
        found[layer] = (
            size_E1 * torch.tensor([0.36, 0.25, 0.046]) * (0.8 + 0.4 * torch.rand(EXPERTS, 3, generator=generator))
        )
    return found


def _solver(table: Table, module: Any, path: Path) -> None:
    import gurobipy

    def silent(*args: Any, **given: Any) -> Any:
        model = made(*args, **given)
        model.Params.MIPGap = 0.0
        return model

    made = gurobipy.Model
    for rule, spread in (("", False), ("c2c3", True)):
        theirs: list[Any] = []
        ours: list[Any] = []
        for seed in range(SETS):
            costs = _costs(seed)
            rows = {
                n: {e: dict(zip(WIDTHS, row.tolist(), strict=True)) for e, row in enumerate(c)}
                for n, c in costs.items()
            }
            path.write_bytes(pickle.dumps(rows))
            solver = module.GEMQSolver(path, WIDTHS, rule)
            for mean in MEANS:
                with patch.object(module.gp, "Model", silent):
                    found = solver.solve_all(int(mean * LAYERS * EXPERTS))
                theirs.append({n: tuple(own[e] for e in range(EXPERTS)) for n, own in found.items()})
                ours.append(_ours(costs, mean, spread))
        told = "each layer with both large widths" if spread else "no rule"
        table.same(f"bits of 48 experts in 6 layers under one budget, 30 cases, {told}", theirs, ours)
        counts = [sum(own.count(b) for case in theirs for own in case.values()) for b in WIDTHS]
        table.tell(f"experts at 1, 2 and 3 bits, {told}", counts, "the same", "the optimum of these costs has few twos")


def _ours(costs: dict[int, Tensor], mean: float, spread: bool) -> Any:
    geometry = Geometry(16, EXPERTS, 2, 16, 0, True, False, False, True)
    values = {"load": torch.ones(EXPERTS)}
    looked = {n: LayerInputs(n, geometry, LayerStatistics(EXPERTS, 16, tokens=9, values=values)) for n in costs}
    errors = {n: WidthErrors(own.double(), 1.0) for n, own in costs.items()}
    room = Room(mean, WIDTHS, "expert", dict.fromkeys(costs, 1), dict.fromkeys(costs, EXPERTS))
    return Gemq(spread=spread).share(looked, errors, room)


def _rounding(table: Table, module: Any) -> None:
    matrix = torch.randn(48, 256, generator=torch.Generator().manual_seed(5)) * 0.02
    for bits in WIDTHS:
        theirs = module.MCMoeRTNWeightQuantizer(matrix, nbits=bits).quantize()
        ours = round_to_nearest(matrix, bits, 128)
        apart, step = (theirs - ours).abs(), float((theirs - matrix).abs().max()) * 2
        moved = 100 * float((apart > step / 4).float().mean())
        table.tell(
            f"weights rounded to {bits} bits in groups of 128, for the costs",
            f"mean square error {float((theirs - matrix).square().mean()):.4g}",
            f"mean square error {float((ours - matrix).square().mean()):.4g}",
            f"{moved:.2f} % of weights on another step: scales have 16 bits here",
        )
