"""Fit the link model of the simulator to measured steps, and say how far it is off.

    python benchmarks/ep_dispatch.py --json bench.json
    python benchmarks/ep_calibrate.py bench.json [--samples link.json]
    python benchmarks/ep_simulator.py --inter-samples link.json

Each way to send is one sample at each rate: bytes that left the busier node in a whole step, and by how much longer
the step took than on the unshaped link. A line alpha + bytes / bandwidth is fitted to all but one, and predicts the
step of the one left out: unshaped time plus line. The error is that of the whole step's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from moekit.bench.dispatch.network import name_rate
from moekit.bench.dispatch.result import BenchResult
from moekit.placement import fit_link


def samples(result: BenchResult, rate: float) -> dict[str, tuple[float, float, float]]:
    """Name -> bytes, seconds beyond the unshaped step, seconds of the unshaped step."""
    found = {}
    for entry in result.entries:
        shaped, plain = entry.at(rate), entry.at(None)
        if entry.skipped or shaped is None or plain is None or entry.total is None or not entry.total.sent:
            continue
        found[entry.name] = (
            max(entry.total.sent),
            (shaped.total_ms - plain.total_ms) / 1e3,
            plain.total_ms / 1e3,
        )
    return found


def main() -> None:
    """Print the fit of each rate, and what it predicts for each way when that is left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, help="written by ep_dispatch.py --json or moekit bench ep")
    parser.add_argument("--samples", type=Path, help="write the samples of the slowest rate there")
    given = parser.parse_args()
    result = BenchResult.read(given.bench)
    for rate in (r for r in result.rates if r is not None):
        found = samples(result, rate)
        whole = fit_link([(size, extra) for size, extra, _ in found.values()])
        print(
            f"{name_rate(rate)}: {whole.alpha * 1e3:.1f} ms + bytes / {whole.bandwidth * 8 / 1e6:.0f} Mbit/s, "
            f"from {len(found)} ways"
        )
        errors = []
        for name, (size, extra, plain) in found.items():
            others = [(s, x) for other, (s, x, _) in found.items() if other != name]
            fit = fit_link(others)
            predicted = plain + fit.alpha + size / fit.bandwidth
            errors.append(abs(predicted / (plain + extra) - 1))
            print(
                f"  {name:34} {size / 1024:8.0f} KiB  measured {(plain + extra) * 1e3:6.0f} ms  predicted "
                f"{predicted * 1e3:6.0f} ms  {predicted / (plain + extra) - 1:+.1%}"
            )
        print(f"  error of a step left out: median {statistics.median(errors):.1%}, largest {max(errors):.1%}")
        if given.samples is not None:
            given.samples.write_text(json.dumps([[size, extra] for size, extra, _ in found.values()]))
            given.samples = None


if __name__ == "__main__":
    main()
