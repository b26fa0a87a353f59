"""Peak memory of each command on the demo's model, each in a process of its own.

    python benchmarks/peak_memory.py            # fetches and converts the demo's model first, once
    python benchmarks/peak_memory.py ./moe      # on any MoE folder

The model is read from disk, so a peak below its size means that it was streamed.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT_BYTES = 60_000


def measure(args: list[str]) -> tuple[float, float]:
    """Peak resident bytes and seconds of one command.

    Raises:
        RuntimeError: the command failed.
    """
    start = time.perf_counter()
    command = [sys.executable, "-c", "from moekit.cli.main import main; main()", *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    told = process.stderr.read()
    # wait4 tells the usage of this child alone; getrusage(RUSAGE_CHILDREN) the largest of all so far.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"moekit {' '.join(args)} left with {process.returncode}: {told.decode()}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.perf_counter() - start


def choices(moe: str) -> int:
    """K of a model, which is also a legal T; asked in another process, so that this one stays small."""
    code = "from moekit.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "estimate", moe, "--json"], capture_output=True, check=True)
    return int(json.loads(done.stdout)["top_k"])


def commands(moe: str, text: str, out: Path) -> dict[str, list[str]]:
    """One call of each command, in an order in which each finds what it needs."""
    look = ["--data", f"{text}/heldout.jsonl", "--seq-len", "256"]
    learnt = ["--data", f"{text}/train.jsonl", "--steps", "2", "--seq-len", "128", "--batch", "2"]
    c2r = ["--trace", f"{out}/trace", "--top-t", str(choices(moe))]
    return {
        "methods": ["methods"],
        "estimate": ["estimate", moe],
        "profile": ["profile", moe, "-o", f"{out}/trace", *look],
        "place": ["place", "swap", f"{out}/trace", "-o", f"{out}/placed", "--devices", "2,4,8"],
        "place --model": ["place", "swap", f"{out}/trace", "-o", f"{out}/permuted", "--devices", "4", "--model", moe],
        "route (plan)": ["route", "c2r", moe, "-o", f"{out}/plan", *c2r],
        "route --write model": ["route", "c2r", moe, "-o", f"{out}/routed", *c2r, "--write", "model"],
        "train (routers)": ["train", moe, "-o", f"{out}/tuned", *learnt, "--parts", "router"],
        "train (all)": ["train", moe, "-o", f"{out}/tuned-all", *learnt],
        "evaluate": ["evaluate", moe, "-o", f"{out}/evaluated", "--data", f"{text}/heldout.jsonl"],
        "generate": ["generate", moe, f"{out}/routed", "--max-new-tokens", "16"],
        "check": ["check", f"{out}/routed"],
        "undo": ["undo", f"{out}/routed"],
        "report": ["report", "-o", f"{out}/report", "--traces", f"{out}/trace"],
    }


def conversion(moe: str, text: str) -> list[str]:
    """The demo's conversion."""
    sizes = ["--experts", "32", "--top-k", "4", "--width", "64", "--layers", "22,23,24,25,26,27,28,29"]
    return ["convert", "residual", "smollm2", "-o", moe, *sizes, "--data", f"{text}/train.jsonl"]


def main() -> None:
    """Print the table."""
    model = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        text = out / "text"
        limits = ["--train-bytes", str(TEXT_BYTES), "--heldout-bytes", str(TEXT_BYTES)]
        rows = {"data write": measure(["data", "write", "demo", "-o", str(text), *limits])}
        if model is None:
            rows["data fetch"] = measure(["data", "fetch", "smollm2"])
            rows["convert"] = measure(conversion(str(out / "moe"), str(text)))
        moe = model or str(out / "moe")
        for name, args in commands(moe, str(text), out).items():
            rows[name] = measure([*args, "--quiet"])
        size = sum(file.stat().st_size for file in Path(moe).iterdir())
    print(f"model: {size / 2**20:,.0f} MiB on disk; pages of {resource.getpagesize()} bytes")
    print(f"{'command':22} {'peak MiB':>9} {'/ model':>8} {'seconds':>8}")
    for name, (peak, seconds) in rows.items():
        print(f"{name:22} {peak / 2**20:9,.0f} {peak / size:8.2f} {seconds:8.1f}")


if __name__ == "__main__":
    main()
