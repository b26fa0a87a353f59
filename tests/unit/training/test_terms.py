"""Single experts, several texts, schedules and faults in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.errors import BadConfig, NumericFault, OutOfBudget
from moekit.training import TrainConfig, train
from moekit.training.freeze import train_only
from moekit.training.rows import ExpertRows
from tests.families import EXPERTS, build
from tests.unit.training.test_run import state, text


def config(**changes: object) -> TrainConfig:
    base = {"steps": 3, "batch": 2, "seq_len": 16, "lr": 1e-2, "save_every": None, "precision": "fp32"}
    return TrainConfig(**base | changes)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_only_the_named_experts_change(family: str) -> None:
    model = build(family)
    before = state(model)
    result = train(
        model, None, text(), config(parts=("experts:1[5]", "experts:0[2-3]"), weight_decay=0.5, router_lr=1e-3)
    )
    trains = {0: {2, 3}, 1: {5}}
    changed: dict[int, set[int]] = {0: set(), 1: set()}
    for name, tensor in state(model).items():
        layer = int(name.split(".")[2]) if ".experts." in name else -1
        if layer < 0:
            assert torch.equal(tensor, before[name]), name
            continue
        rows = {e for e in range(EXPERTS) if not torch.equal(tensor[e], before[name][e])}
        assert rows <= trains[layer], name
        changed[layer] |= rows
    assert changed == trains
    assert set(result.trained) == {"experts"}


def test_chosen_rows_move_as_if_the_whole_stack_trained() -> None:
    """Weight decay and Adam's steps of a row are its own."""
    models = [build("mixtral") for _ in range(2)]
    for model, parts in zip(models, (("experts:0[4]",), ("experts:0",)), strict=True):
        train(model, None, text(), config(steps=1, parts=parts, weight_decay=0.5, clip=0, warmup=0))
    name = "model.layers.0.mlp.experts.down_proj"
    torch.testing.assert_close(models[0].get_parameter(name)[4], models[1].get_parameter(name)[4])


def test_a_row_that_moved_all_the_same_is_named() -> None:
    model = build("olmoe")
    report = train_only(model, ["experts:1[0]"])
    rows = ExpertRows(model, report.row_masks(model))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] += 1
    with pytest.raises(Exception, match="has changed") as caught:
        rows.check()
    assert (caught.value.layer, caught.value.expert) == (1, 3)  # type: ignore[attr-defined]


def test_a_part_is_taken_out_again() -> None:
    report = train_only(build("qwen2_moe"), ["all", "-router", "-norms:0"])
    assert "router" in report.frozen
    assert "router" not in report.trained
    assert 0 < report.trained["norms"] < report.trained["norms"] + report.frozen["norms"]
    for parts in (["router:0[1]"], ["-experts:0[1]"], ["experts:0[9-2]"], ["experts:0[99]"]):
        with pytest.raises(BadConfig):
            train_only(build("qwen2_moe"), parts)


@pytest.mark.full
@pytest.mark.slow
def test_two_texts_count_as_their_weighted_sum() -> None:
    """The first step's gradient of plain SGD would be that of both losses; here: the losses themselves."""
    one, two = text(rows=4, padded=True), text(rows=4, seed=3)
    whole = {"steps": 1, "batch": 2, "accumulation": 2, "warmup": 0}
    alone = [train(build("qwen2_moe"), None, rows, config(**whole)).losses[0] for rows in (one, two)]
    keep = {"keep": {"use": "ce", "text": "retain", "weight": 0.5}}
    both = train(build("qwen2_moe"), None, {"train": one, "retain": two}, config(objectives=keep, **whole))
    assert both.losses[0] == pytest.approx(alone[0] + 0.5 * alone[1], rel=1e-5)
    assert both.history[0]["objective/keep"] == pytest.approx(alone[1], rel=1e-5)


def test_texts_that_are_missing_or_unread_are_refused() -> None:
    with pytest.raises(BadConfig, match="reads the text 'forget'"):
        train(build("olmoe"), None, text(), config(objectives={"balance": {"text": "forget"}}))
    with pytest.raises(BadConfig, match="no objective reads the text 'retain'"):
        train(build("olmoe"), None, {"train": text(), "retain": text(seed=1)}, config())


MOVING = {
    "lr": {"use": "linear", "start": 1e-2, "end": 0.0},
    "routing.top_k": {"use": "linear", "start": 1, "end": 4},
    "objective.balance.weight": {"use": "cosine", "start": 0.0, "end": 0.1},
    "balancer.rate": {"use": "exp", "start": 0.1, "end": 0.001},
}


class Stop:
    def __init__(self, at: int) -> None:
        self.at = at

    def start(self, label: str, total: int) -> None: ...

    def finish(self) -> None: ...

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.at -= 1
        if self.at == 0:
            raise KeyboardInterrupt


@pytest.mark.full
@pytest.mark.slow
def test_schedules_move_and_a_resumed_run_sees_the_same(tmp_path: Path) -> None:
    settings = config(steps=6, save_every=2, objectives={"balance": 0.0}, balancer={"use": "pi"}, schedules=MOVING)
    straight = build("deepseek_v3")
    result = train(straight, None, text(), settings, output=tmp_path / "one")
    assert [h["learning_rate"] for h in result.history] == pytest.approx([1e-2 * (6 - i) / 6 for i in range(6)])
    assert straight.config.num_experts_per_tok == 4
    assert all(m.top_k == 4 for m in straight.modules() if hasattr(m, "e_score_correction_bias"))
    with pytest.raises(KeyboardInterrupt):
        train(build("deepseek_v3"), None, text(), settings, output=tmp_path / "two", progress=Stop(5))
    again = build("deepseek_v3")
    resumed = train(again, None, text(), settings, output=tmp_path / "two")
    assert resumed.resumed_from == 4
    assert resumed.losses == result.losses
    assert all(torch.equal(a, b) for a, b in zip(state(straight).values(), state(again).values(), strict=True))


@pytest.mark.parametrize(
    "schedules",
    [
        {"routing.tau": {"use": "constant", "at": 1.0}},
        {"objective.kd.weight": {"use": "constant", "at": 1.0}},
        {"routing.top_k": {"use": "linear", "start": 1, "end": EXPERTS + 1}},
        {"objective.ce.weight": {"use": "linear", "start": 1.0, "end": -1.0}},
        {"lr": {"use": "linear", "start": 1.0, "end": -1.0}},
    ],
)
def test_what_cannot_be_moved_is_refused_before_training(schedules: dict[str, dict[str, object]]) -> None:
    model = build("qwen2_moe")
    before = state(model)
    with pytest.raises(BadConfig):
        train(model, None, text(), config(schedules=schedules))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_a_rate_that_blows_the_weights_up_is_a_fault_that_names_the_step() -> None:
    with pytest.raises(NumericFault, match="step 1"):
        train(build("qwen2_moe"), None, text(), config(steps=1, lr=1e30, warmup=0))


@pytest.mark.parametrize("changes", [{"batch": 10**8}, {"steps": 10**12}, {"accumulation": 10**11}])
def test_what_cannot_fit_is_refused_before_it_is_allocated(changes: dict[str, int]) -> None:
    with pytest.raises(OutOfBudget, match=r"needs .* bytes"):
        train(build("qwen2_moe"), None, text(), config(**changes))


def test_odd_widths_train_in_bf16() -> None:
    model = build("qwen3_moe", moe_intermediate_size=13)
    result = train(model, None, text(), config(steps=1, precision="bf16"))
    assert result.precision == "bf16"
    assert model.get_experts_implementation() != "eager"
