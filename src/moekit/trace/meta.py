"""What a trace is of: model, routing, text, layers, sizes.

Legend: N tokens, K choices a token, E experts, H hidden.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moekit.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOCK_ROUTING = "stock"


def index_dtype(experts: int) -> torch.dtype:
    """Smallest integer type that holds 0..E, E meaning none."""
    return torch.uint8 if experts <= 255 else torch.int16


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over a tokenizer's vocabulary: which id stands for which piece of text."""
    digest = hashlib.sha256()
    for piece, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}\t{piece}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


class DataEntry(BaseModel):
    """Part of the text a trace was recorded on.

    Attributes:
        source: where it came from.
        domain: name of its domain.
        documents: number of documents.
        tokens: number of tokens, padding not counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    domain: str
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)


class TraceMeta(BaseModel):
    """What a trace is of.

    Attributes:
        format: version of the files.
        model: name or path of the model, for people.
        fingerprint: of the model; "" if unknown.
        ancestors: fingerprints of the checkpoints that the model was made from, its parent's first.
        routing: "stock", or the routing policy that was active.
        tokenizer: hash of the tokenizer; "" if unknown.
        data: the text, by source and domain.
        seed: of what was drawn while recording; None without.
        layers: decoder layers, ascending.
        experts: E of each layer; 0 where it is dense.
        top_k: K of each layer; 0 where it is dense.
        hidden: H.
        widths: I of each layer; empty where unknown.
        tokens: N.
        has_choices: whether each token's choices are kept.
        has_weights: whether their weights are kept too.
        domains: names of the domains, by number.
        statistics: names of the statistics.
        warnings: what a reader must know before trusting the figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str = ""
    fingerprint: str = ""
    ancestors: list[str] = Field(default_factory=list)
    routing: str = STOCK_ROUTING
    tokenizer: str = ""
    data: list[DataEntry] = Field(default_factory=list)
    seed: int | None = None
    layers: list[int]
    experts: list[int]
    top_k: list[int]
    hidden: int = Field(ge=1)
    widths: list[int] = Field(default_factory=list)
    tokens: int = Field(ge=0)
    has_choices: bool
    has_weights: bool
    domains: list[str]
    statistics: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> TraceMeta:
        if not self.layers or self.layers != sorted(set(self.layers)):
            raise ValueError("layers must be at least one, ascending and distinct")
        if not len(self.layers) == len(self.experts) == len(self.top_k):
            raise ValueError("layers, experts and top_k must be of one length")
        if self.widths and len(self.widths) != len(self.layers):
            raise ValueError("widths must be of each layer, or none")
        for e, k in zip(self.experts, self.top_k, strict=True):
            dense = e == k == 0 and not self.has_choices
            if not dense and not 1 <= k <= e <= 32767:
                raise ValueError(
                    "every layer needs 1 to 32767 experts and 1 to E choices; or 0 of both, without choices"
                )
        if len(set(self.domains)) != len(self.domains):
            raise ValueError("domains must be distinct")
        if self.has_weights and not self.has_choices:
            raise ValueError("weights without choices")
        return self

    def experts_of(self, layer: int) -> int:
        """E of a layer."""
        return self.experts[self._row(layer)]

    def top_k_of(self, layer: int) -> int:
        """K of a layer."""
        return self.top_k[self._row(layer)]

    def width_of(self, layer: int) -> int:
        """I of a layer; 0 where unknown."""
        return self.widths[self._row(layer)] if self.widths else 0

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise BadData("the trace has no such layer", layer=layer, hint=f"it has layers {self.layers}")
        return self.layers.index(layer)
