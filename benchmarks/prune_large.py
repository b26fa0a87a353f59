"""Prune a checkpoint that is larger than memory: peak memory, and speed against `dd` of as many bytes.

Writes a Mixtral-shaped checkpoint of random weights (8 experts a layer, bf16), prunes it to half in a process of its
own, and copies as many bytes with `dd ... conv=fsync`, in turns; the source is out of the page cache before each run.
Speed is bytes of the output by seconds, flushing to disk included; the ratio is ours by dd's, above 1 is faster than
dd. Peak is VmHWM of the process that prunes, libraries included.

Calibration is one streamed pass, in a process of its own, for what every method of one pass needs; its peak may be
3 GiB and two decoder layers.

Everything is written below `--folder` and deleted on any exit: a process that outlives this one removes it even after
kill -9.

    python benchmarks/prune_large.py                 # 31 GiB (30 GB and more), needs 48 GiB of disk
    python benchmarks/prune_large.py --gib 2 --rounds 3 --fused
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from calibration_cost import needs as pass_statistics
from transformers import MixtralConfig

from moekit.checkpoint.atomic import atomic_folder
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.checkpoint.shards import ShardWriter
from moekit.compress.engine.apply import apply
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.outcome import LayerOutcome
from moekit.trace.streamed import record_streamed

EXPERTS, TOP_K, VOCABULARY = 8, 2, 32_000
APPLY_PEAK_BYTES = 2 << 30
APPLY_SPEED_OF_DD = 0.60
CALIBRATION_BYTES = 3 << 30
REACHED = {True: "reached", False: "missed"}
# Numbers drawn; each tensor is a window of them that begins elsewhere: drawing 15 billion would take longest of all.
DRAWN = 64 << 20


@contextlib.contextmanager
def doomed_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, whatever ends this process."""
    folder = Path(tempfile.mkdtemp(prefix="moekit-prune-large-", dir=parent))
    # Its standard input ends when this process does.
    script = 'cat >/dev/null; rm -rf -- "$1"'
    watcher = subprocess.Popen(["sh", "-c", script, "sh", folder], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        assert watcher.stdin is not None
        watcher.stdin.close()
        watcher.wait()


def shape_of(gib: float) -> MixtralConfig:
    """A Mixtral of about that size: the sizes of Mixtral-8x7B from 12 GiB on, a quarter of them below."""
    hidden, width = (4096, 14336) if gib >= 12 else (1024, 3584)
    layer = EXPERTS * 3 * hidden * width * 2
    return MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=width, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, dtype="bfloat16",
        num_hidden_layers=max(1, round(gib * 2**30 / layer)),
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip


def tensors_of(config: MixtralConfig, fused: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes on disk."""
    hidden, width = config.hidden_size, config.intermediate_size
    narrow = hidden * config.num_key_value_heads // config.num_attention_heads
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        for name, rows in {"q": hidden, "k": narrow, "v": narrow, "o": hidden}.items():
            yield f"{stem}.self_attn.{name}_proj.weight", (rows, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{stem}.{norm}.weight", (hidden,)
        if fused:
            yield f"{stem}.mlp.gate.weight", (EXPERTS, hidden)
            yield f"{stem}.mlp.experts.gate_up_proj", (EXPERTS, 2 * width, hidden)
            yield f"{stem}.mlp.experts.down_proj", (EXPERTS, hidden, width)
            continue
        yield f"{stem}.block_sparse_moe.gate.weight", (EXPERTS, hidden)
        for expert in range(EXPERTS):
            for name, shape in {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}.items():
                yield f"{stem}.block_sparse_moe.experts.{expert}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def make(folder: Path, config: MixtralConfig, fused: bool) -> None:
    """Write the checkpoint, one tensor in memory at a time."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(DRAWN, generator=generator) / config.hidden_size**0.5).bfloat16()
    with atomic_folder(folder) as temporary:
        config.save_pretrained(temporary)
        with ShardWriter(temporary) as writer:
            for number, (name, shape) in enumerate(tensors_of(config, fused)):
                if len(shape) == 1:
                    writer.add(name, torch.ones(shape, dtype=torch.bfloat16))
                    continue
                tensor = torch.empty(shape, dtype=torch.bfloat16)
                flat, start, done = tensor.view(-1), number * 7919 % DRAWN, 0
                while done < flat.numel():
                    piece = drawn[start : start + flat.numel() - done]
                    flat[done : done + piece.numel()] = piece
                    start, done = 0, done + piece.numel()
                writer.add(name, tensor)


def decisions_for(config: MixtralConfig) -> dict[int, LayerOutcome]:
    """Every other expert, in turns of the layers, so that what stays is scattered over the files."""
    return {layer: LayerOutcome(keep=tuple(range(layer % 2, EXPERTS, 2))) for layer in range(config.num_hidden_layers)}


def forget(folder: Path) -> None:
    """Flush a folder's files and drop them from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def status(what: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def calibrate(source: Path, tokens: int, length: int) -> None:
    """Take the statistics of all methods of one pass, and print figures as JSON."""
    before = status("VmRSS")
    ids = torch.randint(3, VOCABULARY, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    batches = ({"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids.split(8))
    checkpoint = Checkpoint.open(source)
    start = time.perf_counter()
    record_streamed(checkpoint, batches, statistics=pass_statistics())
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": status("VmHWM"), "before": before}))


def calibration_figures(source: Path, tokens: int, length: int) -> None:
    """Peak of calibration, against its bound."""
    forget(source)
    figures = in_a_process("calibrate", source, tokens, length)
    parts: dict[str, int] = {}
    for name, shape in tensors_of(MixtralConfig.from_pretrained(source), fused=False):
        if found := re.match(r"model\.layers\.(\d+)\.", name):
            parts[found[1]] = parts.get(found[1], 0) + 2 * math.prod(shape)
    layer = max(parts.values())
    bound, peak = CALIBRATION_BYTES + 2 * layer, figures["peak"]
    print(
        f"calibration: {tokens:,} tokens, {len(pass_statistics())} statistics in {figures['seconds']:.0f} s; peak "
        f"resident {peak / 2**30:.2f} GiB ({figures['before'] / 2**30:.2f} GiB before the work, a layer is "
        f"{layer / 2**30:.2f} GiB); at most {bound / 2**30:.2f} GiB: {REACHED[peak <= bound]}"
    )


def child(source: Path, target: Path) -> None:
    """Prune, and print figures as JSON."""
    before = status("VmRSS")
    start = time.perf_counter()
    checkpoint = Checkpoint.open(source)
    config = MixtralConfig.from_pretrained(source)
    apply(checkpoint, decisions_for(config), target, record=Record(command="benchmark"))
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": status("VmHWM"), "before": before}))


def in_a_process(*arguments: object) -> dict[str, float]:
    """Do one part in a process of its own; its figures."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return figures


def dd(source: Path, target: Path, nbytes: int) -> float:
    """Seconds that dd takes to read and write as many bytes."""
    target.mkdir()
    start = time.perf_counter()
    for shard in sorted(source.glob("*.safetensors")):
        count = min(nbytes, shard.stat().st_size)
        nbytes -= count
        if count:
            options = ["bs=8M", f"count={count}", "iflag=count_bytes,fullblock", "conv=fsync"]
            command = ["dd", f"if={shard}", f"of={target / shard.name}", *options]
            subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def apply_figures(root: Path, source: Path, rounds: int) -> None:
    """Peak and speed of `apply`, against dd in turns."""
    checkpoint = Checkpoint.open(source)
    written = prepare(checkpoint, decisions_for(MixtralConfig.from_pretrained(source))).nbytes
    ours: list[dict[str, float]] = []
    theirs: list[float] = []
    for number in range(rounds):
        for turn in ("dd", "apply") if number % 2 == 0 else ("apply", "dd"):
            forget(source)
            if turn == "dd":
                theirs.append(dd(source, root / "out", written))
            else:
                ours.append(in_a_process("apply", source, root / "out"))
            shutil.rmtree(root / "out")
            print(
                f"  round {number + 1}, {turn}: {theirs[-1] if turn == 'dd' else ours[-1]['seconds']:.2f} s", flush=True
            )
    mine, dds = statistics.median(figures["seconds"] for figures in ours), statistics.median(theirs)
    pairs = sorted(other / figures["seconds"] for figures, other in zip(ours, theirs, strict=True))
    peak = max(figures["peak"] for figures in ours)
    mib = written / 2**20
    print(f"apply: {mib:,.0f} MiB in {mine:.2f} s = {mib / mine:,.0f} MiB/s; dd: {dds:.2f} s = {mib / dds:,.0f} MiB/s")
    # Both, and the worse one judges: on a shared disk whose speed drifts they can differ a lot.
    of_medians, of_rounds = dds / mine, statistics.median(pairs)
    print(
        f"speed against dd: {of_medians:.2f} by medians of seconds, {of_rounds:.2f} by the median round (rounds "
        f"{', '.join(f'{pair:.2f}' for pair in pairs)}); at least {APPLY_SPEED_OF_DD:.2f}: "
        f"{REACHED[min(of_medians, of_rounds) >= APPLY_SPEED_OF_DD]}"
    )
    print(
        f"peak resident of apply: {peak / 2**20:,.0f} MiB ({ours[0]['before'] / 2**20:,.0f} MiB before the work); "
        f"at most {APPLY_PEAK_BYTES / 2**20:,.0f} MiB: {REACHED[peak <= APPLY_PEAK_BYTES]}"
    )


def machine() -> str:
    """What the figures were taken on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return (
        f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB memory, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, {datetime.date.today().isoformat()}"
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=31.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fused", action="store_true", help="stacked experts instead of one tensor each")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        part, source, *rest = arguments.child
        child(Path(source), Path(*rest)) if part == "apply" else calibrate(Path(source), *map(int, rest))
        return
    need, free = arguments.gib * 2**30 * 1.53, shutil.disk_usage(arguments.folder).free
    if need > free:
        sys.exit(f"{need / 2**30:.0f} GiB of disk are needed, {free / 2**30:.0f} GiB are free in {arguments.folder}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with doomed_folder(arguments.folder) as root:
        config = shape_of(arguments.gib)
        start = time.perf_counter()
        make(root / "source", config, arguments.fused)
        size = Checkpoint.open(root / "source").nbytes
        print(machine())
        print(
            f"source: {size / 2**30:.1f} GiB, {config.num_hidden_layers} layers, H {config.hidden_size}, I "
            f"{config.intermediate_size}, {'fused' if arguments.fused else 'split'}; made in "
            f"{time.perf_counter() - start:.0f} s"
        )
        apply_figures(root, root / "source", arguments.rounds)
        calibration_figures(root / "source", arguments.tokens, arguments.length)


if __name__ == "__main__":
    main()
