"""What GPTQ costs on one layer in the shape of Qwen3-30B-A3B (128 experts, 2048 x 768): seconds and peak memory.

    python benchmarks/gptq_layer.py                       # 128 experts, 65,536 tokens, 3 bits
    python benchmarks/gptq_layer.py --experts 4           # a trial; as many tokens an expert

Writes a checkpoint of that one layer, and rounds it by `moekit.quantize(method="gptq", ...)` in a process of its own:
two passes of the text, each expert's second moments, factors and rounding, and writing the folder. The checkpoint is
gone afterwards. Random weights and random tokens: neither changes what is computed. OMP_NUM_THREADS sets the threads.
At most 10 minutes and 4 GiB for the default.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qwen3_shaped
import torch
from prune_large import REACHED, doomed_folder, machine

GIB = 2**30
MOST_SECONDS, MOST_BYTES = 600, 4 * GIB
TOKENS_AN_EXPERT = 4096  # what top-8 of 128 makes of 65,536
SHARE_CHOSEN = 16  # experts over choices of a token


class Meter:
    """Wall and processor seconds inside functions, by name, and how often they ran."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Measure a function of a module or class from now on."""
        plain: Callable[..., object] = getattr(owner, function)

        @functools.wraps(plain)
        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter(), time.process_time()
            try:
                return plain(*args, **kwargs)
            finally:
                spent = self.spent.setdefault(name, [0.0, 0.0, 0])
                spent[0] += time.perf_counter() - start[0]
                spent[1] += time.process_time() - start[1]
                spent[2] += 1

        setattr(owner, function, timed)


def child(root: Path, bits: int, tokens: int) -> None:
    """Round the layer, and print figures as JSON."""
    import moekit
    from moekit.compress.quantize import gptq
    from moekit.trace.expert_inputs import ExpertInputs

    meter = Meter()
    meter.watch(ExpertInputs, "moments", "second moments")
    meter.watch(gptq, "upper_factor", "factors")
    meter.watch(gptq, "round_with_feedback", "rounding")
    start = time.perf_counter(), time.process_time()
    moekit.quantize(
        root / "source", method="gptq", bits=bits, data=str(root / "text.jsonl"), max_tokens=tokens, proof=False,
        device="cpu", out=root / "out",
    )  # fmt: skip
    whole = [time.perf_counter() - start[0], time.process_time() - start[1], 1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"parts": meter.spent | {"all": whole}, "peak": peak}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--tokens", type=int, help=f"of the text; {TOKENS_AN_EXPERT:,} an expert by default")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    top_k = max(1, given.experts // SHARE_CHOSEN)
    tokens = given.tokens or TOKENS_AN_EXPERT * given.experts // top_k
    if given.child:
        child(Path(given.child), given.bits, tokens)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with doomed_folder(given.folder) as root:
        config = qwen3_shaped.shape_of(1, experts=given.experts, top_k=top_k)
        config.vocab_size = 512  # what stands in no layer would hide the layer's memory
        qwen3_shaped.make(root / "source", config)
        qwen3_shaped.write_text(root / "text.jsonl", 2 * tokens)
        options = ["--bits", str(given.bits), "--tokens", str(tokens), "--child", str(root)]
        told = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(told.stdout.splitlines()[-1])
    print(f"{machine()}, {torch.get_num_threads()} threads")
    print(f"{given.experts} experts of 2048 x 768, top-{top_k}, {tokens:,} tokens, {given.bits} bits\n")
    print(f"{'part':16} {'seconds':>9} {'cpu s':>9} {'cpu s an expert':>16}")
    for name, (wall, processor, _) in figures["parts"].items():
        print(f"{name:16} {wall:9.1f} {processor:9.1f} {processor / given.experts:16.3f}")
    seconds, peak = figures["parts"]["all"][0], figures["peak"]
    print(
        f"\npeak resident {peak / GIB:.2f} GiB, at most {MOST_BYTES / GIB:.0f}: {REACHED[peak <= MOST_BYTES]}; "
        f"at most {MOST_SECONDS} s: {REACHED[seconds <= MOST_SECONDS]}"
    )


if __name__ == "__main__":
    main()
