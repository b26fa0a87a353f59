"""Perplexity with every document's likelihood kept, so that two models can be compared document by document.

Over documents i with n_i scored tokens and summed negative log likelihood s_i (in nats)::

    nll = sum_i s_i / sum_i n_i          perplexity = exp(nll)

The standard error is that of a ratio of sums over documents (documents, not tokens, are the independent units).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import stats

from moekit._intervals import ratio_standard_error
from moekit._progress import Progress
from moekit._validation import parse_file
from moekit.data import vocabulary
from moekit.evaluation.likelihood import Scorer, evaluating
from moekit.evaluation.windows import BatchLike, Corpus, TokenizedLike, by_length, from_batches, from_documents


class DomainPerplexity(BaseModel):
    """Perplexity over the documents of one domain, or over all.

    Attributes:
        domain: its name.
        documents: documents with at least one scored token.
        tokens: scored tokens.
        nll: mean negative log likelihood of a token, nats.
        standard_error: of `nll`, over documents; None with a single document.
        perplexity: exp(nll).
        low: lower end of its 95 % interval; None with a single document.
        high: upper end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    documents: int
    tokens: int
    nll: float
    standard_error: float | None
    perplexity: float
    low: float | None
    high: float | None


# More than any text has; squares of it are numbers still.
_MOST_NATS = 1e15


class PerplexityResult(BaseModel):
    """Likelihood of each document under one model.

    Attributes:
        domains: domain of each document.
        tokens: scored tokens of each document; 0 for a document of one token.
        nll: summed negative log likelihood of each document's scored tokens, nats.
        model: what was measured, for people.
        digests: of each document's token ids; empty where the documents are not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    domains: tuple[str, ...]
    tokens: tuple[Annotated[int, Field(ge=0, le=2**53)], ...]
    nll: tuple[Annotated[float, Field(ge=-_MOST_NATS, le=_MOST_NATS)], ...] = Field(
        description="nats, summed over the document's scored tokens"
    )
    model: str = ""
    digests: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _same_length(self) -> PerplexityResult:
        if not len(self.domains) == len(self.tokens) == len(self.nll):
            raise ValueError("domains, tokens and nll must be of one length")
        if len(self.digests) not in (0, len(self.domains)):
            raise ValueError("there must be a digest for each document, or none")
        if not any(self.tokens):
            raise ValueError("no document has a scored token")
        return self

    def only(self, chosen: Sequence[int]) -> PerplexityResult:
        """Some of the documents, by number."""
        return PerplexityResult(
            domains=tuple(self.domains[i] for i in chosen),
            tokens=tuple(self.tokens[i] for i in chosen),
            nll=tuple(self.nll[i] for i in chosen),
            model=self.model,
            digests=tuple(self.digests[i] for i in chosen) if self.digests else (),
        )

    @property
    def overall(self) -> DomainPerplexity:
        """Perplexity over all documents; its domain is called "all"."""
        return self._over("all", range(len(self.domains)))

    def per_domain(self) -> tuple[DomainPerplexity, ...]:
        """Perplexity of each domain, in order of first appearance; domains without a scored token are left out."""
        return tuple(
            self._over(name, chosen) for name, chosen in self.indices().items() if any(self.tokens[i] for i in chosen)
        )

    def indices(self) -> dict[str, list[int]]:
        """Which documents belong to each domain."""
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.domains):
            found.setdefault(name, []).append(i)
        return found

    def _over(self, name: str, chosen: Iterable[int]) -> DomainPerplexity:
        rows = [i for i in chosen if self.tokens[i]]
        tokens_N = np.array([self.tokens[i] for i in rows], dtype=np.float64)
        nll_N = np.array([self.nll[i] for i in rows], dtype=np.float64)
        mean = float(nll_N.sum() / tokens_N.sum())
        error = ratio_standard_error(nll_N, tokens_N)
        margin = None if error is None else float(stats.t.ppf(0.975, len(rows) - 1)) * error
        return DomainPerplexity(
            domain=name,
            documents=len(rows),
            tokens=int(tokens_N.sum()),
            nll=mean,
            standard_error=error,
            perplexity=bounded_exp(mean),
            low=None if margin is None else bounded_exp(mean - margin),
            high=None if margin is None else bounded_exp(mean + margin),
        )

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        from moekit.checkpoint.atomic import atomic_write

        atomic_write(Path(path), self.model_dump_json(indent=1))

    @classmethod
    def load(cls, path: str | Path) -> PerplexityResult:
        """Read what `save` wrote.

        Raises:
            BadData: the file is missing, damaged or something else.
        """
        hint = "give a file that `moekit evaluate` wrote"
        return parse_file(cls, path, what="perplexity result", missing=hint, hint=hint)


def bounded_exp(value: float) -> float:
    """exp(value), held between 1e-300 and 1e300: beyond that it overflows, and such a number says the same."""
    return math.exp(max(-690.0, min(value, 690.0)))


def perplexity(
    model: Any,
    batches: Iterable[BatchLike],
    domains: Sequence[str] | None = None,
    *,
    batch_tokens: int | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measure a model on ready batches; no document sees another one, and padding is never counted.

    Args:
        model: causal language model of transformers, on any device; its mode is restored afterwards.
        batches: what `moekit.data.batches` yields; rows may hold several documents.
        domains: names of the batches' domain numbers; by default what the batches say.
        batch_tokens: rows times longest row of one forward; by default 2,048 on CPU and 16,384 elsewhere.
        name: what to call the model in tables.
        progress: told of each scored token.

    Returns:
        One entry per document, in order of appearance.

    Raises:
        BadData: no document has two tokens.
        BadConfig: a token id that the model does not embed.
        NumericFault: NaN or infinite likelihood.
    """
    return _measure(model, from_batches(batches, domains), batch_tokens, name, progress)


def perplexity_of_documents(
    model: Any,
    documents: Iterable[TokenizedLike],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measure a model on tokenized documents, long ones in sliding windows, so that every token but the first counts.

    Args:
        model: causal language model of transformers, on any device; its mode is restored afterwards.
        documents: what `moekit.data.tokenize` gives.
        window: longest piece in tokens; by default 1,024 or the model's own limit if that is less.
        stride: tokens between windows, half a window by default; see `moekit.evaluation.windows.slide`.
        batch_tokens: rows times longest row of one forward; by default 2,048 on CPU and 16,384 elsewhere.
        name: what to call the model in tables.
        progress: told of each scored token.

    Returns:
        One entry per document, in the order given.

    Raises:
        BadData: no document has two tokens.
        BadConfig: impossible windows, or a token id that the model does not embed.
        NumericFault: NaN or infinite likelihood.
    """
    if window is None:
        window = min(1024, int(getattr(model.config, "max_position_embeddings", None) or 1024))
    return _measure(model, from_documents(documents, window, stride), batch_tokens, name, progress)


def _measure(
    model: Any, corpus: Corpus, batch_tokens: int | None, name: str, progress: Progress | None
) -> PerplexityResult:
    vocabulary.check(max(max(max(w.inputs), max(w.targets)) for w in corpus.windows), vocabulary.embedding_rows(model))
    scorer = Scorer(model)
    if batch_tokens is None:
        batch_tokens = 2048 if scorer.device.type == "cpu" else 16384
    tokens = [0] * len(corpus.domains)
    nll = [0.0] * len(corpus.domains)
    if progress is not None:
        progress.start("evaluating", sum(len(w.targets) for w in corpus.windows))
    try:
        with evaluating(model):
            for group in by_length(corpus.windows, batch_tokens):
                for window, scores in zip(group, scorer(group), strict=True):
                    tokens[window.document] += len(window.targets)
                    nll[window.document] += float(scores.nll_M.sum())
                if progress is not None:
                    progress.advance(sum(len(w.targets) for w in group))
    finally:
        if progress is not None:
            progress.finish()
    return PerplexityResult(
        domains=corpus.domains, tokens=tuple(tokens), nll=tuple(nll), model=name, digests=corpus.digests
    )
