"""The trends that pruning methods are known for, as claims on the results of a bench and on the model itself.

Used by `prune_ranking.py`. A claim says what must hold, with the figures; where a model is not of the kind that a claim
is about (experts of one origin, experts trained from scratch) it says nothing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.bench.pruning import Entry, PruneBenchResult, Subject
from moekit.bench.pruning.ranking import mean_nll
from moekit.compress.budget.sparsity import remaining_sparsity
from moekit.compress.engine import live
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.resize import read_block
from moekit.compress.prune.premoe import PreMoe
from moekit.compress.prune.stun import Stun
from moekit.compress.sparsify.wanda import Wanda
from moekit.compress.weights import LayerWeights
from moekit.data import TokenBatches, TokenizedDocument
from moekit.data.batches import arrange
from moekit.evaluation import perplexity_of_documents
from moekit.serving.expert_sets.retrieval import query, retrieve
from moekit.serving.expert_sets.scoring import expert_set_of
from moekit.trace import record, summarise

# Scores from one pass that weigh by how often an expert is chosen; means over an expert's tokens are told apart.
SCORES = (
    "frequency",
    "soft-frequency",
    "gate-mass",
    "ean",
    "weighted-ean",
    "reap",
    "easy-ep",
    "premoe",
    "wanda-expert",
)
OUTPUTS = ("ean", "weighted-ean", "reap")
HALF, QUARTER = 0.5, 0.25
SEQUENCE = 128
UNCHANGED_BY_ALPHA = "dern, alpha .6"
EXTRAS = (
    Entry(method="random", label="random"),
    Entry(method="frequency", label="frequency"),
    Entry(method="gate-mass", label="gate-mass"),
    Entry(method="dern", label="dern"),
    Entry(method="dern", settings={"alpha": 0.6}, label=UNCHANGED_BY_ALPHA),
    Entry(method="dern", settings={"alpha": -1.0}, label="dern, all moved"),
    Entry(method="dern", settings={"init": "gate", "alpha": 0.3}, label="dern, the paper's init"),
    Entry(method="uncurl", label="uncurl"),
    Entry(method="uncurl", settings={"align": False}, label="uncurl, not aligned"),
    Entry(method="stun", settings={"router_distance": 0.0, "coactivation": 1.0}, label="stun, co-activation"),
    Entry(method="premoe", settings={"token_score": "tcess", "pool": 1, "threshold": None}, label="premoe, version 1"),
)


@dataclass(frozen=True)
class Claim:
    """A trend: whose, what must hold, the figures, whether they hold; None where it says nothing here."""

    method: str
    text: str
    figures: str
    holds: bool | None

    def __str__(self) -> str:
        word = {True: "holds", False: "does NOT hold", None: "says nothing"}[self.holds]
        return f"  {self.method:<12} {word:<14} {self.text}\n  {'':<27} {self.figures}"


@dataclass(frozen=True, eq=False)
class Case:
    """A model and its text."""

    name: str
    subject: Subject
    calibration: list[TokenizedDocument]
    heldout: list[TokenizedDocument]
    tasks: tuple[str, ...]
    folder: Path
    options: argparse.Namespace


def avoided(result: PruneBenchResult, name: str, keep: float) -> float:
    """Share of random's rise that a method does not have, over all text."""
    base: float = result.unchanged.overall.nll
    random, own = (need(result, n, keep) for n in ("random", name))
    return 1.0 - (own - base) / (random - base)


def need(result: PruneBenchResult, name: str, keep: float) -> float:
    """Loss of a method; NaN, which no claim survives, if it took no part."""
    found = mean_nll(result, name, keep)
    return float("nan") if found is None else found


def about_scores(result: PruneBenchResult) -> Iterator[Claim]:
    """Scores of one pass against chance and against frequency."""
    for keep, least in ((0.75, 0.95), (HALF, 0.65)):
        shares = {name: avoided(result, name, keep) for name in SCORES}
        worst = min(shares, key=lambda name: shares[name])
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        means = ", ".join(f"{name} {avoided(result, name, keep):.0%}" for name in ("man", "msan"))
        yield Claim(
            "scores",
            f"every score but means of norms avoids {least:.0%} of random's rise, keeping {keep:.0%}",
            f"least: {worst} {shares[worst]:.0%}; {told}; ({means})",
            all(share >= least for share in shares.values()),
        )
    gains = {name: need(result, "frequency", HALF) - need(result, name, HALF) for name in OUTPUTS}
    yield Claim(
        "scores",
        "scores that see outputs beat frequency by 0.05 nats, keeping half",
        ", ".join(f"{name} {gain:+.3f}" for name, gain in gains.items()),
        all(gain >= 0.05 for gain in gains.values()),
    )


def moved_share(extra: PruneBenchResult) -> float:
    """Share of the dropped experts' neurons that have a like in an expert that stays."""
    return statistics.fmean(run.figures.get("moved_share", 0.0) for run in extra.select("dern", HALF))


def of_one_origin(extra: PruneBenchResult) -> bool:
    """Whether experts have neurons in common, as copies of one dense network have."""
    return moved_share(extra) > 0.5


def about_dern(extra: PruneBenchResult) -> Iterator[Claim]:
    """Recombination helps, or at least does no harm, where there is something to recombine."""
    moved = moved_share(extra)
    gaps = {keep: need(extra, "dern", keep) - need(extra, "gate-mass", keep) for keep in (HALF, QUARTER)}
    told = f"{moved:.1%} of dropped neurons moved; " + ", ".join(
        f"keep {keep:.0%}: {need(extra, 'dern', keep):.3f}, gate mass {need(extra, 'gate-mass', keep):.3f}, random "
        f"{need(extra, 'random', keep):.3f}"
        for keep in gaps
    )
    alike = of_one_origin(extra)
    yield Claim(
        "dern",
        "experts of one origin: within 0.01 nats of pruning at half, not worse at a quarter, better than chance",
        told,
        (gaps[HALF] <= 0.01 and gaps[QUARTER] <= 0 and all(_beats(extra, "dern", k) for k in gaps)) if alike else None,
    )
    gap = abs(need(extra, UNCHANGED_BY_ALPHA, HALF) - need(extra, "gate-mass", HALF))
    harm = need(extra, "dern, all moved", HALF) - need(extra, "gate-mass", HALF)
    yield Claim(
        "dern",
        "experts without a common origin: alpha of .6 equals pruning, and moving all there is does harm",
        f"alpha .6 differs by {gap:.4f}, moving all costs {harm:+.3f}",
        None if alike else gap <= 0.001 and harm > 0,
    )
    fragile = need(extra, "dern, the paper's init", HALF) - need(extra, "dern", HALF)
    yield Claim(
        "dern",
        "among duplicates the paper's first centres lose neurons, an expert's own do not",
        f"costs {fragile:+.3f} at half",
        fragile > 0.05 if alike else None,
    )


def _beats(result: PruneBenchResult, name: str, keep: float) -> bool:
    return need(result, name, keep) < need(result, "random", keep)


def about_uncurl(extra: PruneBenchResult, alike: bool) -> Iterator[Claim]:
    """Merging, and what alignment adds."""
    gains = {k: need(extra, "uncurl, not aligned", k) - need(extra, "uncurl", k) for k in (HALF, QUARTER)}
    behind = need(extra, "uncurl", QUARTER) - need(extra, "frequency", QUARTER)
    told = f"alignment gains {gains[HALF]:+.3f} at half, {gains[QUARTER]:+.3f} at a quarter; there merging costs "
    yield Claim(
        "uncurl",
        "experts of one origin: alignment gains 0.1 at half and 0.5 at a quarter, where merging reaches pruning",
        f"{told}{behind:+.3f} more than frequency",
        gains[HALF] >= 0.1 and gains[QUARTER] >= 0.5 and behind <= 0.01 if alike else None,
    )
    random, frequency, own = (need(extra, name, HALF) for name in ("random", "frequency", "uncurl"))
    yield Claim(
        "uncurl",
        "experts without a common origin: merging beats chance and loses to pruning by frequency, at half",
        f"random {random:.3f}, uncurl {own:.3f}, frequency {frequency:.3f}",
        None if alike else frequency < own < random,
    )


def about_stun(case: Case, result: PruneBenchResult, extra: PruneBenchResult) -> Iterator[Claim]:
    """The expert stage against chance, and two stages against one."""
    own, random = (need(result, name, 0.75) for name in ("stun", "random"))
    half = ", ".join(f"{name} {need(extra, name, HALF):.3f}" for name in ("stun, co-activation", "random"))
    yield Claim(
        "stun",
        "distances of router rows beat chance, keeping 75 %",
        f"stun {own:.3f}, random {random:.3f}; at half: {half}",
        own < random,
    )
    losses = two_stages(case)
    experts = max(result.experts.values())
    for total, least in ((0.5, 0.03), (0.65, 0.1)):
        mixes = {kept: nll for (kept, share), nll in losses.items() if share == total}
        alone, inner = mixes.pop(experts), mixes
        best, most = min(inner, key=lambda kept: inner[kept]), min(inner)
        told = ", ".join(f"{kept} experts {nll:.3f}" for kept, nll in sorted(inner.items(), reverse=True))
        yield Claim(
            "stun",
            f"{total:.0%} of the experts' weights gone: some experts first, then Wanda, beats Wanda alone by {least}, "
            "and experts alone, or nearly, lose",
            f"Wanda alone {alone:.3f}; then Wanda after {told}",
            alone - inner[best] >= least and inner[most] > inner[best],
        )


@torch.no_grad()
def two_stages(case: Case) -> dict[tuple[int, float], float]:
    """(experts kept, share of the experts' weights gone) -> loss, with Wanda on what is left, if anything has to go."""
    model = moekit.load(case.subject.checkpoint.path, device="cpu", dtype="float32", parts=False)
    rows = arrange(case.calibration, case.options.seq_len)
    method, wanda = Stun(), Wanda()
    needs = sorted({"load", *method.required, *wanda.required})
    geometry = find_moe_layers(model)[0].geometry
    experts, top_k = geometry.experts, geometry.top_k
    found: dict[tuple[int, float], float] = {}
    for keep in range(experts, 0, -max(experts // 8, 1)):
        totals = [total for total in (0.5, 0.65) if 1 - keep / experts <= total]
        if not totals or keep < top_k:
            break
        small = copy.deepcopy(model)
        if keep < experts:
            outcomes = _decide(small, method, _evidence(small, rows, needs), keep)
            small = live.change_model(small, outcomes)
        seen = _evidence(small, rows, needs)
        whole = {at: LayerOutcome(keep=tuple(range(keep))) for at in seen}
        for total in totals:
            share = remaining_sparsity(total, 1 - keep / experts)
            rewrite = partial(_sparsified, wanda, seen, share)
            sparse = live.change_model(copy.deepcopy(small), whole, rewrite)
            measured = perplexity_of_documents(sparse, case.heldout, window=case.options.seq_len)
            found[keep, total] = measured.overall.nll
            del sparse
    return found


def _sparsified(
    wanda: Wanda, seen: dict[int, LayerInputs], share: float, layer: int, weights: LayerWeights
) -> LayerWeights:
    return wanda.transform(weights, seen[layer], share)


def _evidence(model: Any, rows: TokenBatches, needs: Sequence[str]) -> dict[int, LayerInputs]:
    trace = record(model, rows.batches(4), statistics=needs, keep_choices=False, fingerprint="")
    taken = trace.require(needs)
    return {
        layer.index: LayerInputs(layer.index, layer.geometry, taken[layer.index], partial(read_block, layer))
        for layer in find_moe_layers(model)
    }


def _decide(model: Any, method: Any, seen: dict[int, LayerInputs], keep: int) -> dict[int, LayerOutcome]:
    return {at: method.decide(inputs, method.score(inputs), keep) for at, inputs in seen.items()}


@torch.no_grad()
def how_experts_differ(case: Case) -> str:
    """What says that experts are not alike: their load, the domains they serve, their weights, and what they add."""
    model = moekit.load(case.subject.checkpoint.path, device="cpu", dtype="float32", parts=False)
    rows = arrange(case.heldout, case.options.seq_len)
    routing = summarise(record(model, rows.batches(4), tokenizer=case.subject.tokenizer)).layers
    apart = [layer.domains.normalised for layer in routing if layer.domains]
    chance = [layer.domains.shuffled for layer in routing if layer.domains]
    alike, before = [], perplexity_of_documents(model, case.heldout, window=case.options.seq_len).overall.nll
    for layer in find_moe_layers(model):
        down_EN = torch.stack([weight.flatten() for weight in layer.experts.down_proj])
        down_EN = torch.nn.functional.normalize(down_EN, dim=1)
        alike.append((down_EN @ down_EN.T).fill_diagonal_(-1).max().item())
        for weight in layer.experts.down_proj:
            weight.zero_()
    after = perplexity_of_documents(model, case.heldout, window=case.options.seq_len).overall.nll
    spread = [layer.load.cv for layer in routing]
    domains = f"NMI with domains {min(apart):.3f}-{max(apart):.3f} (shuffled {max(chance):.3f}); " if apart else ""
    return (
        f"{len(routing)} MoE layers; load CV {min(spread):.2f}-{max(spread):.2f}; {domains}"
        f"largest cosine of two experts' down projections {max(alike):.2f}; "
        f"loss {before:.3f}, without any routed expert {after:.3f}"
    )


def about_tasks(result: PruneBenchResult, name: str, least: float) -> Claim:
    """Experts chosen on a task's own text against those chosen on another task's."""
    tasks = result.setting.domains
    gaps = {}
    for task in tasks:
        others = [mean_nll(result, name, HALF, other, task) for other in tasks if other != task]
        own = mean_nll(result, name, HALF, task, task)
        known = [nll for nll in others if nll is not None]
        if own is not None and known:
            gaps[task] = min(known) - own
    best = max(gaps, key=lambda task: gaps[task]) if gaps else ""
    return Claim(
        name,
        f"a task's own text wins by {least} nats over other tasks' on the most distinct domain, keeping half",
        "; ".join(f"{task} {gap:+.3f}" for task, gap in gaps.items()),
        gaps[best] >= least if gaps else None,
    )


def about_easy_ep(case: Case, result: PruneBenchResult) -> Iterator[Claim]:
    """The token weight, the domain, and how few texts suffice."""
    share = avoided(result, "easy-ep", HALF)
    yield Claim("easy-ep", "avoids 85 % of random's rise, keeping half", f"{share:.0%}", share >= 0.85)
    gain = need(result, "weighted-ean", HALF) - need(result, "easy-ep", HALF)
    yield Claim("easy-ep", "its token weight gains 0.03 nats, keeping half", f"{gain:+.3f}", gain >= 0.03)
    yield about_tasks(result, "easy-ep", 0.2)
    overlaps = localisation(case)
    told = "; ".join(f"{task} {share:.2f}" for task, share in overlaps.items())
    yield Claim(
        "easy-ep",
        "five sequences of a task choose the half that all of its text chooses, to 0.85 (chance 0.5)",
        told,
        statistics.fmean(overlaps.values()) >= 0.85 if overlaps else None,
    )


def localisation(case: Case) -> dict[str, float]:
    """Task -> share of the kept half that five sequences and all of the task's text have in common."""
    model = moekit.load(case.subject.checkpoint.path, device="cpu", dtype="float32", parts=False)
    method = catalogue.get("prune", "easy-ep").cls()
    found = {}
    for task in case.tasks:
        own = [
            TokenizedDocument(d.ids[begin : begin + SEQUENCE], d.domain, d.index)
            for d in case.calibration
            if d.domain == task
            for begin in range(0, len(d.ids) - SEQUENCE + 1, SEQUENCE)
        ]
        if len(own) < 15:
            continue
        sets = []
        for some in (own[:: len(own) // 5][:5], own):
            seen = _evidence(model, arrange(some, SEQUENCE), ("load", *method.required))
            sets.append(_decide(model, method, seen, find_moe_layers(model)[0].geometry.experts // 2))
        shares = [len(set(sets[0][at].keep) & set(sets[1][at].keep)) / len(sets[1][at].keep) for at in sets[0]]
        found[task] = statistics.fmean(shares)
    return found


def about_premoe(case: Case, result: PruneBenchResult) -> Iterator[Claim]:
    """Router confidence against chance and frequency, the task, and finding it from a prompt."""
    share = avoided(result, "premoe", HALF)
    yield Claim("premoe", "avoids 85 % of random's rise, keeping half", f"{share:.0%}", share >= 0.85)
    gain = need(result, "frequency", HALF) - need(result, "premoe", HALF)
    yield Claim("premoe", "beats frequency by 0.1 nats, keeping half", f"{gain:+.3f}", gain >= 0.1)
    yield about_tasks(result, "premoe", 0.15)
    rates = retrieval(case)
    told = ", ".join(f"{length} tokens {rate:.2f}" for length, rate in rates.items())
    yield Claim(
        "premoe",
        "a prompt of 128 tokens finds its expert set, from all layers, half of the time or more",
        f"{told}; chance {1 / len(case.tasks):.2f}",
        rates.get(128, 0.0) >= 0.5,
    )


def retrieval(case: Case) -> dict[int, float]:
    """Tokens of a prompt -> share of unseen prompts whose nearest expert set is their own task's."""
    model = moekit.load(case.subject.checkpoint.path, device="cpu", dtype="float32", parts=False)
    method, layers = PreMoe(), len(find_moe_layers(model))
    expert_sets = {}
    for task in case.tasks:
        rows = arrange([d for d in case.calibration if d.domain == task], case.options.seq_len)
        trace = record(model, rows.batches(4), statistics=method.required, keep_choices=False)
        expert_sets[task] = expert_set_of(task, model, trace, method)
    rates = {}
    for length in (32, 128):
        hits = []
        for task in case.tasks:
            for document in [d for d in case.heldout if d.domain == task and len(d.ids) >= length][:12]:
                scores = query(model, case.subject.tokenizer, document.ids[:length], method=method, layers=layers)
                hits.append(retrieve(expert_sets, scores).task == task)
        if hits:
            rates[length] = statistics.fmean(hits)
    return rates
