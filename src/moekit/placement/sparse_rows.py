"""Distinct devices of tokens by sorting their choices: for many devices, where a token x device table would be empty.

Legend: N tokens, K choices, D devices, M nodes, P pairs of a token and a distinct device, Q pairs with a distinct node.
"""

from __future__ import annotations

import torch


def count_sparse(
    device_NK: torch.Tensor, home_N: torch.Tensor | None, node_D: torch.Tensor, nodes: int
) -> tuple[int, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Rows of some tokens.

    Args:
        device_NK: device of each choice, D for none.
        home_N: home device of each token; None if unknown.
        node_D: node of each device, ascending.
        nodes: M.

    Returns:
        Rows once per node; rows each device receives, once per device [D]; with homes the rows from device to device,
        once per device and once per node [D, D].
    """
    devices = len(node_D)
    token_P, device_P = _distinct(device_NK, devices)
    sender_Q, node_Q = _distinct(torch.cat([node_D, torch.tensor([nodes])])[device_NK], nodes)
    rows_D = torch.bincount(device_P, minlength=devices)
    if home_N is None:
        return len(sender_Q), rows_D, None, None
    home_P, home_Q = home_N[token_P], home_N[sender_Q]
    landing_P, landing_Q = (_landing(h, n, node_D, nodes) for h, n in ((home_P, node_D[device_P]), (home_Q, node_Q)))
    # A row that is consumed where it landed is not sent again; at home it never travelled at all.
    onward_P = (landing_P != device_P) | (landing_P == home_P)
    across_Q = landing_Q != home_Q
    node_DD = _traffic(home_Q[across_Q], landing_Q[across_Q], devices)
    node_DD += _traffic(landing_P[onward_P], device_P[onward_P], devices)
    return len(sender_Q), rows_D, _traffic(home_P, device_P, devices), node_DD


def _distinct(place_NK: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a token and each distinct place of it; `places` itself stands for none."""
    sorted_NK = place_NK.sort(dim=1).values
    new_NK = sorted_NK < places
    new_NK[:, 1:] &= sorted_NK[:, 1:] != sorted_NK[:, :-1]
    return new_NK.nonzero()[:, 0], sorted_NK[new_NK]


def _traffic(from_X: torch.Tensor, to_X: torch.Tensor, devices: int) -> torch.Tensor:
    return torch.bincount(from_X * devices + to_X, minlength=devices * devices).view(devices, devices)


def _landing(home_X: torch.Tensor, node_X: torch.Tensor, node_D: torch.Tensor, nodes: int) -> torch.Tensor:
    """Device where a row to a node arrives: the one with the sender's place there; at home in its own node."""
    first_M = torch.searchsorted(node_D, torch.arange(nodes))
    size_M = torch.bincount(node_D, minlength=nodes)
    place_X = home_X - first_M[node_D[home_X]]
    return torch.where(node_D[home_X] == node_X, home_X, first_M[node_X] + place_X % size_M[node_X])
