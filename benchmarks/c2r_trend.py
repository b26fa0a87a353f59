"""C2R's trend on a small character model: what each T costs in loss and gains in co-located experts.

Trains a 4-layer Qwen3-MoE (8 experts, top-2) on the Python standard library's source from scratch, profiles it, then
sweeps T and device mode, each with the same short recovery on the same batches as the unconstrained model.

    python benchmarks/c2r_trend.py [--steps 320] [--recovery 80] [--seeds 1]

Legend: T (alone) partners a first expert may bring, N tokens, E experts, K choices a token.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import sysconfig
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.anatomy import find_moe_layers
from moekit.placement.solvers.exact import Exact
from moekit.routing import C2R, plan_routing
from moekit.runtime import RouterPart
from moekit.trace import coactivation

SEQUENCE, BATCH, EXPERTS, TOP_K, DEVICES = 64, 32, 8, 2, 2


def characters(seed: int) -> tuple[torch.Tensor, int]:
    """Source text as character ids [N], and the size of the alphabet; rare characters share one id."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    text = "".join(file.read_text(errors="ignore") for file in files)
    alphabet = [c for c in map(chr, range(9, 127))]
    table = {c: i + 1 for i, c in enumerate(alphabet)}
    return torch.tensor([table.get(c, 0) for c in text]), len(alphabet) + 1


def model_of(vocabulary: int, seed: int) -> Qwen3MoeForCausalLM:
    """The 4-layer model, fp32."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    model = Qwen3MoeForCausalLM(config)
    for layer in find_moe_layers(model):
        torch.nn.init.normal_(layer.require_router().weight, std=0.02)
    return model


def batches(ids_N: torch.Tensor, count: int, seed: int) -> list[torch.Tensor]:
    """`count` batches [B, S] of random windows."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids_N) - SEQUENCE, (count, BATCH), generator=generator)
    return [torch.stack([ids_N[s : s + SEQUENCE] for s in row.tolist()]) for row in starts]


def train(model: Qwen3MoeForCausalLM, data: list[torch.Tensor], lr: float) -> None:
    """AdamW with a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(data))
    model.train()
    for ids in data:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, data: list[torch.Tensor]) -> tuple[float, dict[int, torch.Tensor]]:
    """Mean next-character loss, and each layer's choices [N, K]."""
    choices: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in find_moe_layers(model)}
    hooks = [
        layer.require_router().register_forward_hook(lambda _m, _i, out, at=layer.index: choices[at].append(out[2]))
        for layer in find_moe_layers(model)
    ]
    losses = []
    for ids in data:
        logits = model(input_ids=ids, use_cache=False, output_router_logits=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item())
    for hook in hooks:
        hook.remove()
    return statistics.fmean(losses), {at: torch.cat(chosen) for at, chosen in choices.items()}


def best_share(choices: dict[int, torch.Tensor]) -> float:
    """Share of top-2 pairs on one device under the best placement, mean over layers."""
    shares = []
    for indices_NK in choices.values():
        counts = coactivation(indices_NK, EXPERTS)
        groups = Exact().solve(counts, DEVICES).groups
        same = torch.tensor(groups)[indices_NK]
        shares.append((same[:, 0] == same[:, 1]).double().mean().item())
    return statistics.fmean(shares)


def run(seed: int, steps: int, recovery: int) -> list[dict[str, float | str]]:
    """One seed: a row for each setting, losses as differences from the unconstrained model."""
    ids, vocabulary = characters(seed)
    split = int(len(ids) * 0.9)
    held_out = batches(ids[split:], 30, seed=10_000)
    model = model_of(vocabulary, seed)
    train(model, batches(ids[:split], steps, seed), lr=3e-3)
    loss, choices = evaluate(model, held_out)
    counts = {at: {"coactivation": coactivation(chosen, EXPERTS)} for at, chosen in choices.items()}
    devices = {at: Exact().solve(named["coactivation"], DEVICES).groups for at, named in counts.items()}
    settings: list[tuple[str, RouterPart | None]] = [("plain", None)]
    settings += [(f"T={t}", C2R(top_t=t)) for t in (7, 5, 3, 2, 1)]
    settings += [("device", C2R(mode="device"))]
    rows: list[dict[str, float | str]] = []
    for name, policy in settings:
        twin = copy.deepcopy(model)
        if policy is not None:
            plan_routing(find_moe_layers(twin), policy, "c2r", counts, devices=devices).apply(twin)
        before, _ = evaluate(twin, held_out)
        train(twin, batches(ids[:split], recovery, seed=seed + 1), lr=1e-3)
        after, chosen = evaluate(twin, held_out)
        rows.append({"setting": name, "f": best_share(chosen), "before": before, "after": after})
    plain = rows[0]
    print(f"seed {seed}: unconstrained loss {loss:.4f} -> {plain['after']:.4f} after recovery")
    return [
        {**row, "before": float(row["before"]) - loss, "after": float(row["after"]) - float(plain["after"])}
        for row in rows
    ]


def main() -> None:
    """Print one table, means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--recovery", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results = [run(seed, arguments.steps, arguments.recovery) for seed in range(arguments.seeds)]
    print(f"{'setting':>8} {'f (best D=2)':>13} {'loss before':>12} {'loss after':>11}   (losses minus unconstrained)")
    for column in zip(*results, strict=True):
        f, before, after = (statistics.fmean(float(row[key]) for row in column) for key in ("f", "before", "after"))
        print(f"{column[0]['setting']:>8} {f:13.4f} {before:+12.4f} {after:+11.4f}")
    shares = {row["setting"]: statistics.fmean(float(r["f"]) for r in column) for column in zip(*results, strict=True)
              for row in column}  # fmt: skip
    order = [shares[name] for name in ("T=7", "T=5", "T=3", "T=2", "T=1", "device")]
    rising = all(small <= large + 0.005 for small, large in itertools.pairwise(order))
    print(f"f rises as T falls: {'yes' if rising else 'NO'}; f(T=1) - f(T=7) = {order[4] - order[0]:+.3f}")


if __name__ == "__main__":
    main()
