"""From documents to batches of token ids that remember which document and domain each token is from.

Shapes: R rows in all, B rows of a batch, S positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moekit._progress import Progress, track
from moekit.data.encoding import Bos, beginning, encode_document
from moekit.data.pictures import PictureReader, Shown
from moekit.data.text import Document
from moekit.errors import BadConfig, BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Loss functions of transformers leave positions with this label out.
IGNORED_LABEL = -100
NOTHING = -1


@dataclass(frozen=True)
class TokenizedDocument:
    """Token ids of one document.

    Attributes:
        ids: token ids, at least one.
        domain: its domain.
        index: its number in the list that was tokenized.
        begins: how many of the ids are no part of its text: those of `moekit.data.encoding.beginning`.
        shown: its pictures, read by the model's processor; such a document is never cut.
    """

    ids: list[int]
    domain: str
    index: int
    begins: int = field(default=0, kw_only=True)
    shown: Shown | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of token ids; padding is at the right end.

    Attributes:
        input_ids: int64 [B, S].
        attention_mask: int64 [B, S], 0 at padding.
        document_BS: int32 [B, S], document number, -1 at padding.
        domain_BS: int16 [B, S], position in `domains`, -1 at padding.
        domains: names of the domains.
        begins: ids that each document begins with.
        shown: pictures of a row, which is then the only one.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    document_BS: torch.Tensor
    domain_BS: torch.Tensor
    domains: tuple[str, ...]
    begins: tuple[int, ...] = ()
    shown: Shown | None = None

    @property
    def labels(self) -> torch.Tensor:
        """int64 [B, S]: the ids, with padding ignored, as the loss of a causal LM takes them."""
        return self.input_ids.masked_fill(self.attention_mask == 0, IGNORED_LABEL)

    @property
    def tokens(self) -> int:
        """How many positions are no padding."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """All rows of a text; also a data set for transformers' Trainer.

    Attributes:
        input_ids: int32 [R, S].
        document_RS: int32 [R, S], -1 at padding.
        domain_RS: int16 [R, S], -1 at padding.
        domains: names of the domains.
        begins: ids that each document begins with.
        shown: row -> its pictures, for rows that have some.
    """

    input_ids: torch.Tensor
    document_RS: torch.Tensor
    domain_RS: torch.Tensor
    domains: tuple[str, ...]
    begins: tuple[int, ...] = ()
    shown: Mapping[int, Shown] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        batch = self._batch(torch.tensor([range(len(self))[row]]))
        return {"input_ids": batch.input_ids[0], "attention_mask": batch.attention_mask[0], "labels": batch.labels[0]}

    @property
    def tokens(self) -> int:
        """How many positions are no padding."""
        return int((self.document_RS >= 0).sum())

    @property
    def tokens_per_domain(self) -> dict[str, int]:
        """Positions that are no padding, by domain."""
        return {name: int((self.domain_RS == d).sum()) for d, name in enumerate(self.domains)}

    @property
    def calibration(self) -> torch.Tensor:
        """int64 [R, S]: the ids, -1 at padding, as conversions take them."""
        return self.input_ids.long().masked_fill(self.document_RS < 0, NOTHING)

    def _batch(self, rows: torch.Tensor) -> Batch:
        document_BS = self.document_RS[rows]
        return Batch(
            input_ids=self.input_ids[rows].long(),
            attention_mask=(document_BS >= 0).long(),
            document_BS=document_BS,
            domain_BS=self.domain_RS[rows],
            domains=self.domains,
            begins=self.begins,
        )

    def batches(self, batch_size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Iterate over the rows; one with pictures is a batch of its own, as families join theirs in different ways.

        Args:
            batch_size: rows of a batch; the last may have fewer.
            seed: shuffles the rows; None keeps their order and drops columns that are padding in the whole batch.
        """
        if batch_size < 1:
            raise BadConfig(f"batch_size is {batch_size}", hint="give at least 1")
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        for rows in self._groups(order.tolist(), batch_size):
            batch = self._batch(torch.tensor(rows))
            longest = int(batch.attention_mask.sum(1).max())
            yield Batch(
                batch.input_ids[:, :longest],
                batch.attention_mask[:, :longest],
                batch.document_BS[:, :longest],
                batch.domain_BS[:, :longest],
                batch.domains,
                batch.begins,
                self.shown.get(rows[0]),
            )

    def _groups(self, order: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """Rows of each batch."""
        group: list[int] = []
        for row in order:
            alone = row in self.shown
            if group and (alone or len(group) == batch_size):
                yield group
                group = []
            group.append(row)
            if alone:
                yield group
                group = []
        if group:
            yield group


def tokenize(
    docs: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens_per_doc: int | None = None,
    *,
    end_token: bool = False,
    bos: Bos = "auto",
    pictures: PictureReader | None = None,
    progress: Progress | None = None,
) -> list[TokenizedDocument]:
    """Tokenize documents, each behind the beginning that the tokenizer gives a text.

    Args:
        docs: documents; their order gives the numbers.
        tokenizer: any tokenizer of transformers.
        max_tokens_per_doc: only the first so many tokens of each.
        end_token: put the end-of-text token behind each document that was not cut.
        bos: see `moekit.data.encoding.beginning`; it counts among the tokens.
        pictures: reads conversations with pictures, which are never cut; None reads their words alone.
        progress: told of each document.

    Raises:
        BadData: all documents together have fewer than two tokens, of which nothing can be predicted.
    """
    end = tokenizer.eos_token_id if end_token else None
    begins = beginning(tokenizer, bos)
    tokenized = []
    for index, document in track(list(enumerate(docs)), "tokenizing", progress):
        if pictures is not None and document.pictures:
            shown = Shown(pictures, document)
            tokenized.append(TokenizedDocument(pictures.ids(document), document.domain, index, shown=shown))
            continue
        # Few tokens are longer than 16 characters: no need to tokenize a novel for its first page.
        characters = None if max_tokens_per_doc is None else 16 * max_tokens_per_doc
        ids = encode_document(document, tokenizer, bos=bos, characters=characters)
        whole = characters is None or len(document.text) <= characters
        if end is not None and whole and ids and ids[-1] != end:
            ids.append(end)
        ids = ids[:max_tokens_per_doc]
        if ids:
            tokenized.append(begun(ids, document.domain, index, begins))
    if sum(len(d.ids) for d in tokenized) < 2:
        raise BadData("the text has fewer than two tokens", hint="give more text: nothing can be predicted from this")
    return tokenized


def begun(ids: list[int], domain: str, index: int, begins: Sequence[int]) -> TokenizedDocument:
    """A document that knows how many of its ids are the beginning that all have."""
    return TokenizedDocument(ids, domain, index, begins=len(begins) if ids[: len(begins)] == list(begins) else 0)


def _rows(
    tokenized: Sequence[TokenizedDocument], seq_len: int, pad: bool
) -> Iterator[list[tuple[TokenizedDocument, int, int]]]:
    """Rows as lists of (document, start, stop)."""
    row: list[tuple[TokenizedDocument, int, int]] = []
    free = seq_len
    for document in tokenized:
        # A row never mixes domains: figures per domain would otherwise depend on what happened to stand before.
        alone = pad or document.shown is not None or bool(row and row[-1][0].shown)
        if row and (alone or document.domain != row[-1][0].domain):
            yield row
            row, free = [], seq_len
        start = 0
        while start < len(document.ids):
            take = min(free, len(document.ids) - start)
            row.append((document, start, start + take))
            start, free = start + take, free - take
            if free == 0:
                yield row
                row, free = [], seq_len
    if row:
        yield row


def arrange(
    tokenized: Sequence[TokenizedDocument], seq_len: int, *, pad: bool = False, pad_id: int = 0
) -> TokenBatches:
    """Lay tokenized documents out in rows.

    Args:
        tokenized: documents, those of one domain together.
        seq_len: positions of a row, at least 2.
        pad: True starts each document in a new row and pads; False packs the documents of a domain without gaps.
        pad_id: id at padding, which the attention mask leaves out.

    Raises:
        BadConfig: rows too short to predict anything, or for a document with pictures.
    """
    if seq_len < 2:
        raise BadConfig(f"rows of {seq_len} tokens predict nothing", hint="give seq_len at least 2")
    longest = max((len(d.ids) for d in tokenized if d.shown), default=0)
    if longest > seq_len:
        raise BadConfig(
            f"a conversation with pictures has {longest} tokens, and is never cut: rows have {seq_len}",
            hint=f"--seq-len {longest}",
        )
    domains = tuple(dict.fromkeys(d.domain for d in tokenized))
    number = {name: i for i, name in enumerate(domains)}
    rows = list(_rows(tokenized, seq_len, pad))
    ids_RS = torch.full((len(rows), seq_len), pad_id, dtype=torch.int32)
    document_RS = torch.full((len(rows), seq_len), NOTHING, dtype=torch.int32)
    domain_RS = torch.full((len(rows), seq_len), NOTHING, dtype=torch.int16)
    for r, row in enumerate(rows):
        at = 0
        for document, start, stop in row:
            here = slice(at, at + stop - start)
            ids_RS[r, here] = torch.tensor(document.ids[start:stop], dtype=torch.int32)
            document_RS[r, here] = document.index
            domain_RS[r, here] = number[document.domain]
            at += stop - start
    begins = {tuple(document.ids[: document.begins]) for document in tokenized}
    shown = {r: row[0][0].shown for r, row in enumerate(rows) if row[0][0].shown is not None}
    return TokenBatches(ids_RS, document_RS, domain_RS, domains, max(begins, key=len, default=()), shown)


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; the end-of-text id, or 0, where the tokenizer has none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def pack(
    docs: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    pad: bool = False,
    max_tokens_per_doc: int | None = None,
    end_token: bool = False,
    bos: Bos = "auto",
    pictures: PictureReader | None = None,
    progress: Progress | None = None,
) -> TokenBatches:
    """Tokenize documents and lay them out in rows: `tokenize`, then `arrange`."""
    tokenized = tokenize(
        docs, tokenizer, max_tokens_per_doc, end_token=end_token, bos=bos, pictures=pictures, progress=progress
    )
    return arrange(tokenized, seq_len, pad=pad, pad_id=pad_id_of(tokenizer))


def batches(
    tokenized: Sequence[TokenizedDocument],
    batch_size: int,
    seq_len: int,
    pad_id: int = 0,
    *,
    pad: bool = False,
    seed: int | None = None,
) -> Iterator[Batch]:
    """Batches of tokenized documents: `arrange`, then `TokenBatches.batches`."""
    return arrange(tokenized, seq_len, pad=pad, pad_id=pad_id).batches(batch_size, seed=seed)
