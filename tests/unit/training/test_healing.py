"""The loss by which a model heals, by hand; what learns how fast; a teacher on its student's path is itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekit import catalogue
from moekit.errors import BadConfig, BadData
from moekit.training import LiveTeacher, StoredTeacher, store_teacher
from moekit.training.batch import TopLogProbs
from moekit.training.healing import MOST_TOKENS, RATES, HealConfig, without_noise
from moekit.training.objectives.kd import (
    Distillation,
    bucket_divergence,
    bucket_divergences,
    full_divergence,
    likeliest,
    listed_divergence,
)
from moekit.training.same_path import check_same_path, self_divergence
from moekit.training.teacher import Teacher
from tests.families import VOCAB, build
from tests.unit.training.test_run import text

TEACHER, STUDENT = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[1.5, 1.2, 0.1, -0.8]])
ROWS = text(rows=6, padded=True)


def random_logits(seed: int) -> Tensor:
    return 3 * torch.randn(50, 20, generator=torch.Generator().manual_seed(seed))


def test_the_likeliest_two_of_four_by_hand() -> None:
    listed = likeliest(TEACHER, 2)
    assert listed.ids_NK.tolist() == [[0, 1]]
    # ln p = z - ln(e^2 + e + 1 + 1/e)
    torch.testing.assert_close(listed.values_NK, torch.tensor([[-0.440190, -1.440190]]), atol=1e-6, rtol=0)
    assert float(bucket_divergence(STUDENT, listed)) == pytest.approx(0.05520, abs=6e-6)
    assert float(listed_divergence(STUDENT, listed)) == pytest.approx(0.05283, abs=6e-6)


@pytest.mark.parametrize("divergence", [bucket_divergence, listed_divergence])
def test_a_student_that_is_its_teacher_is_told_nothing(divergence: object) -> None:
    logits = random_logits(0).requires_grad_()
    loss = divergence(logits, likeliest(logits.detach(), 5))  # type: ignore[operator]
    (grad,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)


def test_a_bucket_says_less_than_all_tokens_and_more_the_more_are_told_apart() -> None:
    teacher, student = random_logits(1), random_logits(2)
    p, q = (one.double().softmax(-1) for one in (teacher, student))
    full_n = (p * (p / q).log()).sum(-1)
    below_n = torch.zeros(50, dtype=torch.float64)
    for top_k in (1, 3, 10, 19, 20):
        found_n = bucket_divergences(student, likeliest(teacher, top_k)).double()
        assert bool((found_n >= below_n - 1e-5).all())
        assert bool((found_n <= full_n + 1e-5).all())
        below_n = found_n
    torch.testing.assert_close(below_n, full_n, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(full_divergence(student, teacher).double(), full_n.sum(), atol=1e-4, rtol=1e-5)


def objective(**knobs: object) -> Distillation:
    made: Distillation = catalogue.make("objective", "kd", knobs)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoredTeacher:
    return store_teacher(build("qwen2_moe", seed=7), ROWS, tmp_path_factory.mktemp("store") / "said", top_k=9)


def told(teacher: Teacher, **knobs: object) -> float:
    """What another model is told to learn of all rows."""
    return self_divergence(build("qwen2_moe"), teacher, ROWS, objective(**knobs), count=len(ROWS))


def test_a_cache_and_a_teacher_in_memory_teach_alike(store: StoredTeacher) -> None:
    live = LiveTeacher(build("qwen2_moe", seed=7))
    for knobs in ({"top_k": 9}, {"top_k": 4}, {"top_k": 9, "rest": "ignored"}):
        assert told(live, **knobs) == pytest.approx(told(store, **knobs), rel=2e-3)
    assert told(live, top_k=VOCAB) == pytest.approx(told(live), rel=1e-5)
    assert told(live, top_k=4) < told(live)
    warm = {"temperature": 2.0, "rest": "ignored", "top_k": 9}
    assert told(live, **warm) == pytest.approx(told(store, **warm), rel=2e-3)
    with pytest.raises(BadConfig, match="whole distribution"):
        objective(temperature=2.0).check_partial("kd")


def test_a_teacher_is_itself_on_the_path_of_its_student(store: StoredTeacher) -> None:
    model = build("qwen2_moe", seed=7)
    for teacher in (LiveTeacher(model), store):
        assert abs(check_same_path(model, teacher, ROWS, objective(top_k=9))) < 1e-5
    other = build("qwen2_moe", seed=8)
    assert self_divergence(other, store, ROWS, objective(top_k=9)) > 1e-3
    with pytest.raises(BadData, match="differs from what is stored of it"):
        check_same_path(other, store, ROWS, objective(top_k=9))


def test_what_learns_has_its_own_rate_and_length() -> None:
    for what, rate in RATES.items():
        config = HealConfig().train_config(what, seed=3, rows=10**9)
        assert config.lr == rate
        assert (config.weight_decay, config.clip, config.lr_schedule, config.seed) == (0.0, 1.0, "cosine", 3)
        assert config.objectives["ce"]["weight"] == 0
        assert config.objectives["kd"] == {
            **{"use": "kd", "weight": 1.0, "text": "train"},
            **{"temperature": 1.0, "top_k": 64, "rest": "bucket"},
        }
        assert config.steps == -(-MOST_TOKENS[what] // (4 * 512))
        assert (config.lora is None) == (what != "lora")
    assert HealConfig().train_config("router", seed=0, rows=10).steps == 3  # once over the text, and no more
    assert HealConfig(lr=1.0, epochs=2.0).train_config("all", seed=0, rows=10).planned_steps(10) == 5
    assert HealConfig(loss="full", lm=0.5).objectives() == {"ce": 0.5, "kd": {"weight": 1.0, "temperature": 1.0}}
    for bad in ({"kl_weight": 0}, {"steps": 1, "tokens": 1}):
        with pytest.raises(ValueError, match=r"nothing to learn|contradict"):
            HealConfig(**bad)  # type: ignore[arg-type]


def test_noise_is_off_while_a_teacher_is_followed() -> None:
    model = build("mixtral", router_jitter_noise=0.5).train()
    ids = torch.arange(3, 15)[None]

    def answer() -> Tensor:
        found: Tensor = model(input_ids=ids).logits
        return found

    torch.manual_seed(0)
    assert not torch.equal(answer(), answer())
    with without_noise(model):
        assert torch.equal(answer(), answer())
    assert not torch.equal(answer(), answer())


def test_a_threshold_that_is_called_noise_stays() -> None:
    model = build("phimoe")
    kept = [m.router_jitter_noise for m in model.modules() if hasattr(m, "router_jitter_noise")]
    with without_noise(model):
        assert [m.router_jitter_noise for m in model.modules() if hasattr(m, "router_jitter_noise")] == kept


def test_a_store_is_bound_to_its_length(store: StoredTeacher, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="another store"):
        store_teacher(build("qwen2_moe", seed=7), ROWS, store.folder, top_k=8)


def test_listing_is_bound_to_log_probabilities_of_the_whole() -> None:
    listed = TopLogProbs(torch.tensor([[0, 1]]), torch.tensor([[-0.5, -1.5]]))
    p = torch.tensor([-0.5, -1.5]).exp()
    q = STUDENT.softmax(-1)[0]
    rest = (1 - p.sum()) * ((1 - p.sum()) / q[2:].sum()).log()
    expected = float((p * (p / q[:2]).log()).sum() + rest)
    assert float(bucket_divergence(STUDENT, listed)) == pytest.approx(expected, abs=1e-6)
