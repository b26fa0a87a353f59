"""Is it exact, are rows those of the replay: what the ranks answered, held against what must be.

Legend: R ranks, E experts, N tokens, D devices (the ranks, as a replay calls them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from moekit.bench.dispatch.result import Exactness, Rows
from moekit.bench.dispatch.setting import DispatchBenchSetting, Entry, Job
from moekit.bench.dispatch.workload import Workload
from moekit.parallel.layout import ExpertLayout
from moekit.placement.replaying import replay
from moekit.placement.result import ReplayResult


def exactness(answers: Sequence[Any]) -> Exactness:
    """From what each rank says of its tokens and its experts."""
    sums: dict[str, list[float]] = {}
    for answer in answers:
        for name, (error, norm) in answer["gradients"].items():
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += error
            pair[1] += norm
    return Exactness(
        share=sum(a["exact"] for a in answers) / sum(a["tokens"] for a in answers),
        error=max(a["error"] for a in answers),
        largest=max(a["largest"] for a in answers),
        gradients={name: math.sqrt(error / norm) if norm else error for name, (error, norm) in sums.items()},
    )


def layout_of(job: Job, entry: Entry, layer: int) -> list[int]:
    """Rank of each expert of a layer, as an entry has it."""
    if entry.placement:
        return job.layouts[entry.placement][layer]
    owner: list[int] = ExpertLayout.contiguous(job.setting.experts, job.setting.ranks).rank_E[:-1].tolist()
    return owner


def replays(work: Workload, job: Job, entry: Entry) -> list[ReplayResult]:
    """The replay of an entry's choices, layer by layer; tokens live where the bench puts them."""
    setting = job.setting
    home_N = torch.arange(setting.ranks * setting.tokens) // setting.tokens
    return [
        replay(
            work.choices[entry.routing][layer][0],
            layout_of(job, entry, layer),
            setting.ranks,
            nodes=setting.nodes,
            home=home_N,
        )
        for layer in work.layers
    ]


def load_of(work: Workload, job: Job, entry: Entry) -> float:
    """Choices computed by the busiest rank over the mean rank's, mean over layers."""
    found = replays(work, job, entry)
    return sum(result.max_over_mean for result in found) / len(found)


def rows_of(work: Workload, job: Job, entry: Entry, answers: Sequence[Any]) -> Rows | None:
    """Rows of the collectives against the replay; None for what has no counters or sends no rows of its own."""
    dispatch = entry.variant.partition(" ")[0]
    counters = {"once-per-expert": _per_expert, "once-per-rank": _per_rank, "hierarchical": _per_node}
    if entry.peer != "ours" or dispatch not in counters:
        return None
    counted = replayed = 0
    alike = True
    for place, result in enumerate(replays(work, job, entry)):
        traffic = [answer["traffic"][place] for answer in answers]
        found, expected, same = counters[dispatch](traffic, result, job.setting)
        counted, replayed, alike = counted + found, replayed + expected, alike and same
    return Rows(counted=counted, replayed=replayed, alike=alike)


_WAYS = ("forward dispatch", "forward combine", "backward dispatch", "backward combine")


def _matrix(traffic: Sequence[Any], link: str, way: str) -> torch.Tensor:
    """Rows by sender and receiver; what comes back is turned round, so that all four ways read alike."""
    rows_RR = torch.tensor([part[link]["rows"].get(way, []) for part in traffic])
    return rows_RR.T if way in {"forward combine", "backward dispatch"} else rows_RR


def _flat(traffic: Sequence[Any], expected_DD: torch.Tensor) -> tuple[int, int, bool]:
    found = [_matrix(traffic, "ranks", way) for way in _WAYS]
    return int(found[0].sum()), int(expected_DD.sum()), all(torch.equal(rows, expected_DD) for rows in found)


def _per_expert(traffic: Sequence[Any], result: ReplayResult, setting: DispatchBenchSetting) -> tuple[int, int, bool]:
    assert result.expert_rows_DD is not None
    return _flat(traffic, result.expert_rows_DD)


def _per_rank(traffic: Sequence[Any], result: ReplayResult, setting: DispatchBenchSetting) -> tuple[int, int, bool]:
    assert result.device_rows_DD is not None
    return _flat(traffic, result.device_rows_DD)


def _per_node(traffic: Sequence[Any], result: ReplayResult, setting: DispatchBenchSetting) -> tuple[int, int, bool]:
    across = []
    for way in _WAYS:
        rows_RM = torch.tensor([part["nodes"]["rows"].get(way, []) for part in traffic])
        own_R = torch.arange(setting.ranks) // setting.per_node
        across.append(int(rows_RM.sum() - rows_RM.gather(1, own_R[:, None]).sum()))
    expected = result.across_per_node
    assert expected is not None
    return across[0], expected, all(rows == expected for rows in across)


def own_bytes(answers: Sequence[Any], setting: DispatchBenchSetting, passes: Sequence[str]) -> tuple[int, ...] | None:
    """Bytes across nodes by the dispatchers' own counters, for each node."""
    if not any(answer["traffic"][0] for answer in answers):
        return None
    sums = [0] * setting.nodes
    for rank, answer in enumerate(answers):
        node = rank // setting.per_node
        for layer in answer["traffic"]:
            for link, counters in layer.items():
                lists = [n for way, n in counters["bytes"].items() if way.split()[0] in passes]
                for values in [*lists, counters["counts"]]:
                    sums[node] += _across(values, link, node, setting)
    return tuple(sums)


def _across(values: Sequence[int], link: str, node: int, setting: DispatchBenchSetting) -> int:
    if link == "nodes":
        return sum(n for place, n in enumerate(values) if place != node)
    if len(values) == setting.ranks:
        return sum(n for rank, n in enumerate(values) if rank // setting.per_node != node)
    return 0  # inside a node
