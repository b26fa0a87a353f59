"""Is it worth training more experts than will be served? "Train with E, merge to P" against "train with P".

Trains one small MoE for each number of experts from scratch, all alike and on the same text, then takes each domain of
the text as a task: routers are observed on the task's training text alone, the larger models brought down to P experts,
and all are judged on held-out text of the task. UNCURL (arXiv:2409.01483) stands beside frequency, REAP and random
pruning at the same P, and beside itself with the router rows of all experts ("rows": merged experts' gates add up).

    python benchmarks/uncurl_protocol.py [--data stdlib+licences] [--steps 400] [--seeds 1] [--recovery 0]

Prints a table and, for each E, the largest factor E / P at which the reduced model is at least as good as the one that
was trained with P. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.compress.engine import live
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.data import Document, TokenBatches, load_text, pack, train_tokenizer
from moekit.routing.methods.merge_redirect import MergeRedirect, share_rows
from moekit.runtime import attach
from moekit.trace import Statistics, record
from moekit.training import TinyConfig, TrainConfig, build_tiny_model, train

FULL, KEPT, TOP_K = (4, 8, 16), (2, 4, 8), 2
METHODS = ("uncurl", "frequency", "reap", "random")
COLUMNS = ("uncurl", "rows", "frequency", "reap", "random")
DRAWS = 5
Losses = dict[tuple[str, int, int], dict[str, float]]


def config_of(experts: int, steps: int, seed: int) -> TinyConfig:
    """A model of 3 layers; only the number of experts differs."""
    training = TrainConfig(
        steps=steps,
        lr=3e-3,
        warmup=0.05,
        weight_decay=0.1,
        beta2=0.98,
        seq_len=128,
        batch=16,
        objectives={"balance": 0.01, "z": 0.001},
        save_every=None,
        seed=seed,
    )
    return TinyConfig(
        vocabulary=1024,
        hidden=64,
        layers=3,
        heads=4,
        kv_heads=4,
        experts=experts,
        top_k=TOP_K,
        width=64,
        context=128,
        training=training,
    )


def rows_of(documents: list[Document], tokenizer: object, domain: str | None = None) -> TokenBatches:
    """Rows of 128 tokens, of one domain or of all."""
    chosen = [d for d in documents if domain in (None, d.domain)]
    return pack(chosen, tokenizer, 128, end_token=True)  # type: ignore[arg-type]


def first(rows: TokenBatches, count: int) -> TokenBatches:
    """The first rows."""
    return TokenBatches(rows.input_ids[:count], rows.document_RS[:count], rows.domain_RS[:count], rows.domains)


@torch.no_grad()
def loss_of(model: PreTrainedModel, rows: TokenBatches) -> float:
    """Mean loss, nats a token."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in rows.batches(32):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        labels = batch.labels[:, 1:].flatten()
        total += float(cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum"))
        tokens += int((labels >= 0).sum())
    return total / tokens


def reduced(
    model: PreTrainedModel, method: PruneMethod, observed: Statistics, keep: int, seed: int
) -> tuple[PreTrainedModel, dict[int, LayerOutcome]]:
    """A copy of the model with `keep` experts a layer."""
    seen = {
        layer.index: LayerInputs(layer.index, layer.geometry, observed[layer.index], seed=seed)
        for layer in find_moe_layers(model)
    }
    outcomes = {at: method.decide(inputs, method.score(inputs), keep) for at, inputs in seen.items()}
    twin = copy.deepcopy(model)
    twin = live.change_model(twin, outcomes, lambda at, weights: method.transform(weights, outcomes[at], seen[at]))
    return twin, outcomes


def with_all_rows(
    small: PreTrainedModel, model: PreTrainedModel, outcomes: Mapping[int, LayerOutcome]
) -> PreTrainedModel:
    """Let a merged model route by the rows of the model it came from."""
    rows = {}
    for old in find_moe_layers(model):
        groups = outcomes[old.index].sources
        assert groups is not None
        rows[old.index] = share_rows(groups, old.require_router().weight)
    attach(small, MergeRedirect(), rows)
    return small


def compare(
    models: Mapping[int, PreTrainedModel],
    task: TokenBatches,
    heldout: TokenBatches,
    options: argparse.Namespace,
    seed: int,
) -> dict[tuple[int, int], dict[str, float]]:
    """(E, P) -> losses on one task: of the model with E, of that trained with P, and of each way from E to P."""

    def judged(model: PreTrainedModel) -> float:
        if options.recovery:
            settings = config_of(TOP_K, options.recovery, seed).training.model_copy(update={"lr": 5e-4})
            train(model, None, task, settings)
        return loss_of(model, heldout)

    methods = {name: catalogue.get("prune", name).cls() for name in METHODS}
    needs = sorted({need for method in methods.values() for need in method.required} | {"load"})
    trained = {experts: judged(copy.deepcopy(model)) for experts, model in models.items()}
    found: dict[tuple[int, int], dict[str, float]] = {}
    for experts in FULL:
        trace = record(models[experts], first(task, options.calibration).batches(32), statistics=needs)
        assert trace.statistics is not None
        for keep in (p for p in KEPT if p < experts):
            losses = {"E": trained[experts], "P": trained[keep]}
            for name, method in methods.items():
                draws = []
                for draw in range(DRAWS if name == "random" else 1):
                    small, outcomes = reduced(models[experts], method, trace.statistics, keep, seed + 1000 * draw)
                    draws.append(judged(copy.deepcopy(small)))
                losses[name] = statistics.fmean(draws)
                if name == "uncurl":
                    losses["rows"] = judged(with_all_rows(small, models[experts], outcomes))
            found[experts, keep] = losses
    return found


def run(seed: int, documents: list[Document], heldout: list[Document], options: argparse.Namespace) -> Losses:
    """Train all models and compare them on all tasks."""
    tokenizer = train_tokenizer(documents, 1024, limit_bytes=1_000_000, seed=seed)
    rows = rows_of(documents, tokenizer)
    models = {}
    for experts in sorted({*FULL, *KEPT}):
        config, start = config_of(experts, options.steps, seed), time.perf_counter()
        models[experts] = build_tiny_model(config, "cpu")
        losses = train(models[experts], None, rows, config.training).losses
        tail = statistics.fmean(losses[-20:])
        print(f"seed {seed}, E = {experts:2}: loss {losses[0]:.3f} -> {tail:.3f}, {time.perf_counter() - start:.0f} s")
    found: Losses = {}
    for domain in rows.domains:
        judged = first(rows_of(heldout, tokenizer, domain), options.judged)
        for (experts, keep), losses in compare(
            models, rows_of(documents, tokenizer, domain), judged, options, seed
        ).items():
            found[domain, experts, keep] = losses
    return found


def largest_factor(rows: Mapping[tuple[str, int, int], Mapping[str, float]], experts: int, name: str) -> str:
    """Largest E / P at which a way from E to P is as good as training with P, by the mean over tasks."""
    holding = []
    for keep in KEPT:
        gaps = [losses[name] - losses["P"] for (_, e, p), losses in rows.items() if (e, p) == (experts, keep)]
        if gaps and statistics.fmean(gaps) <= 0:
            holding.append(experts // keep)
    return f"x{max(holding)}" if holding else "none"


def print_table(rows: Losses) -> None:
    """Losses on held-out text, and the largest factor that holds."""
    head = " ".join(f"{name:>10}" for name in COLUMNS)
    print(f"\n{'task':<14} {'E':>3} {'P':>3} {'E / P':>6} {'loss of E':>10} {'trained P':>10} {head}")
    for (task, experts, keep), losses in sorted(rows.items()):
        cells = " ".join(f"{losses[name]:9.3f}{'*' if losses[name] <= losses['P'] else ' '}" for name in COLUMNS)
        start = f"{task:<14} {experts:>3} {keep:>3} {'x' + str(experts // keep):>6}"
        print(f"{start} {losses['E']:10.3f} {losses['P']:10.3f} {cells}")
    print("* at least as good as the model that was trained with P experts\n")
    for experts in FULL:
        factors = ", ".join(f"{name} {largest_factor(rows, experts, name)}" for name in COLUMNS)
        print(f"E = {experts:2}, largest factor that holds (mean over tasks): {factors}")


def main() -> None:
    """Print one table, means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib+licences", help="text of some domains, each of which is a task")
    parser.add_argument("--bytes", type=int, default=4_000_000, help="of text for training, shared by the domains")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model, 2,048 tokens each")
    parser.add_argument("--calibration", type=int, default=256, help="rows of 128 tokens on which routers are observed")
    parser.add_argument("--judged", type=int, default=256, help="held-out rows of 128 tokens")
    parser.add_argument("--recovery", type=int, default=0, help="steps on the task's text for every model afterwards")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    documents = load_text(options.data, split="train", limit_bytes=options.bytes)
    heldout = load_text(options.data, split="heldout", limit_bytes=options.bytes)
    every: dict[tuple[str, int, int], list[dict[str, float]]] = defaultdict(list)
    for seed in range(options.seeds):
        for key, losses in run(seed, documents, heldout, options).items():
            every[key].append(losses)
    print_table(
        {key: {name: statistics.fmean(o[name] for o in many) for name in many[0]} for key, many in every.items()}
    )


if __name__ == "__main__":
    main()
