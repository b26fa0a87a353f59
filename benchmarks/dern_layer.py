"""What DERN costs on one layer: seconds and peak memory of the real transform on random weights.

    python benchmarks/dern_layer.py [--experts 128] [--width 768] [--hidden 2048] [--keep 64] [--copies 0.5]
                                    [--dtype bfloat16] [--compare up_down] [--precision fp32]

The default shape is a layer of Qwen3-30B-A3B, half of whose experts are dropped. `--copies` is the share of each
expert's neurons that are noisy copies of neurons common to all experts, in another order; the others are alike nowhere.
Peak memory is the process's (`getrusage`), everything included: the layer, the result, torch. OMP_NUM_THREADS sets the
threads.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time

import torch

from moekit.anatomy.probe import Geometry
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.prune.dern import DERN
from moekit.compress.weights import LayerWeights
from moekit.trace.statistics import LayerStatistics

GIB = 2**30
TOP_K, TOKENS = 8, 128 * 2048


def random_layer(
    experts: int, width: int, hidden: int, copies: float, dtype: torch.dtype, seed: int = 0
) -> LayerWeights:
    """Experts made in place, one at a time, so that making them does not set the peak."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, down_IH = (torch.empty(experts, width, hidden, dtype=dtype) for _ in range(3))
    common = int(width * copies)
    shared = [torch.randn(common, hidden, generator=generator) / hidden**0.5 for _ in range(3)]
    for expert in range(experts):
        order = torch.randperm(width, generator=generator)
        for tensor, same in zip((gate, up, down_IH), shared, strict=True):
            own = torch.randn(width, hidden, generator=generator) / hidden**0.5
            own[:common] = same + 0.3 * own[:common]
            tensor[expert] = own[order]
    router = {"weight": torch.randn(experts, hidden, generator=generator).to(dtype)}
    # As on disk: the down projection's columns are neurons. One expert at a time: no second copy of the layer.
    down_EHI = down_IH.view(experts, hidden, width)
    for expert in range(experts):
        down_EHI[expert] = down_IH[expert].T.clone()
    return LayerWeights(up, down_EHI, gate, router=router)


def inputs(experts: int, width: int, hidden: int, seed: int = 0) -> LayerInputs:
    """Statistics of unevenly used experts."""
    share_E = torch.rand(experts, generator=torch.Generator().manual_seed(seed)) + 0.1
    share_E = share_E.double() / share_E.sum()
    values = {"gate_mass": share_E * TOKENS, "load": (share_E * TOKENS * TOP_K).long()}
    geometry = Geometry(hidden, experts, TOP_K, width, 0, True, False, False, True)
    return LayerInputs(0, geometry, LayerStatistics(experts, hidden, tokens=TOKENS, values=values))


def peak() -> int:
    """Most bytes this process ever held; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clock() -> tuple[float, float]:
    """Wall and processor seconds; the latter is what other programs on the machine disturb least."""
    return time.perf_counter(), time.process_time()


def row(name: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Print a line of the table at once: on a busy machine the next may take long."""
    wall, cpu = end[0] - start[0], end[1] - start[1]
    print(f"{name:24} {wall:9.1f} {cpu:12.1f} {peak() / GIB:9.2f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 128), ("width", 768), ("hidden", 2048), ("keep", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--copies", type=float, default=0.5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compare", choices=("up_down", "all", "mean"), default="up_down")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    given = parser.parse_args()
    begun = time.perf_counter()
    weights = random_layer(given.experts, given.width, given.hidden, given.copies, getattr(torch, given.dtype))
    seen = inputs(given.experts, given.width, given.hidden)
    method = DERN(compare=given.compare, precision=given.precision)
    outcome = method.decide(seen, method.score(seen), given.keep)
    print(
        f"{platform.platform()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}\n{given.experts} -> {given.keep} experts of {given.width} x {given.hidden}, "
        f"{given.dtype}, {given.copies:.0%} of neurons are copies, compare={given.compare}, "
        f"precision={given.precision}\n\n{'part':24} {'seconds':>9} {'cpu seconds':>12} {'peak GiB':>9}"
    )
    row("making the layer", (0.0, 0.0), (time.perf_counter() - begun, time.process_time()))
    start = clock()
    figures = method.told(weights, outcome, seen)
    middle = clock()
    row("nearest segments", start, middle)
    method.transform(weights, outcome, seen)
    row("recombination", middle, clock())
    row("both", start, clock())
    print(f"\n{figures['moved_share']:.1%} of the dropped segments moved")


if __name__ == "__main__":
    main()
