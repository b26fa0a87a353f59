"""From statistics to a placement: pick the solver, solve every layer, keep the scores.

Legend: E experts, D devices, N tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekit import catalogue
from moekit._progress import Progress, track
from moekit.errors import BadConfig
from moekit.placement.bounds import upper_bound
from moekit.placement.hierarchical import check_routing_groups, hierarchical_groups
from moekit.placement.objective import balanced_sizes
from moekit.placement.partitions import enumerable
from moekit.placement.plan import Placement
from moekit.placement.solver import Solution, Solver


def make_solver(name: str, config: Mapping[str, Any] | None = None) -> Solver:
    """A solver from its catalogue name and knobs.

    Raises:
        BadConfig: unknown name or knobs it refuses.
    """
    solver: Solver = catalogue.make("place", name, config or {})
    return solver


def _pick(
    solver: Solver | str, experts: int, devices: int, sizes: Sequence[int] | None, knobs: Mapping[str, Any]
) -> Solver:
    if isinstance(solver, Solver):
        return solver
    if solver == "auto":
        blocks = tuple(sizes) if sizes is not None else balanced_sizes(experts, devices)
        return make_solver("exact" if enumerable(blocks) else "swap", knobs)
    return make_solver(solver, knobs)


def solve_layer(
    solver: Solver,
    coactivation_EE: torch.Tensor,
    devices: int,
    *,
    load_E: torch.Tensor | None = None,
    indices_NK: torch.Tensor | None = None,
    nodes: int = 1,
    routing_groups: int = 1,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    bound: bool = True,
) -> Solution:
    """Place one layer; in stages where it has nodes or routing groups.

    Args:
        solver: the solver.
        coactivation_EE: counts.
        devices: D.
        load_E: choices of each expert.
        indices_NK: tokens' choices, for the row objective.
        nodes: nodes to cut across first, so that rows across nodes come before rows inside them.
        routing_groups: groups of neighbouring experts that must stay whole.
        sizes: experts per device.
        seed: of random starts.
        bound: compute an upper bound.

    Raises:
        BadConfig: impossible sizes, nodes or groups.
    """
    if nodes == 1 and routing_groups <= 1:
        return solver.solve(
            coactivation_EE, devices, load_E=load_E, seed=seed, sizes=sizes, indices_NK=indices_NK, bound=bound
        )
    check_routing_groups(len(coactivation_EE), devices, nodes, routing_groups)
    problem = solver.problem(coactivation_EE, devices, load_E, seed, sizes, indices_NK)
    groups = hierarchical_groups(
        solver,
        torch.from_numpy(problem.weight_EE),
        torch.from_numpy(problem.load_E),
        devices,
        nodes=nodes,
        routing_groups=routing_groups,
        sizes=sizes,
        indices_NK=indices_NK,
        seed=seed,
    )
    value, share = problem.value(groups), problem.share(groups)
    limit = max(value, upper_bound(problem, target=share, steps=solver.bound_steps)) if bound else None
    return Solution(
        groups=groups,
        value=value,
        bound=limit,
        proven=limit is not None and limit <= value + 1e-9,
        share=share,
        imbalance=problem.imbalance(groups),
        objective="pairs" if problem.sets is None else "rows",
        rows=None if problem.sets is None else problem.sets.rows(torch.tensor(groups).numpy(), devices),
        seconds=0.0,
    )


@dataclass(frozen=True)
class _Inputs:
    """Statistics by decoder layer."""

    coactivation: dict[int, torch.Tensor]
    load: dict[int, torch.Tensor]
    choices: dict[int, torch.Tensor]

    def merged(self) -> _Inputs:
        """All layers as one, filed under the first."""
        layers = sorted(self.coactivation)
        if len({len(counts_EE) for counts_EE in self.coactivation.values()}) > 1:
            raise BadConfig("layers with different numbers of experts cannot share a placement", hint="place per layer")
        first = layers[0]
        counts = {first: torch.stack([self.coactivation[layer].double() for layer in layers]).sum(dim=0)}
        load = {first: torch.stack([self.load[layer].double() for layer in layers]).sum(dim=0)} if self.load else {}
        choices = {first: torch.cat([self.choices[layer] for layer in layers])} if self.choices else {}
        return _Inputs(counts, load, choices)


def place(
    coactivation: Mapping[int, torch.Tensor],
    devices: int,
    *,
    solver: Solver | str = "auto",
    config: Mapping[str, Any] | None = None,
    load: Mapping[int, torch.Tensor] | None = None,
    choices: Mapping[int, torch.Tensor] | None = None,
    nodes: int = 1,
    routing_groups: int = 1,
    sizes: Sequence[int] | None = None,
    per_layer: bool = True,
    seed: int = 0,
    fingerprint: str = "",
    trace: str = "",
    bound: bool = True,
    progress: Progress | None = None,
) -> Placement:
    """Choose the device of every expert.

    Args:
        coactivation: decoder layer -> counts [E, E].
        devices: D.
        solver: a solver, its catalogue name, or "auto": proven optima where all partitions can be listed (up to 12
            experts), else swap search.
        config: knobs of a solver given by name.
        load: decoder layer -> choices of each expert [E].
        choices: decoder layer -> experts that tokens chose [N, K], E for none; needed by the row objective.
        nodes: nodes that the devices stand in.
        routing_groups: groups of neighbouring experts that must stay whole (a model's `n_group`).
        sizes: experts per device; default balanced.
        per_layer: each layer its own placement; False: one that serves the sum over layers.
        seed: of random starts.
        fingerprint: of the model.
        trace: hash of the trace.
        bound: compute upper bounds.
        progress: told once a layer.

    Raises:
        BadConfig: nothing to place, impossible devices, sizes, nodes or groups, or unknown knobs.
    """
    if not coactivation:
        raise BadConfig("there is no layer to place", hint="the trace recorded none; profile the model again")
    name = solver if isinstance(solver, str) else _name_of(solver)
    knobs = dict(config or {}) if isinstance(solver, str) else solver.model_dump(mode="json")
    job = _Inputs(dict(coactivation), dict(load or {}), dict(choices or {}))
    if not per_layer:
        job = job.merged()
    solutions: dict[int, Solution] = {}
    for layer in track(sorted(job.coactivation), f"placing on {devices} devices", progress, len(job.coactivation)):
        solutions[layer] = solve_layer(
            _pick(solver, len(job.coactivation[layer]), devices, sizes, knobs),
            job.coactivation[layer],
            devices,
            load_E=job.load.get(layer),
            indices_NK=job.choices.get(layer),
            nodes=nodes,
            routing_groups=routing_groups,
            sizes=sizes,
            seed=seed,
            bound=bound,
        )
    if not per_layer:
        solutions = dict.fromkeys(sorted(coactivation), next(iter(solutions.values())))
    bounds = {layer: s.bound for layer, s in solutions.items() if s.bound is not None}
    return Placement(
        fingerprint=fingerprint,
        trace=trace,
        devices=devices,
        nodes=nodes,
        experts=max(len(counts_EE) for counts_EE in coactivation.values()),
        layers={layer: s.groups for layer, s in solutions.items()},
        solver=name,
        config=knobs,
        seed=seed,
        objective={layer: s.value for layer, s in solutions.items()},
        bound=bounds or None,
        proven=sorted(layer for layer, s in solutions.items() if s.proven),
    )


def _name_of(solver: Solver) -> str:
    return next((r.name for r in catalogue.methods("place") if r.cls is type(solver)), type(solver).__name__)
