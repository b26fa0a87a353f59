from __future__ import annotations

import math

import pytest
import torch

from moekit.data.batches import TokenizedDocument, batches
from moekit.errors import BadConfig, BadData, NumericFault, OutOfBudget
from moekit.evaluation import likelihood
from moekit.evaluation.documents import PerplexityResult, perplexity, perplexity_of_documents
from moekit.evaluation.likelihood import Scorer
from moekit.evaluation.windows import Window
from tests.families import FAMILIES, VOCAB, build


def documents(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenizedDocument(torch.randint(3, VOCAB, (n,), generator=generator).tolist(), "abc"[i % 3], i)
        for i, n in enumerate(lengths)
    ]


def reference(model, ids, window=None, stride=None):
    """Sum of -log p, one document at a time, without any batching, by transformers' own logits."""
    total, done, begin = 0.0, 1, 0
    window = window or len(ids)
    while done < len(ids):
        end = min(begin + window, len(ids))
        begin = max(0, end - window)
        with torch.no_grad():
            logp = model(torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(-1)
        for t in range(done, end):
            total -= float(logp[t - 1 - begin, ids[t]])
        done, begin = end, begin + (stride or window)
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_document_at_a_time_for_every_family(family):
    model = build(family).eval()
    docs = documents([9, 2, 17, 5, 17, 1])
    result = perplexity_of_documents(model, docs, batch_tokens=40)
    for document, tokens, nll in zip(docs, result.tokens, result.nll, strict=True):
        assert tokens == len(document.ids) - 1
        assert nll == pytest.approx(reference(model, document.ids), rel=1e-5, abs=1e-5)


def test_sliding_windows_equal_the_reference_and_more_context_changes_the_result():
    model = build("mixtral").eval()
    docs = documents([40, 23])
    result = perplexity_of_documents(model, docs, window=12, stride=5, batch_tokens=24)
    for document, nll in zip(docs, result.nll, strict=True):
        assert nll == pytest.approx(reference(model, document.ids, 12, 5), rel=1e-5)
    assert result.tokens == (39, 22)
    assert result.nll != pytest.approx(perplexity_of_documents(model, docs).nll, rel=1e-6)


def test_packed_batches_give_what_single_documents_give():
    model = build("qwen3_moe").eval()
    docs = documents([6, 6, 6, 6, 6, 6])
    alone = perplexity_of_documents(model, docs)
    packed = perplexity(model, batches(sorted(docs, key=lambda d: d.domain), 2, seq_len=12, pad_id=0))
    assert sorted(packed.nll) == pytest.approx(sorted(alone.nll), rel=1e-6), "no document saw its neighbour"
    assert packed.overall.tokens == alone.overall.tokens


def test_padding_in_a_batch_changes_nothing():
    model = build("olmoe").eval()
    docs = documents([4, 9])
    padded = perplexity(model, batches(docs, 2, seq_len=16, pad_id=3, pad=True))
    assert padded.tokens == (3, 8)
    assert padded.nll == pytest.approx([reference(model, d.ids) for d in docs], rel=1e-5)


def test_figures_by_hand():
    result = PerplexityResult(domains=("x", "x", "y"), tokens=(2, 2, 4), nll=(2.0, 4.0, 8.0))
    x, y = result.per_domain()
    assert (x.domain, x.documents, x.tokens, x.nll) == ("x", 2, 4, 1.5)
    assert x.perplexity == pytest.approx(math.exp(1.5))
    # Residuals are -1 and 1: sqrt(2/1 * 2) / 4 = 0.5; t with one degree of freedom at 97.5 % is 12.7062.
    assert x.standard_error == pytest.approx(0.5)
    assert x.low == pytest.approx(math.exp(1.5 - 12.7062 * 0.5), rel=1e-4)
    assert (y.standard_error, y.low, y.high) == (None, None, None)
    assert result.overall.nll == pytest.approx(14 / 8)
    assert result.overall.domain == "all"


def test_domains_with_nothing_scored_are_left_out():
    result = perplexity_of_documents(build("mixtral"), documents([5, 1]))
    assert [d.domain for d in result.per_domain()] == ["a"]
    assert result.overall.documents == 1
    with pytest.raises(BadData, match="two tokens"):
        perplexity_of_documents(build("mixtral"), documents([1]))


def test_a_token_that_the_model_does_not_embed_is_refused_before_the_first_forward():
    model = build("mixtral")
    model.forward = None
    with pytest.raises(BadConfig, match=f"token ids up to {VOCAB}"):
        perplexity_of_documents(model, [TokenizedDocument([1, VOCAB], "x", 0)])


def test_nan_is_a_numeric_fault():
    model = build("mixtral")
    model.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(NumericFault, match="not finite"):
        perplexity_of_documents(model, documents([6]))


def test_the_mode_is_restored_and_training_goes_on():
    model = build("qwen2_moe").train()
    model.lm_head.eval()
    perplexity_of_documents(model, documents([6, 7]))
    assert model.training
    assert not model.lm_head.training
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("gate.weight"))


def window(n):
    return Window.of(list(range(3, 3 + n)), 1, 0)


def test_the_head_is_split_off_where_that_is_exact_and_only_there():
    plain, scaled = build("mixtral").eval(), build("granitemoe").eval()
    scaled.config.logits_scaling = scaled.logits_scaling = 7.0
    for model, apart in ((plain, True), (scaled, False)):
        scorer = Scorer(model, chunk_bytes=4 * VOCAB * 3)
        with torch.inference_mode():
            scores = scorer([window(9), window(4), window(12)])
            assert scorer.apart is apart
            assert scorer([window(9)])[0].nll_M.tolist() == pytest.approx(scores[0].nll_M.tolist(), rel=1e-5)
        assert [len(s.nll_M) for s in scores] == [8, 3, 11], "in the order given"
        assert float(scores[2].nll_M.sum()) == pytest.approx(reference(model, list(range(3, 15))), rel=1e-5)


def test_whole_logits_stay_within_their_budget(monkeypatch):
    model = build("granitemoe").eval()
    model.config.logits_scaling = model.logits_scaling = 7.0
    monkeypatch.setattr(likelihood, "WHOLE_BYTES", 4 * VOCAB * 20)
    cells = []
    model.register_forward_hook(lambda m, a, out: cells.append(out.logits.shape[:2].numel()))
    Scorer(model)([window(8)] * 9)
    assert max(cells) <= 20
    assert sum(cells) == 9 * 7


def test_out_of_memory_is_tried_in_halves_then_named(monkeypatch):
    model = build("mixtral").eval()
    scorer = Scorer(model)
    whole = scorer([window(8), window(9), window(10)])
    original = scorer._score

    def crowded(windows):
        if len(windows) > 1:
            raise torch.OutOfMemoryError("no room")
        return original(windows)

    monkeypatch.setattr(scorer, "_score", crowded)
    halved = scorer([window(8), window(9), window(10)])
    for x, y in zip(whole, halved, strict=True):
        assert x.nll_M.tolist() == pytest.approx(y.nll_M.tolist(), rel=1e-5)

    def full(windows):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(scorer, "_score", full)
    with pytest.raises(OutOfBudget, match="8 tokens"):
        scorer([window(9)])

    def broken(windows):
        raise RuntimeError("something else")

    monkeypatch.setattr(scorer, "_score", broken)
    with pytest.raises(RuntimeError, match="something else"):
        scorer([window(9)])


def test_progress_counts_scored_tokens():
    class Told:
        total, got, over = None, 0, False

        def start(self, label, total):
            self.total = total

        def advance(self, amount=1, note=""):
            self.got += amount

        def finish(self):
            self.over = True

    told = Told()
    perplexity_of_documents(build("mixtral"), documents([6, 7, 20]), batch_tokens=16, progress=told)
    assert told.total == told.got == 5 + 6 + 19
    assert told.over


def test_results_survive_the_disk_and_damage_is_named(tmp_path):
    result = PerplexityResult(domains=("x",), tokens=(2,), nll=(0.1 + 0.2,), model="m")
    result.save(tmp_path / "r.json")
    assert PerplexityResult.load(tmp_path / "r.json") == result
    (tmp_path / "r.json").write_text('{"domains": ["x"], "tokens": [], "nll": []}')
    with pytest.raises(BadData, match="of one length"):
        PerplexityResult.load(tmp_path / "r.json")
    with pytest.raises(BadData):
        PerplexityResult.load(tmp_path / "none.json")
