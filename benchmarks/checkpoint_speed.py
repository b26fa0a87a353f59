"""Speed of permuting and converting a checkpoint, against a plain copy of as many bytes.

Makes a random Mixtral-layout checkpoint and a random dense Llama in a temporary folder, then alternates, round by
round: a plain copy (read, write, fsync), `place_checkpoint` (reorder the experts, hash every tensor for the record), a
plain copy of a converted folder, and its conversion by residual experts with saving. Ratios are of medians; above 1 is
slower.

    python benchmarks/checkpoint_speed.py [--gib 1.0] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import moekit
from moekit.checkpoint import Checkpoint, Record
from moekit.conversion.methods.residual import Residual
from moekit.placement import Placement, place_checkpoint

CHUNK = 16 << 20


def plain_copy(source: Path, target: Path) -> None:
    """Copy a folder through user space in 16 MiB pieces and bring it to disk: what any rewrite must at least do."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        with file.open("rb") as read, (target / file.name).open("wb") as write:
            while piece := read.read(CHUNK):
                write.write(piece)
            os.fsync(write.fileno())


def make_moe(folder: Path, gib: float) -> None:
    """A random bf16 Mixtral of about the given size."""
    hidden, width, experts = 512, 1024, 16
    layers = max(1, round(gib * 2**30 / (experts * 3 * hidden * width * 2)))
    config = MixtralConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=experts, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    moekit.save(model, folder, record=Record(command="benchmark"))


def make_dense() -> LlamaForCausalLM:
    """A random Llama with the sizes of SmolLM2-135M."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def timed(work: Callable[[Path], object], target: Path) -> tuple[float, int]:
    """Seconds of `work(target)` and the bytes it left; the result is removed."""
    start = time.perf_counter()
    work(target)
    seconds = time.perf_counter() - start
    written = size_of(target) if target.exists() else 0
    shutil.rmtree(target, ignore_errors=True)
    return seconds, written


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        root = Path(temporary)
        make_moe(root / "moe", arguments.gib)
        checkpoint = Checkpoint.open(root / "moe")
        devices = {
            layer: [(e * 5) % 16 // 4 for e in range(16)] for layer in range(checkpoint.config["num_hidden_layers"])
        }
        placement = Placement(
            fingerprint=checkpoint.fingerprint, devices=4, experts=16, layers=devices, solver="fixed", objective={}
        )
        dense = make_dense()
        dense.save_pretrained(root / "dense")
        residual = Residual(experts=32, top_k=4, width=64, router="random")
        residual_folder = root / "converted"

        def convert(target: Path) -> None:
            moekit.save(residual.convert(dense, None, 0), target, record=Record(command="benchmark"))

        convert(residual_folder)
        works: dict[str, tuple[Callable[[Path], object], str]] = {
            "plain copy": (lambda t: plain_copy(root / "moe", t), "copy"),
            "permute + seal": (lambda t: place_checkpoint(root / "moe", placement, t), "copy"),
            "plain copy of the conversion": (lambda t: plain_copy(residual_folder, t), "convert copy"),
            "convert (residual) + save": (convert, "convert copy"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in works}
        nbytes: dict[str, int] = {}
        for _ in range(arguments.rounds):
            for name, (work, _base) in works.items():
                took, nbytes[name] = timed(work, root / "out")
                seconds[name].append(took)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {arguments.rounds} rounds, medians"
    )
    print(f"{'work':>30} {'MiB':>7} {'s':>7} {'MiB/s':>7} {'ratio to copy':>14}")
    base = {"copy": statistics.median(seconds["plain copy"]),
            "convert copy": statistics.median(seconds["plain copy of the conversion"])}  # fmt: skip
    for name, (_, against) in works.items():
        median, mib = statistics.median(seconds[name]), nbytes[name] / 2**20
        print(f"{name:>30} {mib:7.0f} {median:7.2f} {mib / median:7.0f} {median / base[against]:14.2f}")


if __name__ == "__main__":
    main()
