"""Cut documents into windows that a model can read, one document per row.

A row never holds two documents, so nothing can leak from one into the next whatever attention mask a model builds;
rows are padded on the right, where a causal model cannot look. Grouping rows of similar length keeps padding small.

Legend: B rows, S tokens in a row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from moekit.errors import BadConfig, BadData


class TokenizedLike(Protocol):
    """What is read of a document: `moekit.data.TokenizedDocument` is one."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def domain(self) -> str:
        """Name of its domain."""


class BatchLike(Protocol):
    """What is read of a batch: `moekit.data.Batch` is one."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids [B, S]."""

    @property
    def attention_mask(self) -> Tensor:
        """1 where a token is, 0 at padding [B, S]."""

    @property
    def document_BS(self) -> Tensor:
        """Number of each token's document, -1 at padding [B, S]."""

    @property
    def domain_BS(self) -> Tensor:
        """Number of each token's domain, -1 at padding [B, S]."""

    @property
    def domains(self) -> Sequence[str]:
        """Names of the domain numbers."""


@dataclass(frozen=True)
class Window:
    """What the model reads in one row, and which of its predictions are scored.

    Attributes:
        inputs: token ids the model reads.
        positions: positions in `inputs` after which a token is predicted; one may occur several times.
        targets: the token that is to follow each of them.
        document: which document it belongs to, an index into the list of documents.
    """

    inputs: Sequence[int]
    positions: Sequence[int]
    targets: Sequence[int]
    document: int

    @classmethod
    def of(cls, ids: Sequence[int], first: int, document: int) -> Window:
        """Make a window of a text whose tokens from `first` (at least 1) on are scored."""
        return cls(ids[:-1], range(first - 1, len(ids) - 1), ids[first:], document)


@dataclass(frozen=True)
class Corpus:
    """Windows of several documents, with the domain of each document and a digest of its token ids."""

    windows: tuple[Window, ...]
    domains: tuple[str, ...]
    digests: tuple[str, ...]


class TextDigest:
    """sha256 over the token ids of a document that may come in pieces; 64 bits of it tell documents apart."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, ids: Sequence[int]) -> TextDigest:
        """The next piece."""
        self._sha256.update(array("q", ids).tobytes())
        return self

    def __str__(self) -> str:
        return self._sha256.hexdigest()[:16]


def slide(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first scored position) so that each token but a document's first is scored exactly once.

    Args:
        length: tokens of the document.
        window: longest piece, in tokens.
        stride: tokens between the beginnings of neighbouring pieces; a token past the first piece sees at least
            `window - stride` tokens before it.
    """
    begin, done = 0, 1
    while done < length:
        end = min(begin + window, length)
        # The last piece moves back to be full: its tokens get more context at no further cost.
        begin = max(0, end - window)
        yield begin, end, done - begin
        done = end
        begin += stride


def from_documents(documents: Iterable[TokenizedLike], window: int, stride: int | None = None) -> Corpus:
    """Cut documents into sliding windows.

    Args:
        documents: what to read.
        window: longest piece in tokens.
        stride: see `slide`; half the window by default.

    Raises:
        BadConfig: no token would have context.
        BadData: there are no documents.
    """
    stride = max(1, window // 2) if stride is None else stride
    if window < 2 or not 1 <= stride < window:
        raise BadConfig(
            f"a window of {window} tokens moved by {stride} scores tokens without any context",
            hint=f"choose a window of at least 2 and a stride from 1 to {max(1, window - 1)}",
        )
    windows: list[Window] = []
    domains: list[str] = []
    digests: list[TextDigest] = []
    for number, document in enumerate(documents):
        domains.append(document.domain)
        ids = document.ids
        digests.append(TextDigest().add(ids))
        windows += [Window.of(ids[begin:end], first, number) for begin, end, first in slide(len(ids), window, stride)]
    return _checked(windows, domains, digests)


def from_batches(batches: Iterable[BatchLike], domains: Sequence[str] | None = None) -> Corpus:
    """Take ready batches apart again, so that no row holds two documents.

    A document that its batch cut in two is scored in two pieces; the first token of each has no context and is not
    scored. Use `from_documents` where that matters.

    Args:
        batches: rows that may hold several documents and padding on either side.
        domains: names of the domain numbers; by default what the batches say.

    Raises:
        BadData: a domain number without a name, or no documents.
    """
    windows: list[Window] = []
    number_of: dict[int, int] = {}
    names: list[str] = []
    digests: list[TextDigest] = []
    for batch in batches:
        known = batch.domains if domains is None else domains
        document_BS = batch.document_BS.masked_fill(batch.attention_mask == 0, -1)
        for ids_S, document_S, domain_S in zip(batch.input_ids, document_BS, batch.domain_BS, strict=True):
            for begin, end in _runs(document_S):
                key, domain = int(document_S[begin]), int(domain_S[begin])
                if not 0 <= domain < len(known):
                    raise BadData(
                        f"document {key} is of domain number {domain}, but {len(known)} domains are named",
                        hint="pass the list of names that the batches were made with",
                    )
                if key not in number_of:
                    number_of[key] = len(names)
                    names.append(known[domain])
                    digests.append(TextDigest())
                ids = ids_S[begin:end].tolist()
                digests[number_of[key]].add(ids)
                if len(ids) > 1:
                    windows.append(Window.of(ids, 1, number_of[key]))
    return _checked(windows, names, digests)


def _runs(document_S: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each stretch of one document, without padding."""
    if document_S.numel() == 0:
        return
    edges = (torch.nonzero(document_S[1:] != document_S[:-1]).flatten() + 1).tolist()
    bounds = [0, *edges, document_S.numel()]
    for begin, end in pairwise(bounds):
        if int(document_S[begin]) >= 0:
            yield begin, end


def _checked(windows: list[Window], domains: list[str], digests: list[TextDigest]) -> Corpus:
    if not domains:
        raise BadData("there is no text to evaluate on", hint="give at least one document of two tokens or more")
    if not windows:
        raise BadData(
            f"none of the {len(domains)} documents has two tokens, so there is no next token to predict",
            hint="give longer documents",
        )
    return Corpus(tuple(windows), tuple(domains), tuple(map(str, digests)))


def by_length(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Group windows, longest first, so that rows times longest row stays within `batch_tokens` (at least one row)."""
    group: list[Window] = []
    for window in sorted(windows, key=lambda w: -len(w.inputs)):
        if group and (len(group) + 1) * len(group[0].inputs) > batch_tokens:
            yield group
            group = []
        group.append(window)
    if group:
        yield group
