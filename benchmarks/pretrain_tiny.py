"""The tiny model from scratch: speed of its training, what Trainer adds to a bare loop, and what its routing becomes.

First times the same steps in a bare loop (forward, backward, clip, AdamW) and in `moekit.training.train`, in turns, and
prints the ratio of the medians. Then trains on `--tokens` of a folder's text and prints loss and routing figures: load
CV and max/mean (0 and 1 are balanced), normalised mutual information of domain and expert with that of shuffled labels.

    python benchmarks/pretrain_tiny.py --data FOLDER [--tokens 1000000] [--steps 6] [--rounds 3] [--out FOLDER]

The recipe `recipes/pretrain-tiny.yaml` is the full run of 12 M tokens.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from moekit.data import TokenBatches, load_text
from moekit.training import TinyConfig, TrainConfig, build_tiny_model, train, train_tiny
from moekit.training.compute import attention_for, compute_context, resolve_precision
from moekit.training.order import OrderedRows, collate, row_order
from moekit.training.own_loss import sliced_cross_entropy


def random_rows(config: TinyConfig, rows: int) -> TokenBatches:
    """Rows of random words."""
    shape = (rows, config.training.seq_len)
    ids = torch.randint(0, config.vocabulary, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    zeros = torch.zeros(shape, dtype=torch.int32)
    return TokenBatches(ids, zeros, zeros.to(torch.int16), ("random",))


def bare_loop(config: TinyConfig, training: TrainConfig, rows: TokenBatches) -> list[float]:
    """Seconds of each step of the loop that any training must at least run."""
    model = build_tiny_model(config, "cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, fused=True)
    steps = training.steps or 1
    ordered = OrderedRows(rows, row_order(len(rows), steps * training.batch, training.seed))
    precision = resolve_precision(training.precision, model.device)
    seconds = []
    with attention_for(model, training.seq_len), sliced_cross_entropy(model) as sliced:
        for step in range(steps):
            start = time.perf_counter()
            batch = collate([ordered[step * training.batch + i] for i in range(training.batch)])
            with compute_context(precision, model.device):
                loss = sliced(**batch, use_cache=False)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    return seconds


def overhead(config: TinyConfig, steps: int, rounds: int) -> None:
    """Print the speed of a bare loop and of `train`, with and without router losses."""
    changes = {"steps": steps, "tokens": None, "save_every": None}
    plain = config.training.model_copy(update={**changes, "objectives": {}})
    full = config.training.model_copy(update=changes)
    rows = random_rows(config, 64)
    times: dict[str, list[float]] = {"bare loop": [], "train, no router losses": [], "train": []}
    for _ in range(rounds):
        times["bare loop"] += bare_loop(config, plain, rows)[1:]
        for name, training in (("train, no router losses", plain), ("train", full)):
            result = train(build_tiny_model(config, "cpu"), None, rows, training)
            times[name] += [entry["seconds"] for entry in result.history][1:]
    tokens = config.training.batch * config.training.seq_len
    base = statistics.median(times["bare loop"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:26s} {median:7.3f} s a step {tokens / median:8.0f} tokens/s   x{median / base:.3f}")


def main() -> None:
    """Parse the options, time, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with a file or sub-folder for each domain; without, only speed")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to train on")
    parser.add_argument("--steps", type=int, default=6, help="steps of each timed run")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each kind; 0 for none")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch decides")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="keep the model here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    config = TinyConfig()
    training = config.training.model_copy(
        update={"tokens": options.tokens, "precision": options.precision, "seed": options.seed}
    )
    config = config.model_copy(update={"training": training})
    if options.rounds:
        overhead(config, options.steps, options.rounds)
    if options.data is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(options.out or f"{folder}/tiny")
        result = train_tiny(config, load_text(options.data), target, device="cpu")
    done = result.training
    print(f"{result.parameters:,} parameters, {done.tokens:,} tokens in {done.seconds:.0f} s, {done.precision}")
    print(f"loss {done.losses[0]:.3f} -> {statistics.mean(done.losses[-20:]):.3f} (mean of the last 20 steps)")
    for name, value in result.figures().items():
        print(f"{name:22s} {value:.4f}")
    for layer in result.routing.layers:
        apart = f", NMI {layer.domains.normalised:.4f} ({layer.domains.shuffled:.4f})" if layer.domains else ""
        print(f"layer {layer.layer}: load CV {layer.load.cv:.3f}, max/mean {layer.load.max_over_mean:.2f}{apart}")


if __name__ == "__main__":
    main()
