"""The interface of placement solvers: co-activation counts in, device of each expert out.

Legend: E experts, D devices, N tokens, K choices a token.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

from moekit.errors import BadConfig, BadData, NumericFault
from moekit.placement.bounds import upper_bound
from moekit.placement.objective import Floats, Problem, balanced_sizes, check_sizes, pair_weights, relabel
from moekit.placement.tokensets import token_sets

Objective = Literal["auto", "pairs", "rows"]


@dataclass(frozen=True)
class Solution:
    """A placement of one layer.

    Attributes:
        groups: device of each expert.
        value: objective reached: share kept minus the load term.
        bound: no placement with these block sizes is worth more; None where not asked for.
        proven: whether `value` is known to be the optimum.
        share: f, share of co-activated pairs on one device.
        imbalance: largest device load over the mean.
        objective: "pairs" or "rows", what was maximised.
        rows: rows the token sample sends once per device; None without a sample.
        seconds: time the solver took.
    """

    groups: list[int]
    value: float
    bound: float | None
    proven: bool
    share: float
    imbalance: float
    objective: Literal["pairs", "rows"]
    rows: int | None
    seconds: float

    @property
    def gap(self) -> float | None:
        """How far below the bound the value lies at most; 0 where proven."""
        return None if self.bound is None else max(0.0, self.bound - self.value)


class Solver(BaseModel, ABC):
    """Base of the placement solvers; subclasses implement `search`.

    The objective is f, the share of co-activated pairs on one device, minus `load_weight` times (largest device load
    over the mean - 1). With tokens at hand and K > 2 the share of avoidable rows that is avoided takes f's place:
    it is what replay counts, and equals f for K = 2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    load_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight lambda of the load term; 0 ignores load, which saves a few rows more and may give one "
        "device several times the mean",
    )
    equal: bool = Field(default=False, description="demand blocks of one size, as a stock export does")
    objective: Objective = Field(
        default="auto",
        description='"pairs", "rows" (exact, needs tokens), or "auto": rows where K > 2 and tokens are given',
    )
    sample: int = Field(default=50_000, ge=1, description="tokens that the row objective looks at, at most")
    bound_steps: int = Field(
        default=150, ge=0, description="eigenvalue decompositions spent on the bound (0: partner bound only)"
    )

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Settings that the generic tests try: without and with the load term."""
        return [cls(load_weight=0), cls()]

    @abstractmethod
    def search(self, problem: Problem) -> tuple[list[int], float | None, bool]:
        """Groups, a bound of the solver's own (None: none) and whether they are proven best."""

    def solve(
        self,
        coactivation_EE: torch.Tensor,
        devices: int,
        *,
        load_E: torch.Tensor | None = None,
        seed: int = 0,
        sizes: Sequence[int] | None = None,
        indices_NK: torch.Tensor | None = None,
        bound: bool = True,
    ) -> Solution:
        """Place one layer's experts.

        Args:
            coactivation_EE: symmetric counts; the diagonal is used as load where `load_E` is missing, else ignored.
                Never changed.
            devices: D.
            load_E: choices of each expert.
            seed: for random starts.
            sizes: experts per device; default balanced.
            indices_NK: choices of tokens (E: none), for the row objective.
            bound: compute an upper bound.

        Raises:
            BadConfig: impossible sizes, or the row objective without tokens.
            BadData, NumericFault: damaged counts, or choices outside 0..E.
        """
        started = time.monotonic()
        problem = self.problem(coactivation_EE, devices, load_E, seed, sizes, indices_NK)
        groups, own_bound, proven = self.search(problem)
        groups = relabel(groups, problem.sizes)
        value, share = problem.value(groups), problem.share(groups)
        limit = own_bound
        if proven:
            limit = value
        elif bound:
            general = upper_bound(problem, target=share, steps=self.bound_steps)
            limit = general if own_bound is None else min(own_bound, general)
        return Solution(
            groups=groups,
            value=value,
            bound=None if limit is None else max(limit, value),
            proven=proven or (limit is not None and limit <= value + 1e-9),
            share=share,
            imbalance=problem.imbalance(groups),
            objective="pairs" if problem.sets is None else "rows",
            rows=None if problem.sets is None else problem.sets.rows(torch.tensor(groups).numpy(), devices),
            seconds=time.monotonic() - started,
        )

    def problem(
        self,
        coactivation_EE: torch.Tensor,
        devices: int,
        load_E: torch.Tensor | None,
        seed: int,
        sizes: Sequence[int] | None,
        indices_NK: torch.Tensor | None,
    ) -> Problem:
        """Check the input and put it into the form that `search` takes."""
        weight_EE = pair_weights(coactivation_EE)
        experts = len(weight_EE)
        blocks = balanced_sizes(experts, devices, equal=self.equal)
        if sizes is not None:
            blocks = check_sizes(sizes, experts, devices)
            if self.equal and len(set(blocks)) > 1:
                raise BadConfig(f"block sizes {list(blocks)} are not equal", hint="drop `sizes` or `equal`")
        wanted = self.objective == "rows" or (self.objective == "auto" and _many_choices(indices_NK))
        if wanted and indices_NK is None:
            raise BadConfig("the row objective needs the tokens' choices", hint="pass a trace, or objective='pairs'")
        sets = token_sets(indices_NK, experts, limit=self.sample) if wanted and indices_NK is not None else None
        load = _load(coactivation_EE, weight_EE, load_E)
        return Problem(weight_EE, blocks, load, self.load_weight, sets, seed)


def _many_choices(indices_NK: torch.Tensor | None) -> bool:
    return indices_NK is not None and indices_NK.dim() == 2 and indices_NK.shape[1] > 2


def _load(coactivation_EE: torch.Tensor, weight_EE: Floats, load_E: torch.Tensor | None) -> Floats:
    """Given load, else the diagonal, else (diagonal empty or -1) row sums, which are (K - 1) times the load."""
    if load_E is not None:
        load = load_E.detach().to("cpu", torch.float64).numpy().copy()
        if load.shape != (len(weight_EE),):
            raise BadData(f"load has shape {list(load.shape)}, not [{len(weight_EE)}]")
        if not (load >= 0).all() or load.max(initial=0.0) == float("inf"):
            raise NumericFault("load is negative or not finite", hint="record the trace again")
        return load
    diagonal_E = coactivation_EE.detach().to("cpu", torch.float64).diagonal().numpy()
    found: Floats = diagonal_E.copy() if (diagonal_E > 0).any() and (diagonal_E >= 0).all() else weight_EE.sum(axis=1)
    return found
