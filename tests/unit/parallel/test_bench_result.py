from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.bench.dispatch.checks import exactness, load_of, own_bytes, rows_of
from moekit.bench.dispatch.result import (
    FILE,
    BenchResult,
    Bytes,
    EntryResult,
    Exactness,
    Ratio,
    Rows,
    Timing,
    paired_ratio,
)
from moekit.bench.dispatch.setting import BASELINE, DispatchBenchSetting, Entry, Job
from moekit.bench.dispatch.workload import Workload, make_layer
from moekit.report import build
from moekit.report.sections.dispatch import findings, headline, report, saved

OURS = Entry(peer="ours", variant="once-per-rank")
DROPS = Entry(peer="deepspeed", variant="cf=1")
ABSENT = Entry(peer="deepspeed", variant="no-drop")


def timing(total: tuple[float, ...], ratio: Ratio | None) -> Timing:
    return Timing(rate=2e8, forward=tuple(t / 2 for t in total), total=total, forward_ratio=ratio, total_ratio=ratio)


def result(*, alike: bool = True, shaped: bool = True) -> BenchResult:
    exact = Exactness(share=1, error=1e-7, largest=2, gradients={"down_proj": 1e-7, "hidden states": 3e-7})
    sent = {"calls": 5, "counted": (1000, 1000)}
    entries = (
        EntryResult(
            entry=BASELINE,
            exactness=exact,
            forward=Bytes(sent=(600, 400), **sent),
            total=Bytes(sent=(1100, 900), **sent),
            load=1.0,
            timings=(timing((200, 220, 210), None),),
        ),
        EntryResult(
            entry=OURS,
            exactness=exact,
            rows=Rows(counted=50, replayed=50 if alike else 51, alike=alike),
            forward=Bytes(sent=(350, 350), **sent),
            total=Bytes(sent=(700, 700), own=(690, 690), **sent),
            load=1.0,
            timings=(timing((150, 160, 155), Ratio(median=0.73, low=0.7, high=0.78)),),
        ),
        EntryResult(
            entry=DROPS,
            exactness=exact.model_copy(update={"share": 0.4}),
            forward=Bytes(sent=(300, 300), **sent),
            total=Bytes(sent=(600, 600), **sent),
            load=1.0,
            timings=(timing((200, 210, 205), Ratio(median=0.98, low=0.9, high=1.1)),),
        ),
        EntryResult(entry=ABSENT, skipped="not installed"),
    )
    return BenchResult(
        setting=DispatchBenchSetting(),
        source="one made-up layer",
        layers=(0,),
        shaped=shaped,
        rates=(2e8,),
        rounds=3,
        entries=entries,
        machine={"processor": "x", "cores": "2"},
        date="2026-01-01",
    )


def test_ratios_are_paired() -> None:
    # Every round is as slow as its neighbour is fast, but always twice the other's time.
    ratio = paired_ratio([2, 20, 200, 4], [1, 10, 100, 2])
    assert (ratio.median, ratio.low, ratio.high) == (2, 2, 2)
    assert not ratio.faster


def test_the_interval_holds_most_medians() -> None:
    draw = torch.Generator().manual_seed(0)
    hit = 0
    for seed in range(60):
        noise = torch.rand(25, generator=draw) - 0.5
        ratio = paired_ratio((0.9 + noise).tolist(), [1.0] * 25, seed)
        assert ratio.low <= ratio.median <= ratio.high
        hit += ratio.low <= 0.9 <= ratio.high
    assert hit >= 50
    assert paired_ratio([0.8, 0.81, 0.79, 0.8, 0.82], [1.0] * 5).faster


def test_a_result_is_read_back(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(result().model_dump_json())
    again = BenchResult.read(tmp_path)
    assert again == result()
    assert again.baseline is not None
    assert again.baseline.name == "transformers all_to_all"
    assert again.find("moekit once-per-rank").at(2e8).total_ms == 155  # type: ignore[union-attr]
    assert again.find("DeepSpeed no-drop").at(2e8) is None


def test_exactness_brings_all_ranks_together() -> None:
    answers = [
        {"tokens": 10, "exact": 10, "error": 0.5, "largest": 1.0, "gradients": {"down_proj": (9.0, 64.0)}},
        {"tokens": 30, "exact": 20, "error": 0.1, "largest": 4.0, "gradients": {"down_proj": (16.0, 36.0)}},
    ]
    found = exactness(answers)
    assert found.share == 0.75
    assert (found.error, found.largest) == (0.5, 4.0)
    assert found.gradients == {"down_proj": 0.5}
    assert found.worst_gradient == 0.5


@pytest.fixture
def work() -> Workload:
    """Four ranks with one token each and four experts, one a rank: rank 0's token wants experts 0 and 3, and so on."""
    made = make_layer(DispatchBenchSetting(tokens=1, hidden=8, experts=4, width=8, top_k=2))
    chosen = torch.tensor([[0, 3], [0, 1], [2, 3], [1, 2]])
    made.choices = {"": {0: (chosen, torch.full((4, 2), 0.5))}}
    return made


def job(work: Workload, entry: Entry) -> Job:
    return Job(setting=work.setting, layers=(0,), entries=(entry,), layouts={"pairs": {0: [0, 0, 2, 2]}})


def flat(rows: list[list[int]]) -> list[dict[str, Any]]:
    """What four ranks would say that they sent, the way back being the transpose."""
    back = [list(column) for column in zip(*rows, strict=True)]
    return [
        {
            "traffic": [
                {
                    "ranks": {
                        "rows": {
                            "forward dispatch": rows[rank],
                            "forward combine": back[rank],
                            "backward dispatch": back[rank],
                            "backward combine": rows[rank],
                        },
                        "bytes": {"forward dispatch": [8 * n for n in rows[rank]], "backward combine": [1] * 4},
                        "counts": [8] * 4,
                    }
                }
            ]
        }
        for rank in range(4)
    ]


def test_rows_are_held_against_the_replay(work: Workload) -> None:
    right = flat([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    found = rows_of(work, job(work, OURS), OURS, right)
    assert found == Rows(counted=8, replayed=8, alike=True)
    swapped = flat([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    assert rows_of(work, job(work, OURS), OURS, swapped) == Rows(counted=8, replayed=8, alike=False)
    right[2]["traffic"][0]["ranks"]["rows"]["backward combine"] = [0, 0, 1, 2]
    assert rows_of(work, job(work, OURS), OURS, right) == Rows(counted=8, replayed=8, alike=False)


def test_a_placement_changes_what_the_replay_says(work: Workload) -> None:
    placed = OURS.model_copy(update={"placement": "pairs"})
    # Experts 0 and 1 on rank 0, 2 and 3 on rank 2: one row for ranks 1 and 2, two for ranks 0 and 3.
    rows = flat([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0]])
    assert rows_of(work, job(work, placed), placed, rows) == Rows(counted=6, replayed=6, alike=True)
    assert load_of(work, job(work, placed), placed) == 2
    assert load_of(work, job(work, OURS), OURS) == 1


def test_rows_across_nodes_are_those_of_hierarchical(work: Workload) -> None:
    entry = Entry(peer="ours", variant="hierarchical")
    ways = ("forward dispatch", "forward combine", "backward dispatch", "backward combine")
    # Tokens of ranks 0 and 3 want both nodes, those of 1 and 2 only their own.
    sent = [[1, 1], [1, 0], [0, 1], [1, 1]]
    answers = [{"traffic": [{"nodes": {"rows": dict.fromkeys(ways, rows)}}]} for rows in sent]
    assert rows_of(work, job(work, entry), entry, answers) == Rows(counted=2, replayed=2, alike=True)
    answers[1]["traffic"][0]["nodes"]["rows"]["forward combine"] = [1, 1]
    assert rows_of(work, job(work, entry), entry, answers) == Rows(counted=2, replayed=2, alike=False)


def test_own_bytes_leave_out_what_stays_inside(work: Workload) -> None:
    answers = flat([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    # Out of each node: one row of 8 bytes, and 8 bytes of counts from each of 2 ranks to each of 2 others.
    assert own_bytes(answers, work.setting, ("forward",)) == (8 + 32, 8 + 32)
    assert own_bytes(answers, work.setting, ("forward", "backward")) == (44, 44)
    assert own_bytes([{"traffic": [{}]}] * 4, work.setting, ("forward",)) is None


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    found = result()
    assert saved(found.entries[1], found) == pytest.approx(-0.3)
    assert headline(found).text.startswith("moekit once-per-rank sends 30.0% fewer bytes")
    assert headline(found).status == "good"
    texts = [finding.text for finding in findings(found)]
    assert any("DeepSpeed cf=1 computes 40.0% of the tokens exactly" in text for text in texts)
    assert any("once-per-rank" in text and "0.730 [0.700, 0.780] at 200 Mbit/s" in text for text in texts)
    assert findings(found)[0].status == "good"
    page = build(report(found, "moekit bench ep"), tmp_path).read_text()
    for text in ("moekit once-per-rank", "DeepSpeed no-drop took no part: not installed", "200 Mbit/s", "namespace"):
        assert text in page


def test_rows_that_are_not_the_replays_are_a_failure() -> None:
    assert headline(result(alike=False)).status == "failure"


def test_a_modelled_link_is_called_so(tmp_path: Path) -> None:
    page = build(report(result(shaped=False)), tmp_path).read_text()
    assert "modelled" in page
    assert "arguments of collectives" in page


def test_the_headline_is_about_the_same_choices() -> None:
    found = result()
    ours = found.entries[1]
    assert ours.total is not None
    constrained = ours.model_copy(
        update={
            "entry": OURS.model_copy(update={"routing": "T = 3"}),
            "total": ours.total.model_copy(update={"sent": (100, 100)}),
        }
    )
    other = found.model_copy(update={"entries": (*found.entries, constrained)})
    assert headline(other).text.startswith("moekit once-per-rank sends 30.0% fewer bytes")
