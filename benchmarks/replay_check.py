"""Count the rows of a trace with plain loops and sets, and hold them against the replay's: they must be equal.

python benchmarks/replay_check.py                       # every trace and placement of runs/demo
python benchmarks/replay_check.py --trace T --placement P
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moekit.placement import Placement, simulate
from moekit.trace import Trace


def brute_force(trace: Trace, placement: Placement) -> tuple[int, int, int]:
    """Rows once per expert, once per device and once per node, all layers, token by token."""
    experts_rows = device_rows = node_rows = 0
    per_node = -(-placement.devices // placement.nodes)
    for place, layer in enumerate(trace.meta.layers):
        device_of, none = placement.layers[layer], trace.meta.experts[place]
        for choices in trace.indices(layer).tolist():
            chosen = [expert for expert in choices if expert != none]
            devices = {device_of[expert] for expert in chosen}
            experts_rows += len(chosen)
            device_rows += len(devices)
            node_rows += len({device // per_node for device in devices})
    return experts_rows, device_rows, node_rows


def check(folder: Path, file: Path) -> bool:
    """Print both counts; whether they are equal."""
    trace, placement = Trace.load(folder), Placement.load(file)
    placement = placement.model_copy(update={"fingerprint": "", "trace": ""})
    total = simulate(trace, placement).total
    replayed = (total.rows_once_per_expert, total.rows_once_per_device, total.rows_once_per_node)
    counted = brute_force(trace, placement)
    equal = replayed == counted
    verdict = "equal" if equal else f"DIFFERENT: replay {replayed}"
    tokens = len(trace.document_N)
    print(
        f"{folder.name:16} {placement.devices} devices  {tokens} tokens x {len(trace.meta.layers)} layers: "
        f"{counted[0]:>9,} once per expert, {counted[1]:>9,} once per device, by loop and by replay {verdict}"
    )
    return equal


def main() -> None:
    """Compare all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--placement", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    given = parser.parse_args()
    if given.trace is not None:
        pairs = [(given.trace, given.placement)]
    else:
        pairs = []
        for rows in sorted(given.run.glob("rows*")):
            trace = given.run / rows.name.replace("rows", "trace", 1)
            pairs += [(trace, file) for file in sorted(rows.glob("placement-*.json"))]
    results = [check(*pair) for pair in pairs]
    if not results or not all(results):
        raise SystemExit("the replay does not count what a loop counts" if results else "there is nothing to compare")


if __name__ == "__main__":
    main()
