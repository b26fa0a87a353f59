"""What each way of splitting a dense model costs: perplexity of SmolLM2-135M at several top-k, without any training.

    python benchmarks/dense_to_moe.py            # 8 experts, 3 seeds
    python benchmarks/dense_to_moe.py --seeds 1 --experts 32 --top-k 32 24 16

Prints one row for each split: dense perplexity where all experts are chosen, and how it grows as fewer are. The order
must be activation < weights < random; the last line says whether it held, and the exit code is 1 if not.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moekit.conversion import ActivationSplit, RandomSplit, SplitConversion, WeightSplit
from moekit.data import Document, fetch, load_text, pack
from moekit.errors import BadData

LICENCE = Path("/usr/share/common-licenses/GPL-3")
TOKENS = 1024
CALIBRATION_TOKENS = 4096
WINDOW = 512

# A shared quarter leaves the routed experts three quarters of the neurons, of which the same k are chosen.
SPLITS: dict[str, tuple[type[SplitConversion], dict[str, object]]] = {
    "random": (RandomSplit, {}),
    "weights": (WeightSplit, {}),
    "activation": (ActivationSplit, {}),
    "random, untrained router": (RandomSplit, {"router": "random"}),
    "activation, shared quarter": (ActivationSplit, {"shared": 384}),
}
ORDERED = ("activation", "weights", "random")


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids_RS: torch.Tensor) -> float:
    losses = [float(model(row[None], labels=row[None]).loss) for row in ids_RS]
    return math.exp(mean(losses))


def rows(docs: Iterable[Document], tokenizer: PreTrainedTokenizerBase, tokens: int) -> torch.Tensor:
    return pack(list(docs), tokenizer, WINDOW).input_ids[: tokens // WINDOW].long()


def evaluation_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """A text like the calibration text, and one far from it."""
    try:
        prose = load_text("brown", split="heldout")
    except BadData:
        prose = load_text("news", split="heldout")
    texts = {prose[0].domain: rows(prose, tokenizer, TOKENS)}
    if LICENCE.exists():
        texts["GPL-3"] = rows(load_text(str(LICENCE)), tokenizer, TOKENS)
    return texts


def calibration_rows(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    try:
        docs = load_text("brown+stdlib", split="train", limit_bytes=200_000)
    except BadData:
        docs = load_text("news+stdlib", split="train", limit_bytes=200_000)
    half = CALIBRATION_TOKENS // 2
    domains = dict.fromkeys(d.domain for d in docs)
    return torch.cat([rows((d for d in docs if d.domain == domain), tokenizer, half) for domain in domains])


def set_top_k(model: PreTrainedModel, top_k: int) -> None:
    for layer in model.get_decoder().layers:
        layer.mlp.gate.top_k = top_k


def run(arguments: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    folder = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts, calibration = evaluation_texts(tokenizer), calibration_rows(tokenizer)
    print(f"dense: {' / '.join(f'{perplexity(dense, ids):.2f}' for ids in texts.values())}   ({' / '.join(texts)})")
    print(f"{'split of every layer':30}" + "".join(f"{f'top-{k} of {arguments.experts}':>30}" for k in arguments.top_k))
    found: dict[tuple[str, int], list[float]] = {}
    for name, (cls, options) in SPLITS.items():
        lines: dict[int, list[list[float]]] = {k: [] for k in arguments.top_k}
        start = time.perf_counter()
        # the last two rows are for comparison only
        for seed in range(arguments.seeds if name in ORDERED else 1):
            split = cls.model_validate({"experts": arguments.experts, "top_k": arguments.top_k[0], **options})
            moe = split.convert(dense, calibration, seed)
            for k in arguments.top_k:
                set_top_k(moe, k)
                lines[k].append([perplexity(moe, ids) for ids in texts.values()])
        for k in arguments.top_k:
            found[name, k] = [values[0] for values in lines[k]]
        cells = [" / ".join(_range(column) for column in zip(*lines[k], strict=True)) for k in arguments.top_k]
        seconds = (time.perf_counter() - start) / len(found[name, arguments.top_k[0]])
        print(f"{name:30}" + "".join(f"{cell:>30}" for cell in cells) + f"   {seconds:.0f} s each", flush=True)
    return found


def _range(values: Iterable[float]) -> str:
    values = list(values)
    low, high = min(values), max(values)
    digits = 1 if high < 1000 else 0
    return f"{low:.{digits}f}-{high:.{digits}f}" if len(values) > 1 else f"{low:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, nargs="+", default=[6, 4])
    arguments = parser.parse_args()
    found = run(arguments)
    k = arguments.top_k[-1]
    means = [mean(found[name, k]) for name in ORDERED]
    holds = all(low * 1.1 < high for low, high in pairwise(means))
    print(f"top-{k}: " + " < ".join(f"{n} {m:.0f}" for n, m in zip(ORDERED, means, strict=True)), end="")
    print(", by at least 10 % each" if holds else ": the order does NOT hold")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
