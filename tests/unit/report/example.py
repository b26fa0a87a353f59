"""A report of realistic size and shape, made through the same builders that a real run uses."""

from __future__ import annotations

import numpy as np

from moekit.evaluation.comparison import Evaluation, compare
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.generation import Completion, Completions, side_by_side
from moekit.evaluation.pairs import paired
from moekit.evaluation.questions import Metric, TaskResult
from moekit.report.data import ReportData, RunInfo, TextSection
from moekit.report.parts import Interval
from moekit.report.sections.c2r import Curve, CurvePoint, curve_findings, curve_section, headline, key_figures
from moekit.report.sections.evaluations import comparison_section, generation_section, relative
from moekit.report.sections.placements import PlacementRow, placement_section
from moekit.report.sections.traces import (
    Coactivations,
    by_layer_section,
    coactivation_section,
    effective_partners,
    inside,
    load_section,
)

DOMAINS = ("fiction and news", "kernel docs", "python code", "German man pages", "Austen", "dictionary")
SETTINGS = ((31, 0.0), (16, 0.001), (8, 0.003), (5, 0.006), (3, 0.014))


def counts(rng, experts, k, strength, groups):
    """Co-activation counts of tokens that stay in their group more, the greater the strength."""
    hidden = rng.permutation(np.repeat(np.arange(groups), experts // groups))
    found = np.zeros((experts, experts))
    popularity = rng.gamma(6, 1 / 6, experts)
    for _ in range(1500):
        first = rng.choice(experts, p=popularity / popularity.sum())
        weight = popularity * np.where(hidden == hidden[first], np.exp(strength), 1.0)
        weight[first] = 0
        chosen = [first, *rng.choice(experts, k - 1, replace=False, p=weight / weight.sum())]
        found[np.ix_(chosen, chosen)] += 1
    return found, hidden


def evaluations(rng, names, documents=15):
    """One evaluation per (name, extra loss per token)."""
    tokens = rng.integers(120, 511, documents * len(DOMAINS))
    base = np.repeat(rng.uniform(1.9, 3.9, len(DOMAINS)), documents) + rng.normal(0, 0.35, len(tokens))
    right = {task: rng.uniform(0, 1, 400) for task in ("piqa", "arc_easy", "winogrande")}
    found = []
    for name, extra in names:
        loss = base + extra + (rng.normal(0, 0.012, len(tokens)) if extra else 0)
        text = PerplexityResult(
            domains=tuple(d for d in DOMAINS for _ in range(documents)),
            tokens=tuple(int(t) for t in tokens),
            nll=tuple(float(v) for v in loss * tokens),
        )
        tasks = []
        for task, hard in right.items():
            answers = (hard + rng.normal(0, 0.04, 400) * bool(extra) < 0.62 - extra).astype(float)
            metric = Metric(
                value=float(answers.mean()), standard_error=float(answers.std() / 20), answers=tuple(answers.tolist())
            )
            tasks.append(TaskResult(task=task, n=400, metrics={"acc_norm": metric}, questions=task))
        found.append(Evaluation(name=name, perplexity=text, tasks=tuple(tasks)))
    return found


def curve(rng, devices, comparisons, tokens, k=4, flatten=1.0):
    """A curve whose rows fall as T falls."""
    most = {2: 1.93, 4: 2.86, 8: 3.37}[devices]
    placed = 1 + (most - 1) * 0.72
    alone = placed + rng.normal(0, 0.05, len(tokens))
    points = []
    for (t, _), comparison in zip(SETTINGS, comparisons, strict=True):
        share = flatten * (1 - (t - 3) / 28) ** 2 * 0.55
        rows = alone - (placed - 1) * share + rng.normal(0, 0.01, len(tokens)) * (share > 0)
        difference = paired(alone, rows, weights=tokens, resamples=499)
        mean = difference.mean / placed
        points.append(
            CurvePoint(
                name=f"T = {t}",
                rows=placed + difference.mean,
                saving=Interval(mean=mean, low=difference.low / placed, high=difference.high / placed),
                cost=relative(comparison.overall.difference),
                load=1.2 + share / 3,
            )
        )
    first = Interval(mean=1 / placed - 1, low=1 / placed - 1.01, high=1 / placed - 0.99)
    cost = Interval(mean=0.019, low=0.015, high=0.023)
    points.append(CurvePoint(name="device first", kind="device", rows=1.0, saving=first, cost=cost, load=1.4))
    return Curve(devices=devices, top_k=k, placed=placed, contiguous=most, points=tuple(points))


def placements(curves):
    rows = []
    for c in curves:
        for placement, sending, value in (
            ("contiguous", "once per expert", float(c.top_k)),
            ("random", "once per device", c.contiguous + 0.01),
            ("contiguous", "once per device", c.contiguous),
            ("best", "once per device", c.placed),
        ):
            rows.append(
                PlacementRow(
                    devices=c.devices,
                    routing="plain top-4",
                    placement=placement,
                    sending=sending,
                    rows=value,
                    per_expert=c.top_k,
                    load=1.14,
                )
            )
        for p in c.points:
            rows.append(
                PlacementRow(
                    devices=c.devices,
                    routing=f"C2R, {p.name}",
                    placement="best",
                    sending="once per device",
                    rows=Interval(mean=p.rows, low=p.rows - 0.01, high=p.rows + 0.01),
                    per_expert=c.top_k,
                    load=p.load,
                )
            )
    return rows


def example(
    layers=8, experts=32, documents=15, seed=0, domains=None, title="C2R on a converted SmolLM2-135M", flatten=1.0
):
    """The whole report."""
    rng = np.random.default_rng(seed)
    measured = evaluations(rng, [("top-4", 0.0), *((f"C2R T={t}", extra) for t, extra in SETTINGS)], documents)
    if domains:
        renamed = dict(zip(DOMAINS, domains, strict=False))
        measured = [
            e.model_copy(
                update={
                    "perplexity": e.perplexity.model_copy(
                        update={"domains": tuple(renamed.get(d, d) for d in e.perplexity.domains)}
                    )
                }
            )
            for e in measured
        ]
    tokens = np.array(measured[0].perplexity.tokens, dtype=float)
    comparisons = [compare(measured[0], e) for e in measured[1:]]
    curves = [curve(rng, devices, comparisons, tokens, flatten=flatten) for devices in (2, 4, 8)]
    before, after, orders, blocks = {}, {}, {}, {}
    for layer in range(layers):
        before[layer], hidden = counts(rng, experts, 4, 1.6, 4)
        after[layer], _ = counts(np.random.default_rng(seed + layer), experts, 4, 3.2, 4)
        order = np.argsort(hidden, kind="stable")
        orders[layer], blocks[layer] = [int(i) for i in order], [experts // 4] * 4
    after_orders = {}
    for layer in range(layers):
        hidden = np.random.default_rng(seed + layer).permutation(np.repeat(np.arange(4), experts // 4))
        after_orders[layer] = [int(i) for i in np.argsort(hidden, kind="stable")]
    panels = [
        Coactivations("plain top-4, experts as trained", before),
        Coactivations("plain top-4, placed on 4 devices", before, orders, blocks),
        Coactivations("C2R T = 5, placed on 4 devices", after, after_orders, blocks),
    ]
    texts = ["The committee met on Tuesday", "def area(radius):", "Der Befehl kopiert"]
    continued = [
        Completions(
            model=name,
            completions=tuple(
                Completion(prompt=t, prompt_ids=(1,), ids=(5, 6, last), text=f" and so on, {last}") for t in texts
            ),
        )
        for name, last in (("top-4", 7), ("C2R T=5", 8))
    ]
    ordered = {layer: before[layer][np.ix_(orders[layer], orders[layer])] for layer in before}
    ordered_after = {layer: after[layer][np.ix_(after_orders[layer], after_orders[layer])] for layer in after}
    sections = (
        curve_section(
            curves,
            lead="Down and to the left is better. Each point is a model fine-tuned from the same start on the same "
            "batches, placed as well as it can be, each token sent once per device.",
        ),
        comparison_section([comparisons[2], comparisons[4]]),
        placement_section(placements(curves), lead="An exact replay of the held-out trace, mean over layers."),
        coactivation_section(panels, lead="Outlined squares are devices: a pair inside one is sent as one row."),
        by_layer_section(
            {
                "pairs on one device": {
                    "plain top-4": {i: inside(c, blocks[i]) for i, c in ordered.items()},
                    "C2R T = 5": {i: inside(c, blocks[i]) for i, c in ordered_after.items()},
                },
                "effective partners": {
                    "plain top-4": {i: effective_partners(c) for i, c in before.items()},
                    "C2R T = 5": {i: effective_partners(c) for i, c in after.items()},
                },
            },
            title="Collaboration, by layer",
            units={"pairs on one device": "%"},
            zero=True,
        ),
        load_section(
            {
                "plain top-4": {i: np.diag(c) for i, c in before.items()},
                "C2R T = 5": {i: np.diag(c) for i, c in after.items()},
            }
        ),
        generation_section(side_by_side(*continued, agreement=0.934)),
        TextSection(title="How to read this", paragraphs=("Rows are hidden states sent between devices.",)),
    )
    return ReportData(
        title=title,
        subtitle="32 routed experts, 4 of them per token, and a shared one",
        headline=headline(curves, devices=4),
        findings=curve_findings(curves),
        figures=key_figures(curves),
        sections=sections,
        run=RunInfo(
            date="2025-01-31 12:00 UTC",
            seed=0,
            commands=("moekit run recipes/c2r-demo.yaml",),
            machine={"processor": "some processor", "cores": "2", "memory": "16 GiB"},
            versions={"moekit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            hashes={"model": "3f" * 32, "trace": "a0" * 32},
        ),
    )
