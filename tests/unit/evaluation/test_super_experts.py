"""Whether a model breaks without its super experts: the judgement by hand, the figures by a slow way, the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.measuring import geometries_of
from moekit.diagnose.super_experts.finding import find_super_experts
from moekit.diagnose.super_experts.report import SHARED, SuperExpertReport
from moekit.errors import BadConfig, BadData
from moekit.evaluation import Comparison, Evaluation, PerplexityResult, compare, perplexity_of_documents
from moekit.evaluation.super_expert_study import STUDY_FILE, SuperExpertStudy
from moekit.evaluation.super_experts import RANDOM, SuperExpertCheck, check_super_experts, judge
from tests.families import build
from tests.unit.diagnose.super_experts.test_super_experts import CODE, example
from tests.unit.evaluation.test_skipping import documents, zeroed

TOKENS = tuple(range(40, 60))


def comparison(loss: float, noise: float = 0.02, documents: int = 20) -> Comparison:
    """A model that loses so many nats a token, the same on every document but for some noise."""
    sizes = TOKENS[:documents]
    shift = np.random.default_rng(0).normal(0, noise, documents)
    texts = [
        PerplexityResult(
            domains=("x",) * documents,
            tokens=sizes,
            nll=tuple(float(n * (2 + extra)) for n, extra in zip(sizes, extras, strict=True)),
        )
        for extras in (np.zeros(documents), loss + shift)
    ]
    return compare(Evaluation(name="a", perplexity=texts[0]), Evaluation(name="b", perplexity=texts[1]))


def test_the_judgement_by_hand() -> None:
    big, small, none = comparison(math.log(2)), comparison(math.log(1.2)), comparison(0.0)
    assert judge(big, big) == "breaks"
    assert judge(small, small) == "suffers"
    # A loss that others cost as well says nothing of these.
    assert judge(big, none) == "as others"
    assert judge(none, none) == "holds"
    assert judge(comparison(-1.0), comparison(-1.0)) == "holds"
    # Twice the perplexity on average, but the documents differ so much that the interval reaches below 1.5.
    assert judge(comparison(math.log(2), noise=0.8), big) == "suffers"
    assert judge(comparison(1.0, documents=1), comparison(1.0, documents=1)) == "unknown"


@pytest.mark.parametrize(("family", "pairs"), [("mixtral", [(0, 1), (1, 2)]), ("deepseek_v3", [(1, SHARED), (2, 3)])])
def test_figures_are_those_of_stock_models_with_zeroed_experts(
    tmp_path: Path, family: str, pairs: list[tuple[int, int]]
) -> None:
    build(family).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    check = check_super_experts(
        checkpoint, documents(), pairs, geometries=geometries_of(checkpoint), source="text", draws=3, seed=5, window=64
    )
    assert check.pairs == tuple(pairs)
    assert [control.seed for control in check.controls] == [5, 6, 7]

    def slow(gone: list[tuple[int, int]]) -> PerplexityResult:
        return perplexity_of_documents(zeroed(tmp_path, gone), documents(), window=64)

    unchanged, without = slow([]), slow(pairs)
    assert check.without.overall is not None
    assert check.without.overall.a.perplexity == pytest.approx(unchanged.overall.perplexity, rel=1e-5)
    assert check.without.overall.b.perplexity == pytest.approx(without.overall.perplexity, rel=1e-5)
    controls = []
    for control in check.controls:
        assert len(control.pairs) == 2
        assert not set(control.pairs) & set(pairs)
        assert sum(expert == SHARED for _, expert in control.pairs) == sum(expert == SHARED for _, expert in pairs)
        controls.append(slow(list(control.pairs)))
        assert control.text.overall is not None
        assert control.text.overall.b.perplexity == pytest.approx(controls[-1].overall.perplexity, rel=1e-5)
    mean = math.exp(sum(sum(c.nll) for c in controls) / 3 / sum(unchanged.tokens))
    assert check.against.overall is not None
    assert check.against.overall.a.perplexity == pytest.approx(mean, rel=1e-5)
    difference = check.against.overall.difference
    assert difference is not None
    assert difference.ratio == pytest.approx(without.overall.perplexity / mean, rel=1e-5)
    assert f"perplexity {unchanged.overall.perplexity:.4g} becomes" in check.verdict
    assert "mean of 3 draws" in check.verdict
    assert set(check.largest) == {"unchanged", "without super experts", RANDOM}


def test_what_was_measured_is_not_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moekit.evaluation.super_experts as module

    build("mixtral").save_pretrained(tmp_path / "moe")
    checkpoint = Checkpoint.open(tmp_path / "moe")

    def run(**changes: object) -> SuperExpertCheck:
        options = {"geometries": geometries_of(checkpoint), "draws": 1, "folder": tmp_path / "scratch", "window": 64}
        return check_super_experts(checkpoint, documents(), [(0, 1)], **options | changes)  # type: ignore[arg-type]

    first = run()
    monkeypatch.setattr(module, "compare_without", lambda *a, **k: pytest.fail("measured again"))
    assert run() == first
    for changes in ({"seed": 1}, {"draws": 2}, {"window": 32}):
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            run(**changes)


def test_too_few_others_are_refused(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    most = [(layer, expert) for layer in (0, 1) for expert in range(8)][:9]
    with pytest.raises(BadConfig, match="9 other experts are wanted, but there are 7"):
        check_super_experts(checkpoint, documents(), most, geometries=geometries_of(checkpoint))


def report() -> SuperExpertReport:
    return find_super_experts(example(), **CODE, model="m", fingerprint="1" * 64)


def test_the_file_survives_the_disk_and_says_what_to_protect(tmp_path: Path) -> None:
    study = SuperExpertStudy.of(report(), (), "a text")
    study.save(tmp_path / STUDY_FILE)
    assert SuperExpertStudy.load(tmp_path / STUDY_FILE) == SuperExpertStudy.load(tmp_path) == study
    told = json.loads((tmp_path / STUDY_FILE).read_text())
    assert told["kind"] == "super-experts"
    assert told["protect"] == {"1": [7], "2": [3]}
    with pytest.raises(BadData, match="no report here"):
        SuperExpertStudy.load(tmp_path / "none.json")
    (tmp_path / STUDY_FILE).write_text('{"kind": "super-experts", "protect": {}}')
    with pytest.raises(BadData, match="damaged report: report: Field required"):
        SuperExpertStudy.load(tmp_path)
