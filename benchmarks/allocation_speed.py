"""How long the exact share of one byte budget takes: 60 layers of 256 experts, five widths each, by default.

    python benchmarks/allocation_speed.py [--layers 60] [--experts 256] [--widths 1,2,3,4,8] [--means 1.5,2,2.5,3,4]

Sizes are the packed bytes of an expert (three matrices of 7168 x 2048, groups of 128). Costs fall with the width by a
factor of about four a bit, times a weight that is drawn anew for each expert and spans some orders of magnitude, as
measured ones do. For each mean the seconds are told, and how far the share may at most be from the best one: by the
bound of Lagrange's relaxation, worked out here and not by the solver. At most 10 s.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import numpy.typing as npt
from prune_large import REACHED, machine

from moekit.compress.budget.allocate import allocate
from moekit.compress.budget.bits import packed_bits

MOST_SECONDS = 10
WEIGHTS, GROUP = 3 * 7168 * 2048, 128
Floats = npt.NDArray[np.float64]


def costs_of(units: int, widths: list[int], seed: int = 0) -> Floats:
    """Costs of each unit's choices, [U, C]."""
    draw = np.random.default_rng(seed)
    weight_U = draw.lognormal(sigma=2.0, size=units)
    # No two experts lose alike from bit to bit.
    wobble_UC = draw.uniform(0.8, 1.25, (units, len(widths)))
    return np.sort(weight_U[:, None] * wobble_UC * 4.0 ** -np.array(widths), axis=1)[:, ::-1]


def least(costs_UC: Floats, sizes_C: Floats, budget: float, rounds: int = 100) -> float:
    """A bound below the cost of every share: max over l of sum_u min_c (cost + l size) - l budget; concave in l."""
    low, high = 0.0, float(costs_UC.max() / np.diff(sizes_C).min())
    best = -np.inf
    for _ in range(rounds):
        price = (low + high) / 2
        priced_UC = costs_UC + price * sizes_C
        best = max(best, float(priced_UC.min(1).sum() - price * budget))
        over = float(sizes_C[priced_UC.argmin(1)].sum()) > budget
        low, high = (price, high) if over else (low, price)
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--widths", default="1,2,3,4,8")
    parser.add_argument("--means", default="1.5,2,2.5,3,4", help="bits a weight that the budget allows, scales besides")
    given = parser.parse_args()
    widths = [int(n) for n in given.widths.split(",")]
    units = [(layer, expert) for layer in range(given.layers) for expert in range(given.experts)]
    costs_UC = costs_of(len(units), widths)
    sizes = [packed_bits(WEIGHTS, n, GROUP) // 8 for n in widths]
    sizes_C = np.array(sizes, dtype=np.float64)
    cost = {unit: row.tolist() for unit, row in zip(units, costs_UC, strict=True)}
    print(machine())
    print(f"{given.layers} layers of {given.experts} experts, widths {given.widths}\n")
    print(f"{'mean bits':>9} {'seconds':>8} {'cpu s':>7} {'of budget':>10} {'from the best, at most':>23}")
    slowest = 0.0
    for mean in (float(text) for text in given.means.split(",")):
        budget = int(len(units) * float(np.interp(mean, widths, sizes_C)))
        start = time.perf_counter(), time.process_time()
        taken = allocate(cost, dict.fromkeys(units, sizes), budget)
        seconds, processor = time.perf_counter() - start[0], time.process_time() - start[1]
        slowest = max(slowest, seconds)
        chosen_U = np.array([taken[unit] for unit in units])
        spent, total = float(sizes_C[chosen_U].sum()), float(np.take_along_axis(costs_UC, chosen_U[:, None], 1).sum())
        assert spent <= budget
        gap = total / least(costs_UC, sizes_C, budget) - 1
        print(f"{mean:9.2f} {seconds:8.2f} {processor:7.2f} {spent / budget:10.6f} {gap:23.2e}", flush=True)
    print(f"\nat most {MOST_SECONDS} s: {REACHED[slowest <= MOST_SECONDS]}")


if __name__ == "__main__":
    main()
