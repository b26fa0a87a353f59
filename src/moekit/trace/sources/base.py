"""What every source's hooks have in common.

Legend: T positions of a forward pass, N of them no padding, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.anatomy.probe import Geometry, MoELayer, flat_output
from moekit.errors import UnsupportedModel
from moekit.trace.rows import Rows
from moekit.trace.tokens import TokenLabels


class ForwardPass:
    """The forward pass under way.

    Attributes:
        mask_T: False at padding.
        shape: (B, S).
        positions: T.
        tokens: N.
        labels: of the N tokens, on the CPU.
        domains: names of the domains known so far.
    """

    def __init__(self, rows: Rows, domains: Sequence[str]) -> None:
        self.mask_T = rows.mask_BS.flatten()
        self.shape = (rows.mask_BS.shape[0], rows.mask_BS.shape[1])
        self.positions = self.mask_T.numel()
        self.labels: TokenLabels = rows.labels()
        self.tokens = len(self.labels)
        self.domains = tuple(domains)
        self._kept = rows.kept()
        self._on: dict[torch.device, Tensor] = {}

    def keep(self, values: Tensor) -> Tensor:
        """Rows of the N tokens among those of T positions; copied to a device once a pass."""
        if self._kept is None:
            return values
        if values.device not in self._on:
            self._on[values.device] = self._kept.to(values.device)
        return values.index_select(0, self._on[values.device])

    def positions_of(self, token_n: Tensor) -> Tensor:
        """Where among the T positions some of the N tokens stand, int64 [n] on the CPU."""
        return token_n if self._kept is None else self._kept[token_n]

    def put(self, values: Tensor | None, like_TH: Tensor) -> Tensor:
        """Inverse of `keep`: rows of the N tokens among T positions, zeros at padding."""
        assert values is not None
        if self._kept is None:
            return values
        return torch.zeros_like(like_TH).index_copy_(0, self._kept.to(values.device), values)


@dataclass(frozen=True, eq=False)
class Place:
    """A decoder layer that is recorded.

    Attributes:
        model: the whole model.
        index: of the decoder layer.
        decoder: the decoder layer; the MoE block itself where it stands in none.
        geometry: sizes; 0 experts where the layer is dense, with the width of its feed-forward network.
        moe: its MoE block; None where it is dense.
    """

    model: nn.Module
    index: int
    decoder: nn.Module
    geometry: Geometry
    moe: MoELayer | None

    def require_moe(self) -> MoELayer:
        """The MoE block.

        Raises:
            UnsupportedModel: the layer is dense.
        """
        if self.moe is None:
            raise UnsupportedModel(
                "there are no routed experts in this layer",
                layer=self.index,
                hint="leave out statistics of experts and their router",
            )
        return self.moe


class Removable(Protocol):
    """What was installed and can be taken off again, as torch's hooks are."""

    def remove(self) -> None:
        """Take it off."""


class Probe(ABC):
    """Fetches one source at one layer, pass by pass, without changing anything.

    Args:
        place: the layer.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        # Modules also run outside of a recorded pass: recomputed under activation checkpointing, say.
        self.active = False

    @abstractmethod
    def hooks(self) -> Iterator[Removable]:
        """Install what sees the layer."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the pass before."""

    @abstractmethod
    def parts(self, current: ForwardPass) -> Mapping[str, Any]:
        """What was seen, as fields of a `TokenBatch`, padding left out.

        Raises:
            UnsupportedModel: this family does not show it.
        """


def first_float(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states among a module's arguments: by name, else the first tensor of floats."""
    named = kwargs.get("hidden_states")
    given = [named, *args, *kwargs.values()]
    return next((g for g in given if isinstance(g, Tensor) and g.is_floating_point()), None)


class Watch:
    """Keeps input and output of one module in one pass.

    Args:
        module: what is watched.
        what: its name, for messages.
        probe: looks at it only while this one is active.
    """

    def __init__(self, module: nn.Module, what: str, probe: Probe) -> None:
        self._module, self._what, self._probe = module, what, probe
        self.output: Tensor | None = None
        self._input: Tensor | None = None
        self._calls = 0

    def hook(self) -> RemovableHandle:
        """Install it."""
        return self._module.register_forward_hook(self._see, with_kwargs=True)

    def clear(self) -> None:
        """Forget the pass before."""
        self.output, self._input, self._calls = None, None, 0

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._probe.active:
            return
        given = first_float(args, kwargs)
        self._calls += 1
        self._input = None if given is None else given.detach().reshape(-1, given.shape[-1])
        self.output = output[0] if isinstance(output, tuple) else output

    def pair(self, current: ForwardPass) -> tuple[Tensor, Tensor]:
        """(input [N, C], output [N, C']) of the N tokens.

        Raises:
            UnsupportedModel: it did not run once on all positions of the pass.
        """
        width = None if self._input is None else self._input.shape[-1]
        output = None if self.output is None else flat_output(self.output, width).detach()
        whole = self._input is not None and output is not None and len(self._input) == len(output) == current.positions
        if self._calls != 1 or not whole:
            raise UnsupportedModel(
                f"{self._what} ran {self._calls} times in a pass, or not on all of its {current.positions} positions",
                layer=self._probe.place.index,
                hint="leave out statistics that look at it",
            )
        assert self._input is not None
        assert output is not None
        return current.keep(self._input), current.keep(output)
