"""What a packed form is: which tensors stand for a matrix, and what config.json says of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.grids import Grids
from moekit.compress.engine.shard_writer import Spec
from moekit.exporting.matrices import ExpertMatrix
from moekit.exporting.recovery import Recovered
from moekit.exporting.rounded import Planned


class Form(ABC):
    """A form of packed experts in a folder of safetensors.

    Attributes:
        name: what messages and commands call it.
        renames: whether other tensors take the names that transformers writes them under.
        spares: whether whole layers may stay in floats.
    """

    name: ClassVar[str]
    renames: ClassVar[bool]
    spares: ClassVar[bool] = False

    @abstractmethod
    def check(self, plan: Sequence[Planned], spared: Sequence[ExpertMatrix], grids: Grids) -> None:
        """Refuse what the form cannot hold.

        Args:
            plan: matrices that are packed.
            spared: those that stay in floats, of whole layers.
            grids: of the plan.

        Raises:
            BadConfig: says what is in the way, and which form holds it.
        """

    @abstractmethod
    def specs(self, planned: Planned, grids: Grids) -> list[Spec]:
        """The tensors that a matrix becomes."""

    @abstractmethod
    def pack(self, planned: Planned, found: Recovered) -> dict[str, Tensor]:
        """Their values, by name."""

    @abstractmethod
    def unpack(self, planned: Planned, tensors: dict[str, Tensor]) -> Recovered:
        """Inverse of `pack`."""

    def readable(self, plan: Sequence[Planned]) -> bool:
        """Whether moekit reads and checks what is written by itself."""
        return True

    @abstractmethod
    def config(
        self, plan: Sequence[Planned], spared: Sequence[ExpertMatrix], grids: Grids, checkpoint: Checkpoint
    ) -> dict[str, Any]:
        """`quantization_config`.

        Args:
            plan: matrices that are packed.
            spared: those that stay in floats, of whole layers.
            grids: of the plan.
            checkpoint: the source.
        """
