"""Which sequence, document and domain each token of a trace is from, and where in its sequence it stands.

In memory one number per token; on disk one row per *run* of tokens that follow each other in one sequence, document,
domain and phase, so that labels cost next to nothing beside the choices.

Legend: N tokens, R runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from moekit.errors import BadData

PREFILL, GENERATED = 0, 1


@dataclass(frozen=True, eq=False)
class TokenLabels:
    """Labels of N tokens.

    Attributes:
        sequence_N: int32, number of the sequence the model saw it in; a sequence's tokens stand together, in order.
        document_N: int32, number of its document.
        domain_N: int16, position of its domain in the list of names.
        position_N: int32, position in its sequence, padding not counted.
        phase_N: uint8, 0 for text that was given, 1 for tokens the model generated itself.
    """

    sequence_N: Tensor
    document_N: Tensor
    domain_N: Tensor
    position_N: Tensor
    phase_N: Tensor

    DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "sequence_N": torch.int32,
        "document_N": torch.int32,
        "domain_N": torch.int16,
        "position_N": torch.int32,
        "phase_N": torch.uint8,
    }

    def __len__(self) -> int:
        return self.sequence_N.shape[0]

    @classmethod
    def empty(cls) -> TokenLabels:
        """Labels of no tokens."""
        return cls(**{name: torch.zeros(0, dtype=dtype) for name, dtype in cls.DTYPES.items()})

    @classmethod
    def concatenate(cls, parts: Iterable[TokenLabels]) -> TokenLabels:
        """Labels of several sets of tokens, one after the other."""
        parts = [cls.empty(), *parts]
        return cls(**{name: torch.cat([getattr(p, name) for p in parts]) for name in cls.DTYPES})

    def __getitem__(self, which: Tensor) -> TokenLabels:
        return TokenLabels(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    def shifted(self, *, sequences: int, documents: int, domains: Mapping[int, int]) -> TokenLabels:
        """Renumbered: sequences and documents moved up, domains by a table."""
        table = torch.tensor([domains[d] for d in range(len(domains))] or [0], dtype=torch.int16)
        return replace(
            self,
            sequence_N=self.sequence_N + sequences,
            document_N=self.document_N + documents,
            domain_N=table[self.domain_N.long()],
        )

    def encode(self) -> dict[str, Tensor]:
        """As runs: name -> [R] tensor."""
        if not len(self):
            return {f"run_{name}": torch.zeros(0, dtype=dtype) for name, dtype in RUN_DTYPES.items()}
        follows = self.position_N[1:] == self.position_N[:-1] + 1
        for name in ("sequence_N", "document_N", "domain_N", "phase_N"):
            value = getattr(self, name)
            follows &= value[1:] == value[:-1]
        start_R = torch.cat([torch.zeros(1, dtype=torch.int64), (~follows).nonzero().flatten() + 1])
        stop_R = torch.cat([start_R[1:], torch.tensor([len(self)])])
        found = {name: getattr(self, f"{name}_N")[start_R] for name in RUN_DTYPES if name != "length"}
        return {"run_length": (stop_R - start_R).to(torch.int32), **{f"run_{n}": v for n, v in found.items()}}

    @classmethod
    def decode(cls, runs: Mapping[str, Tensor], tokens: int) -> TokenLabels:
        """The inverse of `encode`.

        Raises:
            BadData: the runs do not describe that many tokens.
        """
        length_R = runs["run_length"].long()
        if len({len(runs[f"run_{name}"]) for name in RUN_DTYPES}) != 1:
            raise BadData("the labels of its tokens have different lengths", hint="record the trace again")
        if bool((length_R < 1).any()) or int(length_R.sum()) != tokens:
            raise BadData(f"its runs hold {int(length_R.sum())} tokens, not {tokens}", hint="record the trace again")
        names = [name for name in RUN_DTYPES if name != "length"]
        spread = {f"{name}_N": torch.repeat_interleave(runs[f"run_{name}"], length_R) for name in names}
        first_R = length_R.cumsum(0) - length_R
        inside_N = torch.arange(tokens) - torch.repeat_interleave(first_R, length_R)
        spread["position_N"] = (spread["position_N"] + inside_N).to(torch.int32)
        return cls(**spread)


RUN_DTYPES = {
    "length": torch.int32,
    "sequence": torch.int32,
    "document": torch.int32,
    "domain": torch.int16,
    "position": torch.int32,
    "phase": torch.uint8,
}
