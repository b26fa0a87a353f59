"""How close a model comes to the one it was made from: likelihood, divergence and top choice, document by document.

All three are taken in one pass, over rows that hold one document each, against a teacher's stored likeliest tokens; so
the teacher need not be in memory.

Legend: B rows, S positions, n tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from moekit._progress import Progress
from moekit.data.batches import TokenBatches
from moekit.errors import BadData, NumericFault
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.likelihood import evaluating, score_logits
from moekit.evaluation.pairs import PairedDifference, paired
from moekit.evaluation.windows import TextDigest
from moekit.training.batch import MicroBatch, TeacherOutput, TopLogProbs
from moekit.training.objectives.kd import bucket_divergences
from moekit.training.teacher import LiveTeacher
from moekit.training.teacher_store import StoredTeacher

_SLICE_BYTES = 64 << 20


class Closeness(BaseModel):
    """A model beside its parent, of each document.

    Attributes:
        text: likelihood of the documents.
        divergence: nats, summed over a document's scored tokens: KL divergence from the parent, all tokens that the
            store does not list counting as one.
        agreed: scored tokens after which both find the same next token likeliest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: PerplexityResult
    divergence: tuple[float, ...]
    agreed: tuple[int, ...]

    @property
    def mean_divergence(self) -> float:
        """Nats a token."""
        return sum(self.divergence) / sum(self.text.tokens)

    @property
    def agreement(self) -> float:
        """Share of tokens after which both find the same next token likeliest."""
        return sum(self.agreed) / sum(self.text.tokens)


class Closer(BaseModel):
    """What one model is closer to the parent than another, paired by document; None with one document.

    Attributes:
        divergence: b - a, nats a token; below zero is closer.
        agreement: b - a, share of tokens; above zero is closer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    divergence: PairedDifference | None
    agreement: PairedDifference | None


def closer(a: Closeness, b: Closeness, seed: int = 0) -> Closer:
    """Compare how close two models come to the same parent on the same documents."""
    size_N = np.array(a.text.tokens, dtype=np.float64)
    if len(size_N) < 2:
        return Closer(divergence=None, agreement=None)
    pairs = {"divergence": (a.divergence, b.divergence), "agreement": (a.agreed, b.agreed)}
    found = {
        name: paired(np.array(one) / size_N, np.array(other) / size_N, seed, weights=size_N)
        for name, (one, other) in pairs.items()
    }
    return Closer(**found)


@dataclass
class _Sums:
    """Of one document."""

    domain: str
    digest: TextDigest
    tokens: int = 0
    nll: float = 0.0
    divergence: float = 0.0
    agreed: int = 0


def closeness(
    model: PreTrainedModel,
    rows: TokenBatches,
    parent: StoredTeacher,
    *,
    batch: int = 4,
    name: str = "",
    progress: Progress | None = None,
) -> Closeness:
    """Measure a model on rows of which a parent's likeliest tokens are stored.

    Args:
        model: in any type and mode, which it keeps.
        rows: one document to a row, as `arrange(..., pad=True)` lays them out.
        parent: the store, of these rows.
        batch: rows of a pass.
        name: what to call the model in tables.
        progress: told of each row.

    Returns:
        One entry per document that has a token to score.

    Raises:
        BadConfig: the store is of other rows, or of a model that predicts other tokens.
        BadData: no document has two tokens.
        NumericFault: a likelihood or a divergence is NaN or infinite.
    """
    said = LiveTeacher(model, freeze=False)
    parent.check(rows, said.vocabulary)
    found: dict[int, _Sums] = {}
    done = 0
    if progress is not None:
        progress.start(f"measuring {name}".rstrip(), len(rows))
    try:
        with evaluating(model):
            for some in rows.batches(batch):
                own = MicroBatch(some.input_ids, some.attention_mask)
                numbers_B = torch.arange(done, done + len(some.input_ids))
                for row, figures in _scored(own, said.output(own, numbers_B), parent.output(own, numbers_B)):
                    domain = some.domains[int(some.domain_BS[row, 0])]
                    sums = found.setdefault(int(some.document_BS[row, 0]), _Sums(domain, TextDigest()))
                    _add(sums, own, row, figures)
                done += len(some.input_ids)
                if progress is not None:
                    progress.advance(len(some.input_ids))
    finally:
        if progress is not None:
            progress.finish()
    return _result(list(found.values()), name)


def _scored(batch: MicroBatch, own: TeacherOutput, parent: TeacherOutput) -> Iterator[tuple[int, Tensor]]:
    """Row -> likelihood, divergence and agreement of its scored tokens [3, n], fp64."""
    assert batch.ids_BS is not None
    assert batch.mask_BS is not None
    length = batch.ids_BS.shape[1]
    for row, mask_S in enumerate(batch.mask_BS):
        tokens = int(mask_S.sum())
        if tokens < 2:
            continue
        positions_n = torch.arange(tokens - 1) + row * length
        parts = [_figures(batch.ids_BS, own, parent, part_n) for part_n in torch.split(positions_n, _slice_of(own))]
        yield row, torch.cat(parts, dim=1)


def _slice_of(own: TeacherOutput) -> int:
    first = own.at(torch.zeros(1, dtype=torch.int64))
    assert isinstance(first, Tensor)
    return max(_SLICE_BYTES // (4 * first.shape[-1]), 1)


def _figures(ids_BS: Tensor, own: TeacherOutput, parent: TeacherOutput, part_n: Tensor) -> Tensor:
    logits_nV = own.at(part_n)
    listed = parent.at(part_n)
    assert isinstance(logits_nV, Tensor)
    assert isinstance(listed, TopLogProbs)
    told = TopLogProbs(listed.ids_NK.to(logits_nV.device), listed.values_NK.to(logits_nV.device))
    target_n = ids_BS.reshape(-1)[part_n + 1].to(logits_nV.device)
    nll_n, _ = score_logits(logits_nV, target_n)
    divergence_n = bucket_divergences(logits_nV, told)
    # Likeliest tokens may be several: 16 bits do not tell all of them apart.
    likeliest_nK = told.values_NK == told.values_NK[:, :1]
    agreed_n = ((told.ids_NK == logits_nV.argmax(-1, keepdim=True)) & likeliest_nK).any(-1).to(nll_n.dtype)
    return torch.stack([nll_n, divergence_n, agreed_n]).double().cpu()


def _add(sums: _Sums, batch: MicroBatch, row: int, figures_3n: Tensor) -> None:
    assert batch.ids_BS is not None
    count = figures_3n.shape[1]
    sums.digest.add(batch.ids_BS[row, : count + 1].tolist())
    nll, divergence, agreed = figures_3n.sum(dim=1).tolist()
    if not np.isfinite(nll + divergence):
        raise NumericFault(
            f"the likelihood of a document of {sums.domain} is not finite",
            hint="run `moekit check` on the checkpoint: a weight or a router's logits may be NaN",
        )
    sums.tokens, sums.nll = sums.tokens + count, sums.nll + nll
    sums.divergence, sums.agreed = sums.divergence + divergence, sums.agreed + round(agreed)


def _result(found: Sequence[_Sums], name: str) -> Closeness:
    if not found:
        raise BadData("no document has two tokens, so there is no next token to predict", hint="give longer documents")
    text = PerplexityResult(
        domains=tuple(sums.domain for sums in found),
        tokens=tuple(sums.tokens for sums in found),
        nll=tuple(sums.nll for sums in found),
        model=name,
        digests=tuple(str(sums.digest) for sums in found),
    )
    return Closeness(text=text, divergence=tuple(s.divergence for s in found), agreed=tuple(s.agreed for s in found))
