"""What holds for every registered objective, and each of ours against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit import catalogue
from moekit.data.batches import IGNORED_LABEL
from moekit.errors import BadConfig
from moekit.training.batch import MicroBatch, TopLogProbs
from moekit.training.collector import Routed
from moekit.training.head import OutputInputs
from moekit.training.layers import TrainedLayer, trained_layers
from moekit.training.objectives import base
from moekit.training.objectives.base import OutputObjective, RouterObjective
from moekit.training.objectives.kd import bucket_divergence, full_divergence
from tests.families import EXPERTS, VOCAB, build

ROWS, LENGTH, TOP_K, HIDDEN = 3, 4, 2, 12
TOKENS = ROWS * LENGTH

ALL = list(catalogue.methods("objective"))
ROUTER = [r for r in ALL if issubclass(r.cls, RouterObjective)]
OUTPUT = [r for r in ALL if issubclass(r.cls, OutputObjective)]


def some_layer() -> TrainedLayer:
    return trained_layers(build("qwen2_moe"))[0]


@pytest.fixture(scope="module")
def layer() -> TrainedLayer:
    return some_layer()


def make(record: catalogue.MethodRecord, **knobs: Any) -> Any:
    """Its first example, with knobs."""
    example = record.cls.examples(EXPERTS)[0]
    return catalogue.make("objective", record.name, {**example.model_dump(exclude_unset=True), **knobs})


def routed(layer: TrainedLayer) -> Routed:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=generator).requires_grad_()
    weights_TK, indices_TK = logits_TE.softmax(-1).topk(TOP_K)
    indices_TK = indices_TK.clone()
    indices_TK[1, 1] = EXPERTS  # no expert
    mask_T = torch.ones(TOKENS, dtype=torch.bool)
    mask_T[-2:] = False
    batch = MicroBatch(torch.zeros(ROWS, LENGTH, dtype=torch.int64), mask_T.view(ROWS, LENGTH))
    return Routed(layer, logits_TE, weights_TK, indices_TK, mask_T, False, batch)


def part(whole: Routed, places: slice) -> Routed:
    assert whole.mask_T is not None
    return replace(
        whole,
        logits_TE=whole.logits_TE[places],
        weights_TK=whole.weights_TK[places],
        indices_TK=whole.indices_TK[places],
        mask_T=whole.mask_T[places],
    )


def gradient(loss: Tensor, whole: Routed) -> Tensor:
    (grad_TE,) = torch.autograd.grad(loss, whole.logits_TE, retain_graph=True)
    return grad_TE


@pytest.mark.parametrize("record", ROUTER, ids=lambda r: r.name)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_gradients_are_finite_also_where_no_expert_is_chosen_and_probabilities_underflow(
    record: catalogue.MethodRecord, size: float, layer: TrainedLayer
) -> None:
    whole = routed(layer)
    large = replace(whole, logits_TE=whole.logits_TE * size)
    for scores in ("softmax", "sigmoid"):
        scored = replace(large, layer=replace(layer, scores=scores))
        loss = make(record).loss(scored)
        assert loss.isfinite()
        assert loss.dtype == torch.float32
        assert gradient(loss, whole).isfinite().all()


@pytest.mark.parametrize("record", ROUTER, ids=lambda r: r.name)
def test_a_batch_of_padding_gives_a_finite_value_and_no_gradient(
    record: catalogue.MethodRecord, layer: TrainedLayer
) -> None:
    whole = routed(layer)
    for pool in ("micro-batch", "sequence"):
        empty = replace(whole, mask_T=torch.zeros(TOKENS, dtype=torch.bool))
        loss = make(record, pool=pool).loss(empty)
        assert loss.isfinite()
        assert not gradient(loss, whole).any()


@pytest.mark.parametrize("record", ROUTER, ids=lambda r: r.name)
def test_padding_does_not_count(record: catalogue.MethodRecord, layer: TrainedLayer) -> None:
    whole = routed(layer)
    loss = make(record).loss(whole)
    cut = part(whole, slice(0, TOKENS - 2))
    torch.testing.assert_close(loss, make(record).loss(replace(cut, mask_T=None)))
    torch.testing.assert_close(gradient(loss, whole)[-2:], torch.zeros(2, EXPERTS))


@pytest.mark.parametrize("record", ROUTER, ids=lambda r: r.name)
def test_sums_of_halves_are_those_of_the_whole(record: catalogue.MethodRecord, layer: TrainedLayer) -> None:
    whole = routed(layer)
    term = make(record)
    halves = [term.sums(part(whole, places)) for places in (slice(0, 7), slice(7, TOKENS))]
    added = {name: halves[0][name] + halves[1][name] for name in halves[0]}
    torch.testing.assert_close(added, term.sums(whole))
    torch.testing.assert_close(term.value(added, layer), term.loss(whole))


@pytest.mark.parametrize("record", ROUTER, ids=lambda r: r.name)
def test_two_ranks_are_one(
    record: catalogue.MethodRecord, layer: TrainedLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `pool: ranks` the mean of the ranks' gradients is the gradient over all their tokens."""
    whole = routed(layer)
    expected = make(record).loss(whole)
    halves = [part(whole, places) for places in (slice(0, 7), slice(7, TOKENS))]
    term = make(record, pool="ranks")
    monkeypatch.setattr(base, "world_size", lambda: 2)
    mean = torch.zeros(TOKENS, EXPERTS)
    for mine, other in (halves, halves[::-1]):
        others = iter(term.sums(other).values())
        monkeypatch.setattr(base.dist, "all_reduce", lambda tensor, rest=others: tensor.add_(next(rest).detach()))
        loss = term.loss(mine)
        torch.testing.assert_close(loss, expected)
        mean += gradient(loss, whole) / 2
    torch.testing.assert_close(mean, gradient(expected, whole))


@pytest.mark.parametrize("record", ROUTER, ids=lambda r: r.name)
def test_a_term_of_each_sequence_is_the_mean_over_rows(record: catalogue.MethodRecord, layer: TrainedLayer) -> None:
    whole = routed(layer)
    rows = [part(whole, slice(i * LENGTH, (i + 1) * LENGTH)) for i in range(ROWS)]
    expected = torch.stack([make(record).loss(row) for row in rows]).mean()
    torch.testing.assert_close(make(record, pool="sequence").loss(whole), expected)


@pytest.mark.parametrize("record", ROUTER, ids=lambda r: r.name)
def test_the_numbers_of_experts_do_not_matter(record: catalogue.MethodRecord, layer: TrainedLayer) -> None:
    whole = routed(layer)
    swapped_E = torch.arange(EXPERTS).view(-1, 2).flip(1).reshape(-1)  # within pairs, which groups keep together
    places_E = torch.cat([swapped_E.argsort(), torch.tensor([EXPERTS])])
    other = replace(whole, logits_TE=whole.logits_TE[:, swapped_E], indices_TK=places_E[whole.indices_TK])
    torch.testing.assert_close(make(record).loss(other), make(record).loss(whole))


# DeepSeekMoE's notation: four tokens, four experts, two choices.
SCORES = [[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4], [0.4, 0.4, 0.1, 0.1]]
CHOSEN = [[0, 1], [0, 2], [3, 2], [0, 1]]
SHIFTS = [1.0, 2.0, 0.0, -1.0]
MEANS = [0.35, 0.25, 0.225, 0.175]


def entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row)


MEAN_ENTROPY = sum(map(entropy, SCORES)) / 4
BY_HAND: list[tuple[str, dict[str, Any], float]] = [
    ("balance", {}, 1.0875),
    ("balance", {"pool": "sequence"}, (4 * 0.7 / 2 + 4 * 0.8 / 2 + 4 * 0.7 / 2 + 4 * 0.8 / 2) / 4),
    ("z", {}, 1.5),
    ("importance", {}, 0.2),
    ("entropy", {}, MEAN_ENTROPY),
    ("entropy", {"sign": -1}, -MEAN_ENTROPY),
    ("mi", {}, MEAN_ENTROPY - entropy(MEANS)),
    ("device-balance", {"groups": 2}, 1.05),
    ("device-balance", {"groups": 4}, 1.0875),
    ("device-balance", {"groups": 1}, 1.0),
    ("device-balance", {"assignment": {0: (0, 1, 0, 1)}}, 1.0375),
]


@pytest.mark.parametrize(("name", "knobs", "expected"), BY_HAND)
def test_values_worked_out_by_hand(name: str, knobs: dict[str, Any], expected: float) -> None:
    layer = trained_layers(build("qwen2_moe", num_experts=4))[0]
    scores_TE, indices_TK = torch.tensor(SCORES), torch.tensor(CHOSEN)
    logits_TE = scores_TE.log() + torch.tensor(SHIFTS).unsqueeze(1)
    batch = MicroBatch(torch.zeros(4, 1, dtype=torch.int64))
    seen = Routed(layer, logits_TE, scores_TE.gather(1, indices_TK), indices_TK, None, False, batch)
    assert float(catalogue.make("objective", name, knobs).loss(seen)) == pytest.approx(expected, rel=1e-5)


def test_every_objective_on_routers_is_worked_out_by_hand() -> None:
    assert {name for name, _, _ in BY_HAND} == {record.name for record in ROUTER if record.origin == "moekit"}


def test_groups_that_do_not_fit_are_refused(layer: TrainedLayer) -> None:
    for knobs in ({}, {"groups": 3}, {"assignment": {0: (0, 1)}}, {"groups": 2, "assignment": {0: (0,) * EXPERTS}}):
        with pytest.raises(BadConfig):
            catalogue.make("objective", "device-balance", knobs).check([layer])


class Said:
    """A teacher with fixed logits."""

    complete = True

    def __init__(self, logits_NV: Tensor) -> None:
        self.logits_NV = logits_NV

    def at(self, positions_N: Tensor) -> Tensor:
        return self.logits_NV[positions_N]


def outputs(count: int = TOKENS) -> OutputInputs:
    generator = torch.Generator().manual_seed(5)
    head = nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator))
    hidden_NH = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    labels_N = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels_N[::5] = IGNORED_LABEL
    teacher = Said(torch.randn(TOKENS, VOCAB, generator=generator))
    return OutputInputs(MicroBatch(teacher=teacher), labels_N, count, hidden_NH, head)


@pytest.mark.parametrize("record", OUTPUT, ids=lambda r: r.name)
def test_outputs_add_up_over_splits_and_leave_unlabelled_tokens_out(record: catalogue.MethodRecord) -> None:
    whole = outputs()
    assert whole.hidden_NH is not None
    loss = make(record).loss(whole)
    (grad_NH,) = torch.autograd.grad(loss, whole.hidden_NH)
    assert loss.isfinite()
    assert grad_NH.isfinite().all()
    assert not grad_NH[::5].any()
    parts = []
    for low, high in ((0, 5), (5, TOKENS)):
        teacher = Said(whole.batch.teacher.logits_NV[low:high])  # type: ignore[union-attr]
        inputs = replace(
            whole,
            batch=MicroBatch(teacher=teacher),
            labels_N=whole.labels_N[low:high],
            hidden_NH=whole.hidden_NH[low:high],
        )
        parts.append(make(record).loss(inputs))
    torch.testing.assert_close(sum(parts), loss)
    nothing = replace(whole, labels_N=torch.full((TOKENS,), IGNORED_LABEL))
    assert float(make(record).loss(nothing)) == 0.0


@pytest.mark.parametrize("record", OUTPUT, ids=lambda r: r.name)
def test_outputs_are_the_same_from_a_familys_own_logits(record: catalogue.MethodRecord) -> None:
    whole = outputs()
    assert whole.hidden_NH is not None
    assert whole.head is not None
    logits_NV = whole.head(whole.hidden_NH)
    own = nn.functional.cross_entropy(logits_NV, whole.labels_N, reduction="sum") / TOKENS
    stock = replace(whole, hidden_NH=None, head=None, stock_NV=logits_NV, stock_loss=own)
    torch.testing.assert_close(make(record).loss(stock), make(record).loss(whole))


TEACHER, STUDENT = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[1.5, 1.2, 0.1, -0.8]])


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.05532), (2.0, 0.05540), (4.0, 0.05052)])
def test_distillation_by_hand(temperature: float, expected: float) -> None:
    assert float(full_divergence(STUDENT, TEACHER, temperature)) == pytest.approx(expected, abs=6e-6)


def test_what_a_teacher_does_not_list_counts_as_one() -> None:
    values, ids = TEACHER.log_softmax(-1).topk(2)
    assert float(bucket_divergence(STUDENT, TopLogProbs(ids, values))) == pytest.approx(0.05520, abs=6e-6)
    same = TEACHER.clone().requires_grad_()
    loss = bucket_divergence(same, TopLogProbs(ids, values))
    (grad,) = torch.autograd.grad(loss, same)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)
    values, ids = TEACHER.log_softmax(-1).topk(4)  # all there is: the full divergence
    listed = bucket_divergence(STUDENT, TopLogProbs(ids, values))
    torch.testing.assert_close(listed, full_divergence(STUDENT, TEACHER))
