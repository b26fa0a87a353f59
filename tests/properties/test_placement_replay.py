"""Replay equals a plain loop over tokens on any trace: empty choices, uneven blocks, nodes, homes and copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moekit.placement.paired import rows_per_document
from moekit.placement.replaying import replay
from moekit.placement.topology import node_of_devices


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int, int, list[int]]:
    """Tokens with choices (some none), device of each expert (any, even unused ones), D, nodes, homes."""
    devices = draw(st.integers(1, 6))
    nodes = draw(st.integers(1, devices))
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(4, experts)))
    placed = draw(st.lists(st.integers(0, devices - 1), min_size=experts, max_size=experts))
    token = st.lists(st.integers(0, experts - 1), max_size=top_k, unique=True).map(
        lambda chosen: chosen + [experts] * (top_k - len(chosen))
    )
    tokens = draw(st.lists(token, min_size=1, max_size=25))
    homes = draw(st.lists(st.integers(0, devices - 1), min_size=len(tokens), max_size=len(tokens)))
    return tokens, placed, devices, nodes, homes


def hand_on(home: int, wanted: set[int], node_of: list[int]) -> list[tuple[int, int]]:
    """Rows of one token sent once per node: (from, to), own device included."""
    rows = []
    for node in sorted({node_of[d] for d in wanted}):
        inside = [d for d in range(len(node_of)) if node_of[d] == node]
        if node_of[home] == node:
            rows += [(home, d) for d in wanted if node_of[d] == node]
            continue
        own = [d for d in range(len(node_of)) if node_of[d] == node_of[home]].index(home)
        landing = inside[own % len(inside)]
        rows.append((home, landing))
        rows += [(landing, d) for d in wanted if node_of[d] == node and d != landing]
    return rows


@settings(deadline=None, max_examples=200)
@given(traces())
def test_replay_equals_a_loop(case: tuple[list[list[int]], list[int], int, int, list[int]]) -> None:
    tokens, placed, devices, nodes, homes = case
    node_of = node_of_devices(devices, nodes)
    per_expert = per_device = per_node = 0
    load, received = [0] * devices, [0] * devices
    expert_rows = [[0] * devices for _ in range(devices)]
    device_rows = [[0] * devices for _ in range(devices)]
    node_rows = [[0] * devices for _ in range(devices)]
    for token, home in zip(tokens, homes, strict=True):
        chosen = [placed[e] for e in token if e < len(placed)]
        per_expert += len(chosen)
        per_device += len(set(chosen))
        per_node += len({node_of[d] for d in chosen})
        for device in chosen:
            load[device] += 1
            expert_rows[home][device] += 1
        for device in set(chosen):
            received[device] += 1
            device_rows[home][device] += 1
        for source, target in hand_on(home, set(chosen), node_of):
            node_rows[source][target] += 1
    result = replay(torch.tensor(tokens), placed, devices, torch.tensor(homes), nodes=nodes)
    assert result.rows_once_per_expert == per_expert
    assert result.rows_once_per_device == per_device
    assert result.rows_once_per_node == per_node
    assert result.load_D.tolist() == load
    assert result.rows_D.tolist() == received
    assert result.expert_rows_DD.tolist() == expert_rows
    assert result.device_rows_DD.tolist() == device_rows
    assert result.node_rows_DD.tolist() == node_rows
    assert result.remote_per_expert == sum(expert_rows[i][j] for i in range(devices) for j in range(devices) if i != j)
    assert result.remote_per_device == sum(device_rows[i][j] for i in range(devices) for j in range(devices) if i != j)
    touched = [{node_of[placed[e]] for e in token if e < len(placed)} for token in tokens]
    assert result.across_per_node == sum(len(t - {node_of[h]}) for t, h in zip(touched, homes, strict=True))
    without = replay(torch.tensor(tokens), placed, devices, nodes=nodes)
    assert without.rows_once_per_device == per_device


@pytest.mark.full
@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(traces(), st.randoms(use_true_random=False))
def test_renaming_experts_or_devices_changes_nothing(case, random) -> None:
    tokens, placed, devices, _, _ = case
    experts = len(placed)
    rename = list(range(experts))
    random.shuffle(rename)
    moved = [[rename[e] if e < experts else e for e in token] for token in tokens]
    moved_placed = [placed[rename.index(e)] for e in range(experts)]
    other = list(range(devices))
    random.shuffle(other)
    first = replay(torch.tensor(tokens), placed, devices)
    assert replay(torch.tensor(moved), moved_placed, devices).as_dict() == first.as_dict()
    renamed = replay(torch.tensor(tokens), [other[d] for d in placed], devices)
    assert renamed.rows_once_per_device == first.rows_once_per_device
    assert sorted(renamed.load_D.tolist()) == sorted(first.load_D.tolist())


@pytest.mark.full
@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(traces(), st.data())
def test_rows_of_documents_add_up(case, data) -> None:
    tokens, placed, devices, _, _ = case
    documents = data.draw(st.lists(st.integers(-1, 3), min_size=len(tokens), max_size=len(tokens)))
    rows, counts = rows_per_document(torch.tensor(tokens), placed, torch.tensor(documents), devices, None)
    for document in range(max(documents) + 1):
        own = [t for t, d in zip(tokens, documents, strict=True) if d == document]
        assert int(counts[document]) == len(own)
        assert int(rows[document]) == sum(len({placed[e] for e in t if e < len(placed)}) for t in own)


@pytest.mark.full
@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(traces(), st.data())
def test_copies_are_used_by_the_stated_rule(case, data) -> None:
    tokens, placed, devices, nodes, homes = case
    node_of = node_of_devices(devices, nodes)
    held = [sorted({d, *data.draw(st.lists(st.integers(0, devices - 1), max_size=2))}) for d in placed]
    load = [0] * devices
    rows = 0
    for number, (token, home) in enumerate(zip(tokens, homes, strict=True)):
        chosen = [held[e] for e in token if e < len(placed)]
        used = {copies[0] for copies in chosen if len(copies) == 1}
        several = [copies for copies in chosen if len(copies) > 1]
        for copies in chosen:
            levels = (used, {home}, {d for d in copies if node_of[d] == node_of[home]}, set(copies))
            best = next(level for level in ([d for d in copies if d in level] for level in levels) if level)
            covers = [sum(d in other for other in several) for d in best]
            best = [d for d, n in zip(best, covers, strict=True) if n == max(covers)]
            device = copies[0] if len(copies) == 1 else best[number % len(best)]
            load[device] += 1
            used.add(device)
        rows += len(used)
    result = replay(torch.tensor(tokens), held, devices, torch.tensor(homes), nodes=nodes)
    assert result.load_D.tolist() == load
    assert result.rows_once_per_device == rows
    # What is paired over documents is what is replayed, copies and nodes included.
    document = torch.arange(len(tokens)) % 3
    by_document, _ = rows_per_document(torch.tensor(tokens), held, document, devices, torch.tensor(homes), nodes=nodes)
    assert int(by_document.sum()) == rows


@pytest.mark.full
@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(traces())
def test_many_devices_are_counted_like_few(case) -> None:
    """Sorting a token's choices finds what the token x device table finds."""
    tokens, placed, devices, nodes, homes = case
    with pytest.MonkeyPatch.context() as patch:
        table = replay(torch.tensor(tokens), placed, devices, torch.tensor(homes), nodes=nodes)
        patch.setattr("moekit.placement.replaying.DENSE_DEVICES", 0)
        sorted_ = replay(torch.tensor(tokens), placed, devices, torch.tensor(homes), nodes=nodes)
        away = replay(torch.tensor(tokens), placed, devices, nodes=nodes)
    assert sorted_.as_dict() == table.as_dict()
    for name in ("device_rows_DD", "node_rows_DD", "rows_D"):
        assert torch.equal(getattr(sorted_, name), getattr(table, name))
    assert away.device_rows_DD is None
    assert away.rows_once_per_node == table.rows_once_per_node
