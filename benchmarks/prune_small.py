"""How methods rank on a model of 1.3 M parameters whose experts are badly balanced, and on one of a single origin.

Trains both in a quarter of an hour on one core and ranks as long, on bytes of Python, C headers and manual pages: a
Qwen3-MoE from scratch (4 layers, width 96, 16 experts of 64 neurons, top-2) without a balance loss, and the same
upcycled: a dense model trained for 700 steps, its FFN copied into 16 experts with their neurons in another order,
trained for 500 more. Then `prune_ranking.py`'s rankings and claims on each. There, claims about experts of one origin
(DERN's recombination, UNCURL's alignment) have something to speak of, and what a model's balance does to scores shows.

    python benchmarks/prune_small.py [--out runs/prune-small]

Models that are in --out already are used again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from prune_ranking import open_case, study
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.model import save
from moekit.checkpoint.record import Record
from moekit.data import Document, load_text, pack, train_tokenizer
from moekit.training import TinyConfig, TrainConfig, build_tiny_model, train

SCRATCH, UPCYCLED = "from-scratch", "upcycled"
# All bytes and two marks: no merges.
BYTES = 258
DENSE_STEPS, MOE_STEPS = 700, 500


def config_of(steps: int, seed: int, experts: int = 16, top_k: int = 2) -> TinyConfig:
    """The model, trained for some steps of 18 x 128 tokens."""
    training = TrainConfig(
        steps=steps, lr=3e-3, warmup=0.05, weight_decay=0.1, beta2=0.98, seq_len=128, batch=18,
        save_every=None, seed=seed,
    )  # fmt: skip
    return TinyConfig(
        vocabulary=BYTES, hidden=96, layers=4, heads=4, kv_heads=4, experts=experts, top_k=top_k, width=64,
        context=256, training=training,
    )  # fmt: skip


def write_headers(file: Path, limit: int) -> None:
    """C and C++ headers that come with PyTorch, as one text each."""
    root = Path(torch.__file__).parent / "include"
    taken = 0
    with file.open("w") as out:
        for header in sorted(root.rglob("*.h")):
            text = header.read_text(errors="ignore")
            out.write(json.dumps({"text": text, "domain": "c-headers"}) + "\n")
            taken += len(text)
            if taken >= limit:
                break


def dense_of(config: TinyConfig) -> PreTrainedModel:
    """The same with a single expert that every token takes: a dense model."""
    settings = config.model_settings()
    settings.num_experts = settings.num_experts_per_tok = 1
    model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    return model


@torch.no_grad()
def upcycle(dense: PreTrainedModel, config: TinyConfig) -> PreTrainedModel:
    """16 copies of each FFN, neurons in another order in each, and a new router."""
    moe = build_tiny_model(config, "cpu")
    rest = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    moe.load_state_dict(rest, strict=False)
    generator = torch.Generator().manual_seed(config.training.seed)
    width = config.width
    for old, new in zip(find_moe_layers(dense), find_moe_layers(moe), strict=True):
        for expert in range(config.experts):
            order = torch.randperm(width, generator=generator)
            new.experts.gate_up_proj[expert] = old.experts.gate_up_proj[0][torch.cat([order, width + order])]
            new.experts.down_proj[expert] = old.experts.down_proj[0][:, order]
    return moe


def make(name: str, folder: Path, documents: list[Document], options: argparse.Namespace) -> None:
    """Train one of the two models."""
    start = time.perf_counter()
    tokenizer: PreTrainedTokenizerBase = train_tokenizer(documents, BYTES, seed=options.seed)
    rows = pack(documents, tokenizer, 128, end_token=True)
    config = config_of(options.steps if name == SCRATCH else MOE_STEPS, options.seed)
    if name == SCRATCH:
        model = build_tiny_model(config, "cpu")
    else:
        before = config_of(DENSE_STEPS, options.seed)
        dense = dense_of(before)
        train(dense, None, rows, before.training)
        model = upcycle(dense, config)
    losses = train(model, None, rows, config.training).losses
    save(model, folder, tokenizer=tokenizer, record=Record(command="benchmarks/prune_small.py", seed=options.seed))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{name}: {parameters:,} parameters, loss {losses[0]:.3f} -> {sum(losses[-20:]) / 20:.3f}, "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )


def main() -> None:
    """Make what is not there, then rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib+manpages-de", help="text beside the headers")
    parser.add_argument("--bytes", type=int, default=6_000_000, help="of text for training, shared by the domains")
    parser.add_argument("--steps", type=int, default=1600, help="of the model from scratch, 2,304 tokens each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=3 * 24 * 128, help="calibration tokens, shared by the domains")
    parser.add_argument("--heldout-tokens", type=int, default=18_000, help="unseen tokens, at most")
    parser.add_argument("--search-tokens", type=int, default=1024, help="tokens on which naee tries subsets")
    parser.add_argument("--seeds", type=int, default=6, help="of random")
    parser.add_argument("--out", type=Path, default=Path("runs/prune-small"))
    options = parser.parse_args()
    options.seq_len, options.tasks, options.task = 128, 3, None
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    options.out.mkdir(parents=True, exist_ok=True)
    write_headers(options.out / "c-headers.jsonl", options.bytes)
    text = f"{options.data}+{options.out / 'c-headers.jsonl'}"
    documents = load_text(text, split="train", limit_bytes=options.bytes, seed=options.seed)
    claims = []
    for name in (SCRATCH, UPCYCLED):
        folder = options.out / f"{name}-moe"
        if not (folder / "config.json").is_file():
            make(name, folder, documents, options)
        claims += study(open_case(name, folder, (text, None), options))
    held = [claim.holds for claim in claims]
    print(f"\n{held.count(True)} trends hold, {held.count(False)} do not, {held.count(None)} say nothing here")


if __name__ == "__main__":
    main()
