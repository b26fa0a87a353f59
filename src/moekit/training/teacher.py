"""Teachers: what a student's output is held against. Here a frozen model that is asked for each micro-batch.

Legend: B rows of a micro-batch, S positions, N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.checkpoint.fingerprint import live_fingerprint
from moekit.data.batches import TokenBatches
from moekit.data.vocabulary import output_size
from moekit.errors import BadConfig
from moekit.runtime.saved import parts_digest
from moekit.training.batch import MicroBatch, TeacherOutput
from moekit.training.head import OutputInputs, OutputTap
from moekit.training.own_loss import readable_head


class Teacher(Protocol):
    """Says what it would have predicted."""

    @property
    def identity(self) -> str:
        """What it is: equal teachers say the same."""

    @property
    def complete(self) -> bool:
        """Whether it gives whole distributions."""

    def check(self, rows: TokenBatches, vocabulary: int) -> None:
        """Refuse a text or a student that it does not fit.

        Raises:
            BadConfig: naming what differs.
        """

    def output(self, batch: MicroBatch, rows_B: Tensor) -> TeacherOutput:
        """What it says of a micro-batch.

        Args:
            batch: ids and mask.
            rows_B: which rows of the text these are.
        """


@dataclass(frozen=True, eq=False)
class _HiddenOutput:
    """Logits of a live teacher, made when they are asked for."""

    hidden_NH: Tensor
    head: nn.Linear
    complete: bool = True

    @torch.no_grad()
    def at(self, positions_N: Tensor) -> Tensor:
        """Logits [N, V] fp32."""
        positions_N = positions_N.to(self.hidden_NH.device)
        return nn.functional.linear(self.hidden_NH[positions_N], self.head.weight, self.head.bias).float()


@dataclass(frozen=True, eq=False)
class _LogitsOutput:
    """Logits of a live teacher that scales or caps them."""

    logits_NV: Tensor
    complete: bool = True

    def at(self, positions_N: Tensor) -> Tensor:
        """Logits [N, V] fp32."""
        return self.logits_NV[positions_N.to(self.logits_NV.device)].float()


class LiveTeacher:
    """A frozen model that is asked for each micro-batch.

    Args:
        model: any causal LM with the student's token ids, in any type.
        freeze: put it into evaluation mode, with no weight of it asking for gradients; False asks it as it is.
    """

    complete = True

    def __init__(self, model: PreTrainedModel, *, freeze: bool = True) -> None:
        self.model = model.eval().requires_grad_(False) if freeze else model
        self._head = readable_head(model)
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        """Fingerprint of its weights, and digest of its runtime parts if it has any."""
        if self._identity is None:
            self._identity = f"{live_fingerprint(self.model)} {parts_digest(self.model)}".rstrip()
        return self._identity

    @property
    def vocabulary(self) -> int:
        """V."""
        return output_size(self.model)

    def check(self, rows: TokenBatches, vocabulary: int) -> None:
        """Refuse a student with other token ids."""
        if vocabulary != self.vocabulary:
            raise BadConfig(
                f"the teacher has {self.vocabulary} tokens, the student {vocabulary}",
                hint="teacher and student must know the same token ids",
            )

    def output(self, batch: MicroBatch, rows_B: Tensor) -> TeacherOutput:
        """Its hidden states, of which logits are made a slice at a time; or its logits, where it bends them."""
        assert batch.ids_BS is not None
        device = self.model.device
        given = {"input_ids": batch.ids_BS.to(device), "use_cache": False}
        if batch.mask_BS is not None:
            given["attention_mask"] = batch.mask_BS.to(device)
        tokens = batch.ids_BS.numel()
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if self._head is None:
                return _LogitsOutput(self.model(**given).logits.reshape(tokens, -1))
            seen: list[Tensor] = []

            def keep(inputs: OutputInputs) -> Tensor:
                assert inputs.hidden_NH is not None
                seen.append(inputs.hidden_NH)
                return inputs.hidden_NH.new_zeros(())

            tap = OutputTap(self.model, self._head, keep)
            try:
                with tap.reading(batch):
                    self.model(**given, labels=given["input_ids"])
            finally:
                tap.close()
        return _HiddenOutput(seen[0], self._head)
