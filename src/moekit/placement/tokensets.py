"""What tokens chose, as distinct sets of experts with their frequency: the exact objective for K > 2.

Co-activated pairs only approximate the rows a token costs once K > 2: a token with experts on devices {0,0,1,1} and
one on {0,0,0,1} cost the same two rows, though they keep two and three pairs. Counting distinct devices per token is
exact, and few distinct sets stand for many tokens.

Legend: N tokens, K choices a token, E experts, D devices, U distinct sets. Index E means "no expert".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moekit.errors import BadData

Ints = npt.NDArray[np.int64]

# Sets looked at in one go; bounds the memory of tables of U x K x K.
CHUNK_SETS = 20_000


@dataclass(frozen=True)
class TokenSets:
    """Distinct expert sets of a trace.

    Attributes:
        set_UK: experts of each set, ascending, filled up with E.
        count_U: tokens that chose it.
        experts: E.
        choices: valid choices of all tokens, including those with a single one.
        tokens: tokens with at least one choice.
    """

    set_UK: Ints
    count_U: Ints
    experts: int
    choices: int
    tokens: int

    def rows(self, group_E: npt.NDArray[np.integer], devices: int) -> int:
        """Rows sent once per distinct device, over all tokens."""
        device_UK = np.append(group_E, devices)[self.set_UK]
        present_UD = np.zeros((len(device_UK), devices + 1), dtype=bool)
        np.put_along_axis(present_UD, device_UK, True, axis=1)
        return int((present_UD[:, :devices].sum(axis=1) * self.count_U).sum())

    def pairs_EE(self) -> npt.NDArray[np.float64]:
        """Co-activation counts of these tokens, [E, E], zero diagonal."""
        width = self.experts + 1
        flat = np.zeros(width * width)
        for start in range(0, len(self.set_UK), CHUNK_SETS):
            set_UK, count_U = self.set_UK[start : start + CHUNK_SETS], self.count_U[start : start + CHUNK_SETS]
            pair_UKK = set_UK[:, :, None] * width + set_UK[:, None, :]
            weight_UKK = np.broadcast_to(count_U[:, None, None], pair_UKK.shape)
            flat += np.bincount(pair_UKK.ravel(), weight_UKK.ravel(), minlength=width * width)
        pairs_EE = flat.reshape(width, width)[: self.experts, : self.experts].copy()
        np.fill_diagonal(pairs_EE, 0.0)
        return pairs_EE

    def load_E(self) -> npt.NDArray[np.float64]:
        """Choices of each expert, [E]."""
        weight_UK = np.broadcast_to(self.count_U[:, None], self.set_UK.shape)
        load = np.bincount(self.set_UK.ravel(), weight_UK.ravel(), minlength=self.experts + 1)
        return load[: self.experts].astype(np.float64)

    @property
    def avoidable(self) -> int:
        """Rows that perfect placement could spare: choices - tokens."""
        return self.choices - self.tokens

    def kept(self, group_E: npt.NDArray[np.integer], devices: int) -> float:
        """Share of the avoidable rows that are avoided, in [0, 1]; equals f for K = 2.

        (choices - rows) / (choices - tokens); 1.0 where no token has two experts.
        """
        return (self.choices - self.rows(group_E, devices)) / self.avoidable if self.avoidable else 1.0


def token_sets(indices_NK: torch.Tensor, experts: int, *, limit: int | None = None) -> TokenSets:
    """Count the distinct expert sets of a trace.

    Args:
        indices_NK: integer choices; E means no expert. A repeated expert counts once.
        experts: E.
        limit: use at most this many tokens, evenly spaced; None uses all.

    Raises:
        BadData: an index outside 0..E.
    """
    chosen_NK = indices_NK.detach().to("cpu", torch.int64).numpy()
    if limit is not None and len(chosen_NK) > limit:
        chosen_NK = chosen_NK[np.linspace(0, len(chosen_NK) - 1, limit).astype(np.int64)]
    if chosen_NK.size and (chosen_NK.min() < 0 or chosen_NK.max() > experts):
        bad = int(chosen_NK.min() if chosen_NK.min() < 0 else chosen_NK.max())
        raise BadData(f"expert index {bad} is outside 0..{experts}", hint="the trace belongs to another model")
    sorted_NK = np.sort(chosen_NK, axis=1)
    repeated_NK = sorted_NK[:, 1:] == sorted_NK[:, :-1]
    if repeated_NK.any():
        sorted_NK[:, 1:][repeated_NK] = experts
        sorted_NK = np.sort(sorted_NK, axis=1)
    set_UK, count_U = _distinct_rows(sorted_NK, experts + 1)
    valid_U = (set_UK < experts).sum(axis=1)
    used = valid_U > 0
    return TokenSets(
        set_UK=np.ascontiguousarray(set_UK[used]),
        count_U=count_U[used].astype(np.int64),
        experts=experts,
        choices=int((valid_U * count_U).sum()),
        tokens=int(count_U[used].sum()),
    )


def _distinct_rows(row_NK: Ints, base: int) -> tuple[Ints, Ints]:
    """Distinct rows and their counts; rows are packed into one integer where they fit, ten times faster."""
    width = row_NK.shape[1]
    if base**width >= 2**63:
        distinct_UK, count_U = np.unique(row_NK, axis=0, return_counts=True)
        return distinct_UK, count_U
    place_K = base ** np.arange(width - 1, -1, -1, dtype=np.int64)
    code_U, count_U = np.unique(row_NK @ place_K, return_counts=True)
    return code_U[:, None] // place_K % base, count_U
