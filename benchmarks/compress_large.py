"""Make a checkpoint that is larger than memory smaller: peak memory, seconds, and what the disk alone would take.

Writes a checkpoint of random bf16 weights in the shape of Qwen3-30B-A3B, then runs `moekit quantize` (rtn without text;
gptq), `moekit merge` (hc-smoe) and `moekit slim` (by magnitude without text or repair; slimmoe by output norms with
repair), each as a user would, in a process of its own, none with a proof. One result lies on disk at a time. What makes
new layers of a text keeps them on disk until they are written; where that does not fit, the first layers of the
checkpoint are taken, as many as do, and it is told.

Peak is what the operating system tells of the process, libraries included; it may be two decoder layers, as they are
computed with, and 2 GiB. Bytes are those that the process had read from disk and written; the bound is what they take
at the speed of plain copies of the same files, measured in the same run. The page cache is emptied of the source before
each job.

Everything is written below `--folder` and deleted on any exit: a process that outlives this one removes it even after
kill -9.

    python benchmarks/compress_large.py                                     # 30 GB, needs 64 GB of disk
    python benchmarks/compress_large.py --layers 3 --scale small            # a trial of a minute or two
    python benchmarks/compress_large.py --jobs quantize-rtn,slim-magnitude
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import qwen3_shaped
import torch
from prune_large import REACHED, doomed_folder, forget, machine

from moekit._device import compute_dtype

GIB = 2**30
CHUNK = 2 * GIB
# Disk that must stay free beside all that is counted.
SPARE = 2 * GIB


@dataclass(frozen=True)
class Job:
    """One call.

    Attributes:
        args: of the command, model and output left out.
        reads_text: whether a text is read.
        result: bytes of the experts behind by those before.
        kept: the same of new layers that are kept until they are written.
    """

    args: tuple[str, ...]
    reads_text: bool
    result: float
    kept: float = 0.0


JOBS = {
    "quantize-rtn": Job(("quantize", "--method", "rtn", "--bits", "4"), False, 1.0),
    "quantize-gptq": Job(("quantize", "--method", "gptq", "--bits", "3"), True, 1.0, 1.0),
    "merge-hc-smoe": Job(("merge", "--method", "hc-smoe", "--keep", "0.5"), True, 0.5),
    "slim-magnitude": Job(("slim", "--method", "magnitude", "--width", "1/2", "--set", "repair=none"), False, 0.5),
    "slim-slimmoe": Job(
        ("slim", "--method", "slimmoe", "--width", "1/2", "--set", "score=output-norm"), True, 0.5, 0.5
    ),
}


@dataclass(frozen=True)
class Measured:
    """What one call took: peak resident bytes, seconds by the clock and of the processor, bytes read and written."""

    peak: int
    seconds: float
    processor: float
    read: int
    written: int


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run(args: list[str], scratch: Path) -> Measured:
    """Run one command of moekit.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"TMPDIR": str(scratch), "MOEKIT_HOME": str(scratch / "home")}
    command = [sys.executable, "-m", "moekit", *args, "--quiet"]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, preexec_fn=end_with_parent
    )
    try:
        assert process.stderr is not None
        told = process.stderr.read()
        # wait4 tells the usage of this child alone; getrusage(RUSAGE_CHILDREN) the largest of all so far.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"moekit {' '.join(args)} left with {process.returncode}: {told.decode()}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    blocks = 512  # bytes of a block in usage, whatever the disk's are
    return Measured(
        peak,
        time.perf_counter() - start,
        usage.ru_utime + usage.ru_stime,
        usage.ru_inblock * blocks,
        usage.ru_oublock * blocks,
    )


def copy_speeds(source: Path, target: Path, limit: int = 8 * GIB) -> tuple[float, float]:
    """Bytes a second of reading the source's files from disk, and of writing as much there."""
    forget(source)
    read, start = 0, time.perf_counter()
    for shard in sorted(source.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as stream:
            while read < limit and (piece := stream.read(8 << 20)):
                read += len(piece)
    reading = read / (time.perf_counter() - start)
    piece, written, start = os.urandom(8 << 20), 0, time.perf_counter()
    with target.open("wb", buffering=0) as stream:
        while written < min(read, limit // 2):
            written += stream.write(piece)
        os.fsync(stream.fileno())
    writing = written / (time.perf_counter() - start)
    target.unlink()
    return reading, writing


def layers_that_fit(job: Job, root: Path, layers: int, layer: int, rest: int) -> int:
    """Layers of the source for which result and kept layers fit beside all of the source."""
    room = shutil.disk_usage(root).free - SPARE - rest
    return min(layers, int(room / (layer * (job.result + job.kept))))


def measure(name: str, root: Path, source: Path, layers: int, tokens: int) -> Measured:
    """One job on so many layers of the source; its result is gone afterwards."""
    job, folder, out = JOBS[name], root / "source", root / "out"
    if layers < len(list(source.glob("model-layer-*.safetensors"))):
        folder = root / "shorter"
        qwen3_shaped.shortened(source, folder, layers)
    text = ["--data", str(root / "text.jsonl"), "--max-tokens", str(tokens)] if job.reads_text else []
    scratch = root / "scratch"
    scratch.mkdir()
    try:
        forget(folder)
        command, *rest = job.args
        return run([command, str(folder), "-o", str(out), *rest, *text, "--no-proof"], scratch)
    finally:
        for each in (out, scratch, root / "shorter"):
            shutil.rmtree(each, ignore_errors=True)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=30.0, help="10^9 bytes of the checkpoint")
    parser.add_argument("--layers", type=int, help="layers instead")
    parser.add_argument("--scale", choices=("real", "small"), default="real", help="small: all sizes an eighth or so")
    parser.add_argument("--jobs", default=",".join(JOBS), help="which, by commas")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, for jobs that read one")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write")
    arguments = parser.parse_args()
    names = arguments.jobs.split(",")
    if unknown := set(names) - set(JOBS):
        parser.error(f"no such jobs: {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    small = arguments.scale == "small"
    config = qwen3_shaped.shape_of(1, small=small)
    layer = qwen3_shaped.bytes_of(qwen3_shaped.layer_tensors(config, 0))
    rest = qwen3_shaped.bytes_of(qwen3_shaped.rest_tensors(config))
    layers = arguments.layers or max(1, math.ceil((arguments.gb * 1e9 - rest) / layer))
    size, free = layers * layer + rest, shutil.disk_usage(arguments.folder).free
    if (need := size + rest + layer + SPARE) > free:
        sys.exit(f"{need / GIB:.0f} GiB of disk are needed, {free / GIB:.0f} GiB are free in {arguments.folder}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with doomed_folder(arguments.folder) as root:
        start = time.perf_counter()
        qwen3_shaped.make(root / "source", qwen3_shaped.shape_of(layers, small=small))
        qwen3_shaped.write_text(root / "text.jsonl", arguments.tokens * 2)
        print(machine())
        print(
            f"source: {size / 1e9:.1f} GB, {layers} layers of {layer / GIB:.2f} GiB, made in "
            f"{time.perf_counter() - start:.0f} s; text of {arguments.tokens:,} tokens"
        )
        reading, writing = copy_speeds(root / "source", root / "copy")
        print(f"plain copies: {reading / 1e6:,.0f} MB/s read, {writing / 1e6:,.0f} MB/s written and flushed\n")
        print(f"{'job':16} {'layers':>6} {'GB':>6} {'peak GiB':>9} {'bound':>6} {'':8} {'seconds':>8} {'cpu s':>7} "
              f"{'GB read':>8} {'GB written':>11} {'disk s':>7}")  # fmt: skip
        for name in names:
            each = layers_that_fit(JOBS[name], root, layers, layer, rest)
            if not each:
                print(f"{name:16} not one layer fits on the disk", flush=True)
                continue
            found = measure(name, root, root / "source", each, arguments.tokens)
            # Without text weights stay as stored; with one, layers run, wider where bfloat16 would be emulated.
            wider = compute_dtype(torch.bfloat16).itemsize // 2 if JOBS[name].reads_text else 1
            bound = 2 * layer * wider + CHUNK
            disk = found.read / reading + found.written / writing
            print(
                f"{name:16} {each:6} {(each * layer + rest) / 1e9:6.1f} {found.peak / GIB:9.2f} {bound / GIB:6.2f} "
                f"{REACHED[found.peak <= bound]:8} {found.seconds:8.0f} {found.processor:7.0f} {found.read / 1e9:8.1f} "
                f"{found.written / 1e9:11.1f} {disk:7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
