"""Which tokens a forward pass holds: what is padding, and which sequence, document and domain the rest is from.

Legend: B rows, S positions, N tokens that are no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.errors import BadConfig
from moekit.trace.tokens import GENERATED, PREFILL, TokenLabels

UNNAMED_DOMAIN = "text"


@dataclass(frozen=True, eq=False)
class Rows:
    """Labels of every position of a forward pass, on the CPU.

    Attributes:
        mask_BS: bool, False at padding.
        sequence_BS: number of the sequence, int32.
        document_BS: number of the document, int32; anything at padding.
        domain_BS: number of the domain, int16; anything at padding.
        position_BS: position in the sequence, padding not counted, int32.
        phase: 0 for given text, 1 for generated tokens.
    """

    mask_BS: Tensor
    sequence_BS: Tensor
    document_BS: Tensor
    domain_BS: Tensor
    position_BS: Tensor
    phase: int

    def kept(self) -> Tensor | None:
        """Flat positions that are no padding, int64 [N]; None if all are."""
        flat = self.mask_BS.flatten()
        return None if bool(flat.all()) else flat.nonzero().flatten()

    def labels(self) -> TokenLabels:
        """Labels of what is no padding, row by row."""
        mask_BS = self.mask_BS
        return TokenLabels(
            sequence_N=self.sequence_BS[mask_BS],
            document_N=self.document_BS[mask_BS],
            domain_N=self.domain_BS[mask_BS],
            position_N=self.position_BS[mask_BS],
            phase_N=torch.full((int(mask_BS.sum()),), self.phase, dtype=torch.uint8),
        )


@dataclass(frozen=True, eq=False)
class Labels:
    """What a user says about the next forward pass.

    Attributes:
        mask_BS: False or 0 at padding.
        document_BS: number of each token's document; None makes each row a document of its own.
        domain_BS: position of each token's domain in `domains`; None puts all into the first.
        domains: names of the domains.
        begins: ids that each document begins with.
    """

    mask_BS: Tensor
    document_BS: Tensor | None = None
    domain_BS: Tensor | None = None
    domains: tuple[str, ...] = (UNNAMED_DOMAIN,)
    begins: tuple[int, ...] = ()

    def rows(self, which_B: Tensor) -> Labels:
        """Labels of some rows."""
        document_BS, domain_BS = self.document_BS, self.domain_BS
        return Labels(
            self.mask_BS[which_B],
            None if document_BS is None else document_BS[which_B],
            None if domain_BS is None else domain_BS[which_B],
            self.domains,
            self.begins,
        )

    def columns(self, width: int) -> Labels:
        """Labels of the first positions."""
        document_BS, domain_BS = self.document_BS, self.domain_BS
        return Labels(
            self.mask_BS[:, :width],
            None if document_BS is None else document_BS[:, :width],
            None if domain_BS is None else domain_BS[:, :width],
            self.domains,
            self.begins,
        )


def read_batch(batch: Any) -> tuple[Tensor, Labels]:
    """Token ids and labels of a batch.

    Args:
        batch: a `moekit.data.Batch`; a mapping with "input_ids" and, if rows are padded, "attention_mask"; or a tensor
            of ids [B, S].

    Returns:
        (ids [B, S], labels), on the CPU.

    Raises:
        BadConfig: none of these.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    mapping = isinstance(batch, Mapping)
    ids = batch.get("input_ids") if mapping else getattr(batch, "input_ids", None)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise BadConfig(
            f"a {type(batch).__name__} is no batch of token ids",
            hint='give a moekit Batch, a mapping with "input_ids" [B, S] and "attention_mask", or a tensor of ids',
        )
    mask = batch.get("attention_mask") if mapping else batch.attention_mask
    mask_BS = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if mask_BS.shape != ids.shape:
        raise BadConfig(f"the attention mask is {list(mask_BS.shape)}, the ids are {list(ids.shape)}")
    labels = Labels(
        mask_BS.cpu(),
        None if mapping else batch.document_BS.cpu(),
        None if mapping else batch.domain_BS.cpu(),
        (UNNAMED_DOMAIN,) if mapping else tuple(batch.domains),
        tuple(getattr(batch, "begins", ())),
    )
    return ids.cpu(), labels


def features_of(batch: Any, device: torch.device | str) -> dict[str, Tensor]:
    """What the pictures of a batch give the model's forward beside ids and mask, by argument; empty for text."""
    shown = getattr(batch, "shown", None)
    return {} if shown is None else {name: value.to(device) for name, value in shown.features().items()}


class RowCounter:
    """Numbers sequences, documents and domains over all forward passes; continues sequences that a cache holds."""

    def __init__(self) -> None:
        self.domains: list[str] = []
        self.begins: tuple[int, ...] = ()
        self._sequences = 0
        self._documents = 0
        self._open: Rows | None = None

    def _domain_table(self, names: Sequence[str]) -> Tensor:
        for name in names:
            if name not in self.domains:
                self.domains.append(name)
        return torch.tensor([self.domains.index(name) for name in names], dtype=torch.int16)

    def start(self, labels: Labels, phase: int = PREFILL) -> Rows:
        """Rows that begin new sequences."""
        mask_BS = labels.mask_BS.bool()
        count, length = mask_BS.shape
        row_B1 = torch.arange(count, dtype=torch.int32)[:, None]
        document_BS = labels.document_BS
        if document_BS is None:
            document_BS = (self._documents + row_B1).expand(count, length)
            self._documents += count
        else:
            self._documents = max(self._documents, int(document_BS.max()) + 1 if document_BS.numel() else 0)
        table = self._domain_table(labels.domains)
        self.begins = labels.begins or self.begins
        domain_BS = torch.zeros(count, length, dtype=torch.int64) if labels.domain_BS is None else labels.domain_BS
        rows = Rows(
            mask_BS=mask_BS,
            sequence_BS=(self._sequences + row_B1).expand(count, length),
            document_BS=document_BS.to(torch.int32),
            domain_BS=table[domain_BS.long().clamp_min(0)],
            position_BS=(mask_BS.cumsum(1) - 1).to(torch.int32),
            phase=phase,
        )
        self._sequences += count
        self._open = rows
        return rows

    def resume(self, mask_BS: Tensor, phase: int = GENERATED) -> Rows:
        """Rows that continue the sequences of the pass before, whose keys and values are cached.

        Raises:
            BadConfig: another number of rows than before.
        """
        before = self._open
        if before is None or before.mask_BS.shape[0] != mask_BS.shape[0]:
            raise BadConfig(
                "the forward pass continues cached sequences that were not recorded from their start",
                hint="start recording before the first forward pass, with the same rows throughout (no beam search)",
            )
        last = before.position_BS[:, -1:]
        width = mask_BS.shape[1]
        rows = Rows(
            mask_BS=mask_BS.bool(),
            sequence_BS=before.sequence_BS[:, -1:].expand(-1, width),
            document_BS=before.document_BS[:, -1:].expand(-1, width),
            domain_BS=before.domain_BS[:, -1:].expand(-1, width),
            position_BS=(last + mask_BS.bool().cumsum(1)).to(torch.int32),
            phase=phase,
        )
        self._open = rows
        return rows


# Labels a pass from its arguments by name.
RowSource = Callable[[Mapping[str, Any]], Rows]


def batch_shape(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """(B, S) of a forward pass from its arguments by name.

    Raises:
        BadConfig: it has neither token ids nor embeddings.
    """
    for name in ("input_ids", "inputs_embeds"):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    raise BadConfig("a forward pass without input_ids and inputs_embeds cannot be recorded")


def _padding(arguments: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
    """What of a pass is no padding, bool [B, S], from its attention mask."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= shape[1]:
        return mask[:, mask.shape[1] - shape[1] :].bool().cpu()
    raise BadConfig(
        "padding cannot be told from an attention mask that is not [B, S]",
        hint="pass a 2-D attention mask, or say what a pass holds with Recorder.expect",
    )


def rows_of_pass(counter: RowCounter, arguments: Mapping[str, Any], labels: Labels | None) -> Rows:
    """Label a forward pass.

    Args:
        counter: numbers of sequences, documents and domains.
        arguments: of the pass, by name; a filled `past_key_values` means it continues the pass before.
        labels: what the user said of it; None reads the padding from its attention mask.

    Raises:
        BadConfig: padding, or the sequences it continues, are unknown.
    """
    shape = batch_shape(arguments)
    cache = arguments.get("past_key_values")
    if cache is not None and hasattr(cache, "get_seq_length") and int(cache.get_seq_length()):
        # One position at a time is what the model says itself; more are text it is given in pieces.
        return counter.resume(_padding(arguments, shape), GENERATED if shape[1] == 1 else PREFILL)
    rows = counter.start(labels if labels is not None else Labels(_padding(arguments, shape)))
    if tuple(rows.mask_BS.shape) != shape:
        raise BadConfig(f"labels of {list(rows.mask_BS.shape)} positions for a pass of {list(shape)}")
    return rows
