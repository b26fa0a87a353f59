"""What a trace would have sent under a placement: exact counts, from the choices alone.

Three ways to send a token's hidden state to the experts it chose:

- *once per expert* (MegaBlocks, transformers): a row for every valid choice;
- *once per device* (DeepEP, the zero-redundancy all-to-all): a row for every distinct device among them;
- *once per node*: across nodes a row for every distinct node, which lands on the device with the sender's place in
  that node and is handed on from there.

A choice with index E is no expert and sends nothing. Where a token lives on a device (its home), rows to that device
never travel and are counted apart.

Legend: N tokens, K choices, E experts, D devices, M nodes, R copies of an expert, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from moekit.errors import BadConfig, BadData
from moekit.placement.result import ReplayResult
from moekit.placement.sparse_rows import count_sparse
from moekit.placement.topology import node_of_devices

# Entries that a chunk's tables may hold.
CHUNK_ENTRIES = 8_000_000
# Above so many devices distinct devices are found by sorting a token's choices, below in a token x device table.
DENSE_DEVICES = 32

Home = torch.Tensor | Literal["round-robin"] | None
Devices = Sequence[int] | Sequence[Sequence[int]] | torch.Tensor


def round_robin_home(tokens: int, devices: int, document_N: torch.Tensor | None = None) -> torch.Tensor:
    """Home device of each token: documents dealt out in turn, or single tokens where no documents are known, [N]."""
    numbers_N = torch.arange(tokens) if document_N is None else document_N.to("cpu", torch.int64)
    return numbers_N % devices


def holders(device_of_E: Devices, devices: int) -> torch.Tensor:
    """Devices of each expert, [E, R], filled up with -1: one column unless experts are replicated.

    Raises:
        BadConfig: a device outside 0..D-1, or an expert on none or twice on one.
    """
    rows: list[Any] = device_of_E.tolist() if isinstance(device_of_E, torch.Tensor) else list(device_of_E)
    copies = [[int(d) for d in row] if isinstance(row, Sequence) else [int(row)] for row in rows]
    for expert, held in enumerate(copies):
        if not held or len(set(held)) != len(held) or min(held) < 0 or max(held) >= devices:
            raise BadConfig(
                f"devices {held} of this expert are not distinct devices of 0..{devices - 1}",
                expert=expert,
                hint="the placement was made for another number of devices",
            )
    width = max((len(held) for held in copies), default=1)
    return torch.tensor([held + [-1] * (width - len(held)) for held in copies], dtype=torch.int64)


def choose_copy(
    indices_NK: torch.Tensor, holder_ER: torch.Tensor, devices: int, nodes: int, home_N: torch.Tensor | None, start: int
) -> torch.Tensor:
    """Device that serves each choice, [N, K]; D where there is no expert.

    A choice with copies goes, in this order, to a device that the token visits anyway, to the token's own device, to
    one in its node, to any holder; among equals to the one that holds most of the token's choices with copies, then in
    turn by token number. Choices are settled in the order of a token's choices, those with a single holder first.

    Args:
        indices_NK: choices.
        holder_ER: from `holders`.
        devices: D.
        nodes: M.
        home_N: home device of each token, None if unknown.
        start: number of the first token, so that chunks take turns as the whole would.
    """
    none_1R = torch.full((1, holder_ER.shape[1]), devices, dtype=torch.int64)
    held_NKR = torch.cat([holder_ER.masked_fill(holder_ER < 0, devices), none_1R])[indices_NK]
    device_NK = held_NKR[..., 0].clone()
    if holder_ER.shape[1] == 1:
        return device_NK
    open_NK = (held_NKR < devices).sum(dim=-1) > 1
    # Device D stands for "no holder" in both tables and is never a candidate.
    visits_ND = torch.zeros(len(indices_NK), devices + 1, dtype=torch.bool)
    visits_ND.scatter_(1, device_NK.masked_fill(open_NK, devices), True)
    covers_ND = torch.zeros(len(indices_NK), devices + 1, dtype=torch.int16)
    wanted_NKR = held_NKR.masked_fill(~open_NK[..., None], devices).flatten(1)
    covers_ND.scatter_add_(1, wanted_NKR, torch.ones_like(wanted_NKR, dtype=torch.int16))
    turn_N = torch.arange(len(indices_NK)) + start
    for k in range(indices_NK.shape[1]):
        held_NR = held_NKR[:, k]
        chosen_N = _settle(
            held_NR, held_NR < devices, visits_ND, covers_ND, _near(held_NR, home_N, devices, nodes), turn_N
        )
        device_NK[:, k] = torch.where(open_NK[:, k], chosen_N, device_NK[:, k])
        visits_ND.scatter_(1, device_NK[:, k : k + 1], True)
    return device_NK


def _near(
    held_NR: torch.Tensor, home_N: torch.Tensor | None, devices: int, nodes: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which holders stand in the token's node, and which are its own device; None where homes are unknown."""
    if home_N is None:
        return None
    node_D = torch.tensor([*node_of_devices(devices, nodes), -1])
    return node_D[held_NR] == node_D[home_N][:, None], held_NR == home_N[:, None]


def _settle(
    held_NR: torch.Tensor,
    holds_NR: torch.Tensor,
    visits_ND: torch.Tensor,
    covers_ND: torch.Tensor,
    near: tuple[torch.Tensor, torch.Tensor] | None,
    turn_N: torch.Tensor,
) -> torch.Tensor:
    """The holder of one choice of every token, [N], by the order that `choose_copy` states."""
    candidate_NR = holds_NR
    for better_NR in (*(near or ()), visits_ND.gather(1, held_NR)):
        better_NR = better_NR & holds_NR
        candidate_NR = torch.where(better_NR.any(dim=1, keepdim=True), better_NR, candidate_NR)
    cover_NR = covers_ND.gather(1, held_NR).masked_fill(~candidate_NR, -1)
    candidate_NR = candidate_NR & (cover_NR == cover_NR.amax(dim=1, keepdim=True))
    turn_N = turn_N % candidate_NR.sum(dim=1).clamp(min=1)
    # The candidate that as many come before as its turn says.
    pick_N = (candidate_NR & (candidate_NR.cumsum(1) == turn_N[:, None] + 1)).long().argmax(1)
    return held_NR.gather(1, pick_N[:, None])[:, 0]


def check_choices(indices_NK: torch.Tensor, experts: int) -> torch.Tensor:
    """Choices as int64 on the CPU.

    Raises:
        BadData: not [N, K], or outside 0..E.
    """
    if indices_NK.dim() != 2:
        raise BadData(f"choices must be [N, K], not {list(indices_NK.shape)}")
    chosen_NK = indices_NK.detach().to("cpu", torch.int64)
    if chosen_NK.numel() and (int(chosen_NK.min()) < 0 or int(chosen_NK.max()) > experts):
        bad = int(chosen_NK.min()) if int(chosen_NK.min()) < 0 else int(chosen_NK.max())
        raise BadData(f"expert index {bad} is outside 0..{experts}", hint="trace and placement are of different models")
    return chosen_NK


def resolve_home(home: Home, tokens: int, devices: int, document_N: torch.Tensor | None) -> torch.Tensor | None:
    """Home device of each token [N], as `replay` takes it; None where homes are not told apart.

    Raises:
        BadData: homes that are no devices, or not one per token.
    """
    if home is None:
        return None
    if isinstance(home, str):
        return round_robin_home(tokens, devices, document_N)
    home_N = home.detach().to("cpu", torch.int64)
    if home_N.shape != (tokens,) or (tokens and not 0 <= int(home_N.min()) <= int(home_N.max()) < devices):
        raise BadData(f"homes must be [{tokens}] device numbers of 0..{devices - 1}")
    return home_N


def presence(device_NK: torch.Tensor, devices: int) -> torch.Tensor:
    """Whether a token touches each device, [N, D]; device D (no expert) is dropped."""
    table_ND = torch.zeros(len(device_NK), devices + 1, dtype=torch.bool)
    return table_ND.scatter_(1, device_NK, True)[:, :devices]


def _traffic(weight_ND: torch.Tensor, home_N: torch.Tensor, devices: int) -> torch.Tensor:
    """Rows from each home to each device, [D, D]."""
    rows_DD = torch.zeros(devices, devices, dtype=torch.int64)
    return rows_DD.index_add_(0, home_N, weight_ND.long())


def _by_node(present_ND: torch.Tensor, node_D: torch.Tensor, nodes: int) -> torch.Tensor:
    """Whether a token touches each node, [N, M]."""
    table_NM = torch.zeros(len(present_ND), nodes, dtype=torch.int16)
    return table_NM.index_add_(1, node_D, present_ND.to(torch.int16)) > 0


def _hierarchical(
    present_ND: torch.Tensor, node_NM: torch.Tensor, home_N: torch.Tensor, node_D: torch.Tensor
) -> torch.Tensor:
    """Rows of the once-per-node way: across to the same place in the other node, then on inside it, [D, D]."""
    devices, nodes = len(node_D), node_NM.shape[1]
    first_M = torch.searchsorted(node_D, torch.arange(nodes))
    size_M = torch.bincount(node_D, minlength=nodes)
    rows_DD = torch.zeros(devices, devices, dtype=torch.int64)
    place_N = home_N - first_M[node_D[home_N]]
    for node in range(nodes):
        landing_N = torch.where(node_D[home_N] == node, home_N, first_M[node] + place_N % size_M[node])
        touched_N = node_NM[:, node]
        across_N = touched_N & (landing_N != home_N)
        pairs_N = home_N[across_N] * devices + landing_N[across_N]
        rows_DD += torch.bincount(pairs_N, minlength=devices * devices).view(devices, devices)
        inside_ND = present_ND & (node_D == node)
        # A row that is consumed where it landed is not sent again; at home it never travelled at all.
        inside_ND[torch.arange(len(landing_N)), landing_N] &= landing_N == home_N
        rows_DD += _traffic(inside_ND, landing_N, devices)
    return rows_DD


def _count(
    device_NK: torch.Tensor, home_N: torch.Tensor | None, node_D: torch.Tensor, nodes: int
) -> tuple[int, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Rows once per node, rows each device receives, and with homes rows once per device and once per node [D, D]."""
    devices = len(node_D)
    if devices > DENSE_DEVICES:
        return count_sparse(device_NK, home_N, node_D, nodes)
    present_ND = presence(device_NK, devices)
    node_NM = _by_node(present_ND, node_D, nodes)
    device_DD = node_DD = None
    if home_N is not None:
        device_DD = _traffic(present_ND, home_N, devices)
        node_DD = _hierarchical(present_ND, node_NM, home_N, node_D)
    return int(node_NM.sum()), present_ND.sum(dim=0), device_DD, node_DD


def _replay_chunk(
    indices_NK: torch.Tensor,
    holder_ER: torch.Tensor,
    devices: int,
    nodes: int,
    home_N: torch.Tensor | None,
    start: int,
) -> ReplayResult:
    device_NK = choose_copy(indices_NK, holder_ER, devices, nodes, home_N, start)
    load_D = torch.bincount(device_NK.flatten(), minlength=devices + 1)[:devices]
    expert_DD = None
    if home_N is not None:
        pairs_NK = home_N[:, None] * (devices + 1) + device_NK
        table = torch.bincount(pairs_NK.flatten(), minlength=devices * (devices + 1))
        expert_DD = table.view(devices, devices + 1)[:, :devices].clone()
    node_D = torch.tensor(node_of_devices(devices, nodes))
    once_per_node, rows_D, device_DD, node_DD = _count(device_NK, home_N, node_D, nodes)
    return ReplayResult(
        tokens=len(indices_NK),
        devices=devices,
        nodes=nodes,
        rows_once_per_expert=int(load_D.sum()),
        rows_once_per_device=int(rows_D.sum()),
        rows_once_per_node=once_per_node,
        single=int((device_NK < devices).any(dim=1).sum()),
        load_D=load_D,
        rows_D=rows_D,
        expert_rows_DD=expert_DD,
        device_rows_DD=device_DD,
        node_rows_DD=node_DD,
    )


def replay(
    indices_NK: torch.Tensor,
    device_of_E: Devices,
    devices: int,
    home: Home = None,
    *,
    nodes: int = 1,
    document_N: torch.Tensor | None = None,
) -> ReplayResult:
    """Count the rows that a trace sends under a placement of one layer.

    Args:
        indices_NK: experts that each token chose, E for none; any integer dtype.
        device_of_E: device of each expert, or all devices that hold a copy.
        devices: D.
        home: device of each token [N], or "round-robin" over documents (single tokens without `document_N`); None
            leaves apart what stays at home.
        nodes: M; devices are numbered node by node.
        document_N: document of each token, for the round-robin.

    Returns:
        Exact counts.

    Raises:
        BadData: choices outside 0..E, or homes that are no devices.
        BadConfig: an expert on no device of 0..D-1.
    """
    holder_ER = holders(device_of_E, devices)
    chosen_NK = check_choices(indices_NK, len(holder_ER))
    home_N = resolve_home(home, len(chosen_NK), devices, document_N)
    width = 4 * max(1, chosen_NK.shape[1]) * holder_ER.shape[1]
    tables = 2 * devices if holder_ER.shape[1] > 1 else min(devices, DENSE_DEVICES)
    step = max(1, CHUNK_ENTRIES // (width + tables))
    total: ReplayResult | None = None
    for start in range(0, max(len(chosen_NK), 1), step):
        part = slice(start, start + step)
        home_part = None if home_N is None else home_N[part]
        result = _replay_chunk(chosen_NK[part], holder_ER, devices, nodes, home_part, start)
        total = result if total is None else total + result
    assert total is not None
    return total
