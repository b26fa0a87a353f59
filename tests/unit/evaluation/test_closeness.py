"""Likelihood, divergence and agreement with a parent, against sums written out document by document."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.data.batches import TokenizedDocument, arrange
from moekit.errors import BadConfig, BadData
from moekit.evaluation.closeness import closeness, closer
from moekit.training import StoredTeacher, store_teacher
from tests.families import VOCAB, build, logits

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = (5, 9, 1, 14, 7)
DOCUMENTS = [
    TokenizedDocument(torch.randint(3, VOCAB, (n,), generator=GENERATOR).tolist(), "ab"[i % 2], i)
    for i, n in enumerate(LENGTHS)
]
WINDOW = 10
ROWS = arrange(sorted(DOCUMENTS, key=lambda d: d.domain), WINDOW, pad=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoredTeacher:
    return store_teacher(build("qwen3_moe", seed=7), ROWS, tmp_path_factory.mktemp("store") / "said", top_k=VOCAB)


def test_figures_are_the_sums_written_out(store: StoredTeacher) -> None:
    model, parent = build("qwen3_moe").train(), build("qwen3_moe", seed=7)
    found = closeness(model, ROWS, store, batch=2)
    assert model.training
    expected = []
    for document in sorted(DOCUMENTS, key=lambda d: d.domain):
        sums = [0.0, 0.0, 0.0, 0.0]
        for start in range(0, len(document.ids), WINDOW):
            ids = torch.tensor([document.ids[start : start + WINDOW]])
            if ids.shape[1] < 2:
                continue
            q, p = (logits(m.eval(), ids).double().log_softmax(-1)[0, :-1] for m in (model, parent))
            sums[0] += ids.shape[1] - 1
            sums[1] -= float(q.gather(1, ids[0, 1:, None]).sum())
            sums[2] += float((p.exp() * (p - q)).sum())
            sums[3] += float((p.argmax(-1) == q.argmax(-1)).sum())
        if sums[0]:
            expected.append((document.domain, *sums))
    told = zip(found.text.domains, found.text.tokens, found.text.nll, found.divergence, found.agreed, strict=True)
    for got, wanted in zip(told, expected, strict=True):
        assert got[0] == wanted[0]
        assert got[1:] == pytest.approx(wanted[1:], rel=2e-3, abs=1e-4)
    tokens = sum(wanted[1] for wanted in expected)
    assert found.mean_divergence == pytest.approx(sum(w[3] for w in expected) / tokens, rel=2e-3)
    assert found.agreement == pytest.approx(sum(w[4] for w in expected) / tokens)


def test_a_parent_is_itself(store: StoredTeacher) -> None:
    itself = closeness(build("qwen3_moe", seed=7), ROWS, store)
    assert itself.mean_divergence == pytest.approx(0, abs=1e-5)
    assert itself.agreement == 1.0
    other = closeness(build("qwen3_moe"), ROWS, store)
    gap = closer(other, itself)
    assert gap.divergence is not None
    assert gap.agreement is not None
    assert gap.divergence.mean == pytest.approx(-other.mean_divergence, abs=1e-5)
    assert gap.agreement.mean == pytest.approx(1 - other.agreement)
    assert gap.divergence.high < 0


def test_other_rows_and_empty_text_are_refused(store: StoredTeacher, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="another text"):
        closeness(build("qwen3_moe"), arrange(DOCUMENTS[:1], WINDOW, pad=True), store)
    single = arrange([TokenizedDocument([5], "a", 0), TokenizedDocument([6], "a", 1)], WINDOW, pad=True)
    said = store_teacher(build("qwen3_moe"), single, tmp_path / "said", top_k=2)
    with pytest.raises(BadData, match="two tokens"):
        closeness(build("qwen3_moe"), single, said)


def test_one_document_has_no_interval(tmp_path: Path) -> None:
    rows = arrange(DOCUMENTS[:1], WINDOW, pad=True)
    model = build("qwen3_moe")
    said = store_teacher(model, rows, tmp_path / "said", top_k=4)
    found = closeness(model, rows, said)
    assert closer(found, found).divergence is None
