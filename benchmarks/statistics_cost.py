"""What one pass for all ways of making a MoE smaller costs: its time over that of a plain forward of the same tokens.

    python benchmarks/statistics_cost.py [--repeats 8] [--rows 8] [--length 256] [--model FOLDER]
    python benchmarks/statistics_cost.py --every-expert        # with those that run every expert on every token

The statistics are the union of what the methods of `prune`, `merge`, `slim`, `quantize` and `sparsify` and the sharers
of bits need by default. Two kinds are left out, and named: those that need every expert's output for every token, which
costs experts over choices as many products, unless asked for; and those of gradients, which no forward pass shows
(slimmoe's score by output norms, which needs none, is recorded). Second moments for GPTQ and repairs are no statistics:
they are made layer by layer (`benchmarks/gptq_layer.py`).

Without `--model`: random weights of the shape hidden 512, 32 experts of width 256, top-8, 8 layers. A plain forward
runs by the faster of transformers' "eager" and "grouped_mm" experts, and so does the recorded one where it does not run
experts one by one itself. Passes alternate; intervals are 95 % bootstrap intervals of the median ratio. At most 1.5.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from prune_large import REACHED
from trace_overhead import alternate, timed
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moekit
from moekit import catalogue
from moekit.trace import Recorder
from moekit.trace.vocabulary import resolve, sources_of

KINDS = ("prune", "merge", "slim", "quantize", "sparsify", "sharer")
# What methods need with other knobs than the default, where the default looks at gradients.
INSTEAD = {"inner_size": ["slim slimmoe --set score=output-norm"]}
MOST = 1.5
_GRADIENTS = {"gradients", "weight_gradients", "stream_gradients"}


def needed(kinds: Iterable[str] = KINDS) -> dict[str, list[str]]:
    """Statistic -> the methods that need it, each with its default knobs."""
    found: dict[str, list[str]] = {}
    for kind in kinds:
        for record in catalogue.methods(kind):
            if not getattr(record.cls, "searches", False):
                for name in record.cls().required:
                    found.setdefault(name, []).append(f"{kind} {record.name}")
    return dict(sorted((found | INSTEAD).items()))


def parted(names: Iterable[str], every_expert: bool) -> tuple[list[str], list[str], list[str]]:
    """What is recorded; what is left out for its cost; what is left out because it needs a backward pass."""
    recorded, costly, backward = [], [], []
    for name in names:
        sources = sources_of(resolve([name]))
        if sources & _GRADIENTS:
            backward.append(name)
        elif "all_outputs" in sources and not every_expert:
            costly.append(name)
        else:
            recorded.append(name)
    return recorded, costly, backward


def shaped_model(layers: int, seed: int = 0) -> PreTrainedModel:
    """Random weights; routers that do not send every token to the same experts."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=8,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.05)
    return model.eval()


@torch.no_grad()
def measure(model: Any, statistics: list[str], rows: int, length: int, repeats: int) -> dict[str, Any]:
    """Ratios of recorded passes to plain ones."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BS = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones_like(ids_BS)

    def plain() -> None:
        model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=1)

    speeds = {}
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        plain()
        speeds[name] = float(min(timed(plain, "cpu")[0] for _ in range(3)))
    fastest = min(speeds, key=speeds.__getitem__)
    model.set_experts_implementation(fastest)
    recorder = Recorder(model, statistics=statistics, keep_choices=False, once=True, fingerprint="")

    def recorded() -> None:
        with recorder:
            plain()
            recorder.flush()

    return {"tokens": ids_BS.numel(), "plain": speeds, "experts": fastest} | alternate(plain, recorded, repeats, "cpu")


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--model", default="", help="a MoE folder instead of the random one")
    parser.add_argument(
        "--every-expert", action="store_true", help="also statistics that run every expert on all tokens"
    )
    parser.add_argument("--only", default="", help="these statistics alone, by blanks")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logging.getLogger("moekit").setLevel(logging.ERROR)
    wanted = needed()
    recorded, costly, backward = parted(given.only.split() or wanted, given.every_expert)
    with tempfile.TemporaryDirectory() as scratch:
        if not given.model:
            shaped_model(given.layers).save_pretrained(scratch)
        model = moekit.load(Path(given.model or scratch), device="cpu").eval()
    result = measure(model, recorded, given.rows, given.length, given.repeats)
    if given.json:
        print(json.dumps(result | {"statistics": recorded, "every expert": costly, "backward": backward}, indent=2))
        return
    threads, date = torch.get_num_threads(), time.strftime("%Y-%m-%d")
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}, {date}; {result['tokens']:,} tokens")
    print("plain forward: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in result["plain"].items()))
    print(f"{len(recorded)} statistics: {', '.join(recorded)}")
    for names, why in ((costly, "every expert on every token"), (backward, "a backward pass")):
        for name in names:
            print(f"left out, needs {why}: {name} ({', '.join(wanted.get(name, []))})")
    for name in ("wall", "processor"):
        r = result[name]
        print(f"{name} time: {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}] of the plain forward's")
    print(f"at most {MOST}: {REACHED[result['wall']['ratio'] <= MOST]}")


if __name__ == "__main__":
    main()
