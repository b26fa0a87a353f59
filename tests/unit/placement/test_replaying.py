"""Replay on hand-worked traces: rows, homes, nodes, copies, and the random yardstick."""

from __future__ import annotations

import pytest
import torch

from moekit.errors import BadConfig, BadData
from moekit.placement.replaying import replay, round_robin_home
from moekit.placement.result import expected_devices
from tests.unit.placement.samples import skewed_choices

# Experts 0,1 | 2,3 | 4,5 | 6,7 on devices 0..3, two nodes of two devices; 8 is no expert.
DEVICES = [0, 0, 1, 1, 2, 2, 3, 3]
TOKENS = torch.tensor([[0, 1, 2], [4, 5, 8], [8, 8, 8], [0, 7, 6]])


def test_by_hand() -> None:
    result = replay(TOKENS, DEVICES, 4, nodes=2)
    assert result.tokens == 4
    assert result.rows_once_per_expert == 3 + 2 + 0 + 3
    assert result.rows_once_per_device == 2 + 1 + 0 + 2
    assert result.rows_once_per_node == 1 + 1 + 0 + 2
    assert result.single == 3
    assert result.load_D.tolist() == [3, 1, 2, 2]
    assert result.rows_D.tolist() == [2, 1, 1, 1]
    assert result.max_over_mean == 3 / 2
    assert result.rows_per_token == 5 / 4
    assert result.saved == 1 - 5 / 8
    assert result.kept == (8 - 5) / (8 - 3)
    assert result.remote_per_device is None
    assert result.device_rows_DD is None


def test_homes_by_hand() -> None:
    """Homes 0, 3, 1, 1: of the first token's rows one stays; token 1 lives beside its device, token 3 in node 0."""
    result = replay(TOKENS, DEVICES, 4, torch.tensor([0, 3, 1, 1]), nodes=2)
    assert result.device_rows_DD.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert result.expert_rows_DD.tolist() == [[2, 1, 0, 0], [1, 0, 0, 2], [0, 0, 0, 0], [0, 0, 2, 0]]
    assert (result.remote_per_expert, result.remote_per_device) == (6, 4)
    assert (result.across_per_expert, result.across_per_device, result.across_per_node) == (2, 1, 1)


def test_once_per_node_lands_on_the_senders_place_and_goes_on_inside() -> None:
    """A token at home on device 0 with experts on 1, 2 and 3: one row crosses, to device 2, and goes on to 3."""
    result = replay(torch.tensor([[2, 4, 6]]), DEVICES, 4, torch.tensor([0]), nodes=2)
    assert result.device_rows_DD.tolist()[0] == [0, 1, 1, 1]
    assert result.node_rows_DD.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert (result.across_per_device, result.across_per_node) == (2, 1)


def test_landing_device_need_not_be_a_destination() -> None:
    """Home 1, expert on device 2 only: the row lands on 3 (second place of node 1) and is handed to 2."""
    result = replay(torch.tensor([[4, 8]]), DEVICES, 4, torch.tensor([1]), nodes=2)
    assert result.node_rows_DD.nonzero().tolist() == [[1, 3], [3, 2]]


def test_nodes_of_different_size() -> None:
    """Three devices in two nodes, {0, 1} and {2}: a sender in second place lands on the only one."""
    result = replay(torch.tensor([[2]]), [0, 1, 2], 3, torch.tensor([1]), nodes=2)
    assert result.node_rows_DD.nonzero().tolist() == [[1, 2]]


def test_round_robin() -> None:
    documents = torch.tensor([0, 0, 1, 2, 2, 4])
    assert round_robin_home(6, 2, documents).tolist() == [0, 0, 1, 0, 0, 0]
    assert round_robin_home(5, 3).tolist() == [0, 1, 2, 0, 1]
    by_documents = replay(TOKENS, DEVICES, 4, "round-robin", document_N=torch.tensor([0, 3, 1, 1]), nodes=2)
    given = replay(TOKENS, DEVICES, 4, torch.tensor([0, 3, 1, 1]), nodes=2)
    assert torch.equal(by_documents.device_rows_DD, given.device_rows_DD)


def test_copies() -> None:
    """Expert 0 on devices 0 and 1, expert 1 on 2, expert 2 on 1 and 2. Without homes copies take turns by token, but
    for a device that the token visits anyway, or that holds both of its choices."""
    held = [[0, 1], [2], [1, 2]]
    tokens = torch.tensor([[0, 1], [0, 1], [0, 2], [3, 3]])
    free = replay(tokens, held, 3)
    # token 0: 0->device 0, 1->2; token 1: 0->device 1, 1->2; token 2: both->device 1, which holds both
    assert free.rows_D.tolist() == [1, 2, 2]
    assert free.rows_once_per_device == 5
    home = replay(tokens, held, 3, torch.tensor([1, 0, 1, 2]))
    # token 2 finds copies of both on its own device
    assert home.device_rows_DD.tolist() == [[1, 0, 1], [0, 2, 1], [0, 0, 0]]
    assert home.rows_once_per_device == 5


def test_a_copy_where_the_token_goes_anyway_saves_a_row() -> None:
    """Expert 0 is on device 3 alone; a copy of expert 1 lies there, too, and another on the token's own device."""
    result = replay(torch.tensor([[1, 0]] * 3), [[3], [0, 3]], 4, torch.tensor([0, 1, 2]), nodes=2)
    assert result.rows_D.tolist() == [0, 0, 0, 3]
    assert result.load_D.tolist() == [0, 0, 0, 6]


def test_copy_in_the_own_node_goes_before_others() -> None:
    result = replay(torch.tensor([[0]] * 4), [[0, 3]], 4, torch.tensor([2, 2, 1, 0]), nodes=2)
    assert result.device_rows_DD.nonzero().tolist() == [[0, 0], [1, 0], [2, 3]]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = skewed_choices(101, 8, 3)
    held = [[0, 1], [1], [2], [3], [0], [1, 2, 3], [2], [3]]
    whole = replay(chosen, held, 4, "round-robin", nodes=2)
    monkeypatch.setattr("moekit.placement.replaying.CHUNK_ENTRIES", 50)
    parts = replay(chosen, held, 4, "round-robin", nodes=2)
    assert parts.as_dict() == whole.as_dict()
    assert torch.equal(parts.node_rows_DD, whole.node_rows_DD)


def test_no_tokens() -> None:
    result = replay(torch.zeros(0, 2, dtype=torch.int64), DEVICES, 4, "round-robin")
    assert (result.tokens, result.rows_once_per_device, result.rows_per_token) == (0, 0, 0.0)
    assert (result.saved, result.kept, result.max_over_mean) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_small_integers(dtype: torch.dtype) -> None:
    assert replay(TOKENS.to(dtype), DEVICES, 4).as_dict() == replay(TOKENS, DEVICES, 4).as_dict()


def test_more_devices_than_a_machine_word_has_bits() -> None:
    chosen = skewed_choices(200, 512, 8)
    result = replay(chosen, torch.arange(512), 512, "round-robin", nodes=64)
    assert result.rows_once_per_device == result.rows_once_per_expert == 1600


def test_three_hundred_devices_in_one_node() -> None:
    """More devices in a node than a byte counts."""
    chosen = torch.arange(300).reshape(1, 300)
    assert replay(chosen, torch.arange(300), 300).rows_once_per_node == 1


@pytest.mark.parametrize(
    ("experts", "devices", "top_k", "expected"),
    [(8, 2, 2, 1.571), (8, 4, 2, 1.857), (60, 2, 4, 1.888), (60, 4, 4, 2.778), (64, 8, 8, 5.433)],
)
def test_random_yardstick(experts: int, devices: int, top_k: int, expected: float) -> None:
    assert expected_devices(experts, devices, top_k) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("experts", "devices", "top_k", "ratio"),
    [(8, 4, 2, 0.929), (16, 4, 4, 0.728), (64, 8, 6, 0.756), (128, 8, 8, 0.667), (256, 32, 8, 0.908)],
)
def test_ratio_to_once_per_expert(experts: int, devices: int, top_k: int, ratio: float) -> None:
    assert expected_devices(experts, devices, top_k) / top_k == pytest.approx(ratio, abs=5e-4)


def test_yardstick_is_what_random_choices_send() -> None:
    g = torch.Generator().manual_seed(0)
    chosen = torch.rand(20000, 11, generator=g).topk(3).indices
    groups = [0] * 5 + [1] * 4 + [2] * 2
    assert replay(chosen, groups, 3).rows_per_token == pytest.approx(
        expected_devices(11, 3, 3, sizes=[5, 4, 2]), abs=0.02
    )


def test_refusals() -> None:
    with pytest.raises(BadData, match=r"index 9 is outside 0\.\.8"):
        replay(torch.tensor([[9]]), DEVICES, 4)
    with pytest.raises(BadData, match="index -1"):
        replay(torch.tensor([[-1]]), DEVICES, 4)
    with pytest.raises(BadData, match=r"\[N, K\]"):
        replay(torch.tensor([1, 2]), DEVICES, 4)
    with pytest.raises(BadConfig, match="expert 6"):
        replay(TOKENS, DEVICES, 3)
    with pytest.raises(BadConfig, match="expert 1"):
        replay(TOKENS, [[0], [], *DEVICES[2:]], 4)
    with pytest.raises(BadData, match="homes"):
        replay(TOKENS, DEVICES, 4, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(BadData, match="homes"):
        replay(TOKENS, DEVICES, 4, torch.tensor([0, 1]))
    with pytest.raises(BadConfig, match="cannot be added"):
        replay(TOKENS, DEVICES, 4) + replay(TOKENS, DEVICES, 4, nodes=2)
    with pytest.raises(BadConfig, match="no token can choose"):
        expected_devices(4, 2, 5)
