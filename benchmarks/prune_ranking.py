"""Do pruning methods rank as their papers, and our first measurements, say? On a converted MoE and one from scratch.

    python benchmarks/prune_ranking.py [--model runs/prune-demo/moe] [--scratch runs/pretrain-tiny/moe] [--out FOLDER]

`moekit run recipes/prune-demo.yaml` makes the first: SmolLM2 turned into a MoE, of which experts and routers are
trained on text of five domains. `moekit run recipes/pretrain-tiny.yaml data=TEXT` makes the second: a MoE trained from
scratch on several domains, an hour on two cores.
A model that is not there is left out. Every method runs at 75 % and 50 % of the experts, decided from all of the text
and from each of some domains alone, random with five seeds, measured on unseen text; then the variants that single
claims are about, at a half and a quarter. Prints the rankings and, for each method, whether its trend holds, with the
figures. What was measured is kept in --out, which also gets the pages; an ended run goes on.

Papers: REAP arXiv:2510.13999, NAEE 2402.14800, SEER-MoE 2404.05089, DERN 2509.10377, UNCURL 2409.01483, STUN
2409.06211, EASY-EP 2504.06792, PreMoe 2505.17639.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from prune_trends import (
    EXTRAS,
    HALF,
    QUARTER,
    Case,
    Claim,
    about_dern,
    about_easy_ep,
    about_premoe,
    about_scores,
    about_stun,
    about_uncurl,
    how_experts_differ,
    of_one_origin,
)

from moekit.bench.pruning import (
    Entry,
    PruneBenchResult,
    PruneBenchSetting,
    Subject,
    bench_pruning,
    default_entries,
    take_tokens,
)
from moekit.bench.pruning.result import FILE
from moekit.checkpoint import Checkpoint
from moekit.data import load_text
from moekit.jobs.shared.inputs import load_tokenizer
from moekit.report import build as build_page
from moekit.report.sections.pruning import report


def open_case(name: str, folder: Path, texts: tuple[str, str | None], options: argparse.Namespace) -> Case:
    """Open a model, read its text."""
    tokenizer = load_tokenizer(str(folder))
    data, unseen = texts
    parts = ("train", "heldout") if unseen is None else (None, None)
    documents = load_text(data, split=parts[0])
    heldout = load_text(unseen or data, split=parts[1])
    domains = list(dict.fromkeys(d.domain for d in documents))
    chosen = options.task or domains[:: max(1, -(-len(domains) // options.tasks))]
    return Case(
        name,
        Subject(Checkpoint.open(folder), torch.float32, "cpu", tokenizer, data),
        take_tokens(documents, tokenizer, options.tokens),
        take_tokens(heldout, tokenizer, options.heldout_tokens),
        tuple(d for d in chosen if d in domains),
        options.out / name,
        options,
    )


def run(case: Case, entries: Sequence[Entry], keep: tuple[float, ...], tasks: tuple[str, ...]) -> PruneBenchResult:
    """One bench; results of both benches of a case lie in one folder."""
    setting = PruneBenchSetting(
        entries=tuple(entries),
        keep=keep,
        seeds=case.options.seeds,
        domains=tasks,
        seq_len=case.options.seq_len,
        window=case.options.seq_len,
        search_tokens=case.options.search_tokens,
    )
    return bench_pruning(case.subject, case.calibration, case.heldout, setting, case.folder / "work")


def print_rankings(result: PruneBenchResult) -> None:
    """All rankings, best first."""
    for ranking in result.rankings:
        print(
            f"\nkeep {ranking.keep:.0%}, decided from {ranking.calibration}, on {ranking.text} "
            f"({ranking.documents} documents); unchanged {ranking.unchanged:.3f}"
        )
        for place, row in enumerate(ranking.rows, 1):
            rise = "" if row.rise is None else f" [{row.rise.low:+.3f}, {row.rise.high:+.3f}]"
            share = "-" if row.removed is None else f"{row.removed.mean:.0%}"
            spread = "" if row.spread is None else f", spread over {row.seeds} seeds {row.spread:.3f}"
            print(
                f"{place:>3} {row.name:<24} {row.nll:.3f} {row.nll - ranking.unchanged:+.3f}{rise}, "
                f"{share} of random's rise avoided{spread}, output changed {row.reconstruction:.0%}"
            )
    for skipped in result.skipped:
        print(f"    {skipped.name} took no part ({skipped.calibration}): {skipped.reason}")


def study(case: Case) -> list[Claim]:
    """Rankings and claims of one model."""
    start = time.perf_counter()
    sizes = Checkpoint.open(case.subject.checkpoint.path).config
    tokens = [sum(len(d.ids) for d in text) for text in (case.calibration, case.heldout)]
    print(f"\n== {case.name}: {sizes.get('model_type')}, decided from {tokens[0]:,} tokens, unseen {tokens[1]:,}")
    print(f"do experts differ? {how_experts_differ(case)}", flush=True)
    result = run(case, default_entries(), (0.75, HALF), case.tasks)
    result.save(case.folder / FILE)
    build_page(report(result), case.folder)
    print_rankings(result)
    extra = run(case, EXTRAS, (HALF, QUARTER), ())
    extra.save(case.folder / f"variants-{FILE}")
    print_rankings(extra)
    claims = [
        *about_scores(result),
        *about_dern(extra),
        *about_uncurl(extra, of_one_origin(extra)),
        *about_stun(case, result, extra),
        *about_easy_ep(case, result),
        *about_premoe(case, result),
    ]
    print(f"\n{case.name}, trends ({time.perf_counter() - start:.0f} s):")
    for claim in claims:
        print(claim)
    return claims


def main() -> None:
    """Study the models that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/prune-demo/moe"), help="a converted MoE")
    parser.add_argument("--data", help="its calibration text (default: text/train.jsonl beside it)")
    parser.add_argument("--heldout", help="its unseen text (default: text/heldout.jsonl beside it)")
    parser.add_argument("--scratch", type=Path, default=Path("runs/pretrain-tiny/moe"), help="one made from scratch")
    parser.add_argument("--scratch-data", default="six-domains", help="its text, of which a part is kept")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--heldout-tokens", type=int, default=16384, help="unseen tokens, at most")
    parser.add_argument("--search-tokens", type=int, default=4096, help="tokens on which naee tries subsets")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a row and a window")
    parser.add_argument("--seeds", type=int, default=5, help="of random")
    parser.add_argument("--tasks", type=int, default=3, help="domains taken as tasks, at most")
    parser.add_argument("--task", action="append", help="one of them by name; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("runs/prune-ranking"))
    options = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    beside = options.model.parent / "text"
    texts = {
        "converted": (options.model, (options.data or f"{beside}/train.jsonl", options.heldout)),
        "from-scratch": (options.scratch, (options.scratch_data, None)),
    }
    if options.data is None and options.heldout is None:
        texts["converted"] = (options.model, (f"{beside}/train.jsonl", f"{beside}/heldout.jsonl"))
    claims = []
    for name, (folder, text) in texts.items():
        if (folder / "config.json").is_file():
            claims.append((name, study(open_case(name, folder, text, options))))
        else:
            print(f"\n== {name}: there is no model in {folder}; see the head of this file for how to make one")
    held = [claim.holds for claim in itertools.chain.from_iterable(found for _, found in claims)]
    print(f"\n{held.count(True)} trends hold, {held.count(False)} do not, {held.count(None)} say nothing here")


if __name__ == "__main__":
    main()
