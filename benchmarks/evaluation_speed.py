"""Speed and memory of perplexity, against the plain way: padded batches in the order given, all logits at once.

Makes a random MoE with the vocabulary of SmolLM2 and documents of mixed length, measures both ways in turn, each in a
process of its own (so that peak memory can be told apart), and checks that they agree. Times are processor time,
which other programs on the machine disturb least.

    python benchmarks/evaluation_speed.py [--documents 48] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from moekit.data.batches import TokenizedDocument
from moekit.evaluation import perplexity_of_documents

VOCABULARY, BATCH = 49152, 8


def make_model() -> Qwen2MoeForCausalLM:
    """A random model whose head costs about as much of a forward as SmolLM2's does."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=1024, moe_intermediate_size=128, shared_expert_intermediate_size=1024, num_experts=32,
        num_experts_per_tok=4, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config).eval()


def make_documents(count: int) -> list[TokenizedDocument]:
    """Documents of 16 to 512 tokens."""
    chance = random.Random(0)
    lengths = [chance.randint(16, 512) for _ in range(count)]
    return [TokenizedDocument([chance.randrange(VOCABULARY) for _ in range(n)], "x", i) for i, n in enumerate(lengths)]


def plain(model: Qwen2MoeForCausalLM, documents: list[TokenizedDocument]) -> float:
    """Sum of -log p by transformers' own loss over padded batches."""
    total = 0.0
    for start in range(0, len(documents), BATCH):
        some = documents[start : start + BATCH]
        longest = max(len(d.ids) for d in some)
        ids = torch.tensor([d.ids + [0] * (longest - len(d.ids)) for d in some])
        mask = torch.tensor([[1] * len(d.ids) + [0] * (longest - len(d.ids)) for d in some])
        with torch.no_grad():
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        total += float(loss) * sum(len(d.ids) - 1 for d in some)
    return total


def measure(way: str, count: int, rounds: int) -> None:
    """Print one way's result, processor seconds and peak memory as JSON."""
    model, documents = make_model(), make_documents(count)
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        total = plain(model, documents) if way == "plain" else sum(perplexity_of_documents(model, documents).nll)
        seconds.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"nll": total, "seconds": statistics.median(seconds), "peak": peak}))


def main() -> None:
    """Run both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=("plain", "moekit"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.documents, options.rounds)
        return
    tokens = sum(len(d.ids) - 1 for d in make_documents(options.documents))
    found = {}
    for way in ("plain", "moekit"):
        command = [sys.executable, __file__, "--way", way, "--documents", str(options.documents)]
        out = subprocess.run(
            [*command, "--rounds", str(options.rounds)], check=True, capture_output=True, text=True
        ).stdout
        found[way] = json.loads(out.splitlines()[-1])
    assert abs(found["plain"]["nll"] / found["moekit"]["nll"] - 1) < 1e-5, "both ways must agree"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {options.documents} documents, {tokens} tokens")
    for way, row in found.items():
        print(
            f"{way:8} {tokens / row['seconds']:8.0f} tokens per processor second   peak {row['peak'] / 2**30:5.2f} GiB"
        )
    print(f"ratio of times, moekit / plain: {found['moekit']['seconds'] / found['plain']['seconds']:.2f}")


if __name__ == "__main__":
    main()
