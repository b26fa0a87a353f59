"""The bench of pruning methods: one pass, every method as if it had been run alone, nothing measured twice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit import catalogue
from moekit.bench.pruning import (
    Entry,
    PruneBenchResult,
    PruneBenchSetting,
    PruneRun,
    Subject,
    bench_pruning,
    calibration as calibration_module,
    measuring as measuring_module,
    rank,
)
from moekit.bench.pruning.calibration import calibrate
from moekit.bench.pruning.joining import joined
from moekit.bench.pruning.ranking import all_rankings, part, removed
from moekit.bench.pruning.setting import default_entries
from moekit.bench.pruning.text import Passage, count, take_tokens
from moekit.catalogue import method
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.plan import make_method
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import PlanRequest
from moekit.data.batches import TokenizedDocument, arrange
from moekit.data.text import Document
from moekit.errors import BadConfig, BadData, UnsupportedModel
from moekit.evaluation.changes import Variant
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.variants import compare_variants
from moekit.trace.streamed import record_streamed
from tests.checkpoints import plain
from tests.families import tokens

pytestmark = [pytest.mark.full, pytest.mark.slow]


def documents(count: int, length: int, seed: int) -> list[TokenizedDocument]:
    """Two domains whose tokens lie in different halves of the vocabulary."""
    drawn = tokens(2 * count, length, seed=seed)
    low = [TokenizedDocument((row % 60 + 3).tolist(), "low", i) for i, row in enumerate(drawn[:count])]
    high = [TokenizedDocument((row % 60 + 64).tolist(), "high", count + i) for i, row in enumerate(drawn[count:])]
    return low + high


CALIBRATION, HELDOUT = documents(3, 24, 1), documents(3, 14, 2)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(Checkpoint.open(plain(tmp_path_factory.mktemp("model") / "m", "qwen2_moe")), text="made up")


def setting(*methods: str, **changes: Any) -> PruneBenchSetting:
    return PruneBenchSetting(
        entries=default_entries(methods), **{"keep": (0.75, 0.5), "seq_len": 16, "window": 16} | changes
    )


def bench(subject: Subject, asked: PruneBenchSetting, folder: Path) -> PruneBenchResult:
    return bench_pruning(subject, CALIBRATION, HELDOUT, asked, folder)


def alone(subject: Subject, name: str, keep: float, text: list[TokenizedDocument], seed: int = 0) -> PerplexityResult:
    """A method as it is run on its own: a pass for it alone, a plan, the model compared."""
    method = make_method("prune", name, {})
    batches = arrange(text, 16).batches(4)
    trace = record_streamed(subject.checkpoint, batches, statistics=("load", *method.required))
    plan = plan_weights(subject.checkpoint, trace, PlanRequest(method, Budget(keep=keep), seed=seed))

    geometries = geometries_of(subject.checkpoint)

    def rewrite(layer: int, weights: Any) -> Any:
        inputs = LayerInputs(layer, geometries[layer], plan.statistics[layer], lambda: weights, seed)
        return method.transform(weights, plan.outcomes[layer], inputs)

    variant = Variant(name, plan.outcomes, rewrite if method.rewrites else None)
    _, [result] = compare_variants(subject.checkpoint, HELDOUT, [variant], window=16)
    return result.perplexity


@pytest.fixture(scope="module")
def found(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> PruneBenchResult:
    asked = setting("reap", "stun", "uncurl", "naee", domains=("high",), seeds=3)
    return bench(subject, asked, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", ["frequency", "reap", "stun"])
def test_each_method_costs_what_it_costs_alone(name: str, subject: Subject, found: PruneBenchResult) -> None:
    for calibration, text in (("all", CALIBRATION), ("high", CALIBRATION[3:])):
        for keep in (0.75, 0.5):
            [run] = found.select(name, keep, calibration)
            expected = alone(subject, name, keep, text)
            assert run.perplexity.nll == pytest.approx(expected.nll, abs=1e-4), (calibration, keep)
            assert set(run.experts.values()) == {int(8 * keep)}


def test_random_runs_with_each_seed_and_the_others_once(subject: Subject, found: PruneBenchResult) -> None:
    runs = found.select("random", 0.5)
    assert [run.seed for run in runs] == [0, 1, 2]
    assert len({run.perplexity.nll for run in runs}) == 3
    for run in runs:
        expected = alone(subject, "random", 0.5, CALIBRATION, run.seed)
        assert run.perplexity.nll == pytest.approx(expected.nll, abs=1e-4)
    assert all(len(found.select(name, 0.5)) == 1 for name in ("frequency", "reap", "stun", "naee"))
    assert len(found.select("uncurl", 0.5)) == 3, "k-means draws its first centres"
    nll = [run.perplexity.overall.nll for run in runs]
    ranking = found.ranking(0.5)
    assert ranking is not None
    row = ranking.row("random")
    assert row is not None
    assert (row.seeds, row.least, row.most) == (3, min(nll), max(nll))
    assert row.nll == pytest.approx(statistics.fmean(nll))
    assert row.spread == pytest.approx(statistics.stdev(nll))


def test_one_pass_over_the_text_serves_all_methods_and_all_texts(subject: Subject, tmp_path: Path) -> None:
    asked = setting(domains=("high",))
    calibrated = calibrate(subject, CALIBRATION, asked, ("load", "gate_mass", "domain_load"), tmp_path)
    assert {name: trace.meta.tokens for name, trace in calibrated.traces.items()} == {"all": 144, "high": 72}
    whole = record_streamed(
        subject.checkpoint,
        arrange(CALIBRATION[3:] + CALIBRATION[:3], 16).batches(4),
        statistics=("load", "gate_mass", "domain_load"),
    )
    assert whole.statistics is not None
    for layer, named in calibrated.traces["all"].require(("load", "gate_mass", "domain_load")).items():
        for name, value in named.items():
            torch.testing.assert_close(value, whole.statistics[layer][name], rtol=1e-5, atol=1e-6)
    told = calibrated.describe("all")
    assert told.domains == {"high": 72, "low": 72}
    assert (told.tokens, told.documents) == (144, 6)


def test_what_was_measured_is_not_measured_again(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring_module, "MOST_TOGETHER", 2)
    own, asked, died = compare_variants, [], []

    def dies(checkpoint: Any, heldout: Any, variants: Any, **options: Any) -> Any:
        if len(asked) == 2 and not died:
            died.append(True)
            raise KeyboardInterrupt
        asked.append(len(variants))
        return own(checkpoint, heldout, variants, **options)

    monkeypatch.setattr(measuring_module, "compare_variants", dies)
    wanted = setting("reap", "naee", seeds=2)
    with pytest.raises(KeyboardInterrupt):
        bench(subject, wanted, tmp_path)
    first = bench(subject, wanted, tmp_path)
    # No group twice: two and two before the run was ended, and then only what was missing.
    kept = len(list(next(tmp_path.glob("measured-*")).glob("*.json"))) - 1
    assert sum(asked) == kept
    assert kept <= len(first.runs) == 2 * (2 + 3)
    for name, module in (("record_streamed", calibration_module), ("compare_variants", measuring_module)):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it was done already"))
    again = bench(subject, wanted, tmp_path)
    assert again.unchanged == first.unchanged
    assert [(r.name, r.perplexity) for r in again.runs] == [(r.name, r.perplexity) for r in first.runs]
    assert [row.nll for r in again.rankings for row in r.rows] == [row.nll for r in first.rankings for row in r.rows]


def test_passages_are_not_told_as_documents(subject: Subject, tmp_path: Path) -> None:
    def pieces(documents: list[TokenizedDocument]) -> list[TokenizedDocument]:
        return [Passage(d.ids, d.domain, d.index, 0) if d.domain == "low" else d for d in documents]

    asked = setting(keep=(0.5,), seeds=1, domains=("high",))
    result = bench_pruning(subject, pieces(CALIBRATION), pieces(HELDOUT), asked, tmp_path)
    [cut] = result.cuts
    assert (cut.domain, cut.passages, cut.documents) == ("low", 3, 1)
    whole, high = result.calibrations
    assert (whole.documents, whole.passages) == (4, 6)
    assert (high.documents, high.passages) == (3, None)
    assert bench_pruning(subject, CALIBRATION, HELDOUT, asked, tmp_path).cuts == ()


def test_another_heldout_text_is_measured_anew(subject: Subject, tmp_path: Path) -> None:
    asked = setting(keep=(0.5,), seeds=1)
    first = bench_pruning(subject, CALIBRATION, HELDOUT, asked, tmp_path)
    other = bench_pruning(subject, CALIBRATION, HELDOUT[:2], asked, tmp_path)
    assert len(other.unchanged.nll) == 2
    assert other.runs[0].perplexity.nll == pytest.approx(first.runs[0].perplexity.nll[:2], abs=1e-4)


@pytest.fixture
def broken() -> Iterator[str]:
    @catalogue.register(name="broken", kind="prune", changes="weights")
    class Broken(PruneMethod):
        """Refuses every model."""

        def score(self, inputs: LayerInputs) -> Tensor:
            raise UnsupportedModel("cannot be done here", layer=inputs.layer)

    yield "broken"
    method._records.pop(("prune", "broken"))


def test_a_method_that_refuses_the_model_is_told_of_and_the_others_go_on(
    subject: Subject, tmp_path: Path, broken: str
) -> None:
    result = bench(subject, setting(broken, keep=(0.5,), seeds=1), tmp_path)
    [skipped] = result.skipped
    assert (skipped.name, skipped.calibration) == ("broken", "all")
    assert "cannot be done here" in skipped.reason
    assert {run.name for run in result.runs} == {"random", "frequency"}


def test_a_method_that_follows_its_own_changes_is_left_out_and_says_how_it_takes_part(
    subject: Subject, tmp_path: Path
) -> None:
    """All decide on one pass over the model as it is: under its name would stand what it does not do."""
    result = bench(subject, setting("ream", keep=(0.5,), seeds=1), tmp_path)
    [skipped] = result.skipped
    assert skipped.name == "ream"
    assert "--set ream.mode=layerwise" in skipped.reason
    assert {run.name for run in result.runs} == {"random", "frequency"}


@pytest.fixture
def unmade() -> Iterator[str]:
    @catalogue.register(name="unmade", kind="prune", changes="weights")
    class Unmade(PruneMethod):
        """Fails when weights are made."""

        rewrites = True

        def score(self, inputs: LayerInputs) -> Tensor:
            return torch.arange(inputs.experts, dtype=torch.float64)

        def transform(self, weights: Any, outcome: Any, inputs: LayerInputs) -> Any:
            raise UnsupportedModel("no new weights", layer=inputs.layer)

    yield "unmade"
    method._records.pop(("prune", "unmade"))


def test_a_method_that_fails_beside_others_takes_none_of_them_along(
    subject: Subject, tmp_path: Path, unmade: str
) -> None:
    result = bench(subject, setting(unmade, seeds=1), tmp_path)
    [skipped] = result.skipped
    assert "no new weights" in skipped.reason
    assert len(result.runs) == 4


def test_impossible_budgets_and_unknown_names_are_refused_before_the_work(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="every token chooses 2"):
        bench(subject, setting(keep=(1,)), tmp_path / "a")
    with pytest.raises(BadConfig, match="there are 8"):
        bench(subject, setting(keep=(9,)), tmp_path / "b")
    with pytest.raises(BadData, match="no domain nowhere"):
        bench(subject, setting(domains=("nowhere",)), tmp_path / "c")
    with pytest.raises(BadConfig, match="'reab'"):
        default_entries(["reab"])
    with pytest.raises(BadConfig, match="takes no part"):
        default_entries(["reap"], {"dern": {"alpha": 0.1}})
    with pytest.raises(BadConfig, match="alpha"):
        bench(subject, PruneBenchSetting(entries=(Entry(method="dern", settings={"alpha": 9}),)), tmp_path / "d")
    with pytest.raises(ValueError, match="named twice"):
        setting(keep=(0.5, 0.5))
    assert not list(tmp_path.glob("*/measured-*"))


def test_entries_are_named_by_what_differs() -> None:
    assert Entry(method="dern", settings={"init": "gate", "alpha": 0.1}).name == "dern (init=gate, alpha=0.1)"
    assert [e.name for e in default_entries(["reap"])] == ["random", "frequency", "reap"]
    every = {record.name for record in catalogue.methods("prune")}
    assert {e.name for e in default_entries()} == every


# Two documents of 10 and 30 tokens in "a", one of 20 in "b".
def made(name: str, nll: tuple[float, float, float], method: str = "", seed: int = 0, **changes: Any) -> PruneRun:
    return PruneRun(
        **{
            "name": name,
            "method": method or name,
            "settings": {},
            "keep": 0.5,
            "seed": seed,
            "calibration": "all",
            "perplexity": text(nll),
            "experts": {0: 4},
            "reconstruction": {0: 0.25, 1: 0.75},
            "lost_tokens": {0: 0.5, 1: 0.0},
            "lost_choices": {0: 0.25, 1: 0.0},
            "bytes": 100,
            "decide_seconds": 1.0,
            "rewrite_seconds": 2.0,
        }
        | changes
    )


def text(nll: tuple[float, float, float]) -> PerplexityResult:
    return PerplexityResult(domains=("a", "a", "b"), tokens=(10, 30, 20), nll=nll)


def by_hand(*runs: PruneRun, domains: tuple[str, ...] = ()) -> PruneBenchResult:
    return PruneBenchResult(
        model="m",
        fingerprint="f",
        experts={0: 8},
        top_k=2,
        bytes=200,
        setting=PruneBenchSetting(entries=default_entries([]), keep=(0.5,), domains=domains),
        calibrations=(),
        calibration_seconds=0.0,
        unchanged=text((10.0, 30.0, 20.0)),
        runs=runs,
    )


def test_rankings_by_hand() -> None:
    result = by_hand(
        made("random", (30.0, 90.0, 40.0), seed=0),
        made("random", (50.0, 90.0, 60.0), seed=1),
        made("frequency", (20.0, 60.0, 30.0)),
        made("reap", (12.0, 36.0, 30.0)),
    )
    ranking = rank(result, 0.5)
    assert ranking is not None
    assert ranking.unchanged == 1.0
    assert [row.name for row in ranking.rows] == ["reap", "frequency", "random"]
    reap, frequency, random = ranking.rows
    # Random's mean is (40, 90, 50): it rises by (30, 60, 30) = 120, reap by (2, 6, 10) = 18, frequency by 50.
    assert random.nll == 3.0
    assert random.spread == pytest.approx(statistics.stdev([160 / 60, 200 / 60]))
    assert random.removed is None
    assert reap.removed is not None
    assert reap.removed.mean == pytest.approx(1 - 18 / 120)
    assert frequency.removed is not None
    assert frequency.removed.mean == pytest.approx(1 - 50 / 120)
    assert reap.rise is not None
    assert reap.rise.mean == pytest.approx(18 / 60)
    assert reap.against_random is not None
    assert reap.against_random.mean == pytest.approx((78 - 180) / 60)
    assert reap.against_frequency is not None
    assert reap.against_frequency.mean == pytest.approx((78 - 110) / 60)
    assert frequency.against_frequency is None
    assert (reap.reconstruction, reap.lost_tokens, reap.seconds) == (0.5, 0.25, 3.0)
    # Three documents: Student's interval. Residuals 2 - 0.15 * 30, 6 - 0.15 * 60 and 10 - 0.15 * 30 have squares of sum
    # 45.5; t with 2 degrees of freedom is 4.302653. No resample goes beyond the single documents' shares.
    margin = 4.302653 * math.sqrt(3 / 2 * 45.5) / 120
    assert (reap.removed.low, reap.removed.high) == pytest.approx((0.85 - margin, 0.85 + margin), abs=1e-6)


def test_runs_join_by_name_budget_seed_and_knobs() -> None:
    low, high = (30.0, 90.0, 40.0), (50.0, 90.0, 60.0)
    earlier = by_hand(
        made("random", low, keep=1.0), made("random", high, keep=1.0, seed=1), made("reap", low, keep=1.0)
    )
    new = by_hand(made("random", high, keep=1), made("random", high, keep=1.0), made("ean", low, keep=1.0))
    settings = (
        PruneBenchSetting(entries=(Entry(method="random"), Entry(method="reap")), keep=(1.0,), domains=("a",), seeds=2),
        PruneBenchSetting(
            entries=(Entry(method="random"), Entry(method="ean")), keep=(1, 1.0), domains=("b",), seeds=1
        ),
    )
    earlier, new = (r.model_copy(update={"setting": s}) for r, s in zip((earlier, new), settings, strict=True))
    both = joined(earlier, new)
    assert [(r.name, repr(r.keep), r.seed) for r in both.runs] == [
        ("random", "1.0", 1),
        ("reap", "1.0", 0),
        ("random", "1", 0),
        ("random", "1.0", 0),
        ("ean", "1.0", 0),
    ]
    assert both.runs[3].perplexity.nll == high, "what was asked for again"
    assert [repr(keep) for keep in both.setting.keep] == ["1.0", "1"]
    assert (both.setting.domains, both.setting.seeds) == (("a", "b"), 2)
    knobs = (Entry(method="reap", settings={"x": 1}, label="reap"),)
    other = new.model_copy(update={"setting": new.setting.model_copy(update={"entries": knobs})})
    assert "reap" not in {run.name for run in joined(earlier, other).runs}


def test_rankings_of_a_task_look_at_its_domain_and_at_the_rest() -> None:
    runs = [
        made(name, nll, calibration=calibration)
        for calibration, shift in (("all", 0.0), ("b", 5.0))
        for name, nll in (("random", (40.0, 90.0, 50.0)), ("frequency", (20.0 + shift, 60.0, 30.0 - shift)))
    ]
    result = by_hand(*runs, domains=("b",))
    found = {(r.calibration, r.text): r for r in all_rankings(result)}
    assert set(found) == {("all", "all"), ("b", "b"), ("b", "not b"), ("all", "b")}
    assert found["b", "b"].rows[0].nll == 25 / 20
    assert found["all", "b"].rows[0].nll == 30 / 20
    assert found["b", "not b"].rows[0].nll == 85 / 40
    assert found["b", "b"].rows[0].rise is None, "one document tells no interval"
    assert part(result.unchanged, "not b").tokens == (10, 30)


def test_nothing_is_removed_from_a_rise_that_is_none_or_does_not_show() -> None:
    base = text((10.0, 30.0, 20.0))
    assert removed(base, base, base) is None
    assert removed(base, text((9.0, 29.0, 20.0)), base) is None
    # A rise of 10 in one document of three: its interval reaches far below zero.
    assert removed(base, text((20.0, 30.0, 20.0)), base) is None
    assert removed(base, text((20.0, 60.0, 41.0)), base) is not None
    one = PerplexityResult(domains=("a",), tokens=(10,), nll=(10.0,))
    assert removed(one, one.model_copy(update={"nll": (20.0,)}), one) is None, "one document tells no interval"


def test_one_expert_is_not_all_of_them() -> None:
    runs = [
        made(name, nll, keep=keep)
        for keep, nll in ((1, (30.0, 90.0, 60.0)), (1.0, (10.0, 30.0, 20.0)))
        for name in ("random", "frequency")
    ]
    result = by_hand(*runs)
    result = result.model_copy(update={"setting": result.setting.model_copy(update={"keep": (1, 1.0)})})
    result = result.model_copy(update={"rankings": all_rankings(result)})
    result = PruneBenchResult.model_validate_json(result.model_dump_json())
    for keep, loss in ((1, 3.0), (1.0, 1.0)):
        [run] = result.select("frequency", keep)
        assert type(run.keep) is type(keep)
        ranking = result.ranking(keep)
        assert ranking is not None
        assert type(ranking.keep) is type(keep)
        assert [(row.seeds, row.nll) for row in ranking.rows] == [(1, loss)] * 2


def test_results_survive_the_disk(found: PruneBenchResult, tmp_path: Path) -> None:
    found.save(tmp_path / "bench.json")
    assert PruneBenchResult.load(tmp_path / "bench.json") == found
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(BadData, match="damaged result of a pruning bench"):
        PruneBenchResult.load(tmp_path / "bench.json")


def test_a_text_gives_what_is_wanted_from_its_whole_length(tokenizer: Any) -> None:
    book = "\n\n".join(f"{chapter:05d} " * 100 for chapter in range(40))
    letters = [Document(f"letter {i}. " * 20, "letters", str(i)) for i in range(30)]
    taken = take_tokens([Document(book, "book", "b"), *letters], tokenizer, 4000)
    sizes = {name: [len(d.ids) for d in taken if d.domain == name] for name in ("book", "letters")}
    assert sum(sizes["book"]) == sum(sizes["letters"]) == 2000
    assert len(sizes["book"]) == 8, "one book is cut into passages"
    begun = [tokenizer.decode(d.ids).replace(" ", "")[:5] for d in taken if d.domain == "book"]
    assert begun[0] == "00000"
    assert begun[-1] >= "00035", "to the last eighth of the book"
    assert begun == sorted(begun)
    assert [d.index for d in taken] == list(range(len(taken)))
    assert {cut.domain: (cut.passages, cut.documents) for cut in count(taken)} == {"book": (8, 1), "letters": (10, 10)}
    assert [cut.words for cut in count(taken) if cut.is_cut] == ["8 passages of 1 document"]
    few = take_tokens([Document("a b c", "x", "1"), Document("", "x", "2")], tokenizer, 1000)
    assert [len(d.ids) for d in few] == [5], "no more than there is"
    with pytest.raises(BadData, match="fewer than two tokens"):
        take_tokens([Document("", "x", "1")], tokenizer, 100)
