"""Factored experts: the published schedule, factors and masks by hand, packing, and whole runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moekit
from moekit.anatomy import find_moe_layers, permute_experts
from moekit.checking import check
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.expected import verify
from moekit.checkpoint.hollow import is_hollow
from moekit.checkpoint.model import read_extra_tensors
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.data import TokenBatches
from moekit.errors import BadCheckpoint, BadConfig, NumericFault
from moekit.experts.factored_expert import Factors, dense
from moekit.experts.factored_model import factored, factors_on, finish
from moekit.experts.factors import applied, factorize, joined, share_basis
from moekit.experts.methods.factored import Factored
from moekit.jobs.weights.experts_parts import bases_of
from moekit.runtime import attach, attached, detach, permute_parts, without_parts
from moekit.runtime.part import LayerInit
from moekit.training import TrainConfig, train
from moekit.training.freeze import train_only
from moekit.training.residual_rows import ResidualRows, drop_rows, kept_share, residual_rows, score_rows
from tests.families import build, logits, tokens
from tests.parts import learned
from tests.tiny import write_model, write_text


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKIT_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("step", "share"),
    [(399, 1), (400, 1), (2400, 0.4796875), (4400, 0.2125), (6400, 0.1140625), (8400, 0.1), (10000, 0.1)],
)
def test_the_share_of_rows_follows_the_published_schedule(step: int, share: float) -> None:
    """10 % in the end, 10,000 steps, 400 to warm up and 1,600 to cool down."""
    assert kept_share(Factored(), step / 10000) == pytest.approx(share, abs=1e-12)


def test_a_low_rank_and_its_rest_are_the_matrix() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    left, right, rest = factorize(weight, 2)
    assert left.shape == (6, 2)
    assert right.shape == (2, 5)
    torch.testing.assert_close(left @ right + rest, weight, atol=1e-6, rtol=0)
    # Nothing of rank 2 is nearer: what is left is the length of the other singular values.
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(rest.norm(), values[2:].norm(), atol=1e-5, rtol=0)
    # Both factors carry the same share of the size.
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), atol=1e-5, rtol=0)


def test_factors_are_applied_without_the_matrix() -> None:
    left, right = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[3.0, -1.0]])
    row, rows = torch.tensor([2, 0]), torch.tensor([[10.0, 0.0], [0.0, 5.0]])
    whole = torch.tensor([[3.0, 4.0], [0.0, 0.0], [16.0, -2.0]])
    assert torch.equal(joined(left, right, row, rows), whole)
    given = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    assert torch.equal(applied(given, left, right, row, rows), given @ whole.T)
    none = row[:0], rows[:0]
    assert torch.equal(applied(given, left, right, *none), given @ (left @ right).T)


def residual(rest: Tensor) -> Factors:
    """One matrix `up` of one expert, its residual as given."""
    _, outputs, inputs = rest.shape
    made = {"up_left": torch.zeros(1, outputs, 1), "up_right": torch.zeros(1, 1, inputs), "up_rest": rest}
    return Factors(made, {"up_score": torch.zeros(1, outputs)})


def test_rows_score_by_hand_and_all_compete_together() -> None:
    first = residual(torch.tensor([[[1.0, -2.0], [3.0, 0.0], [0.1, 0.1]]]))
    second = residual(torch.tensor([[[1.0, 1.0]]]))
    first["up_rest"].grad = torch.tensor([[[2.0, 1.0], [1.0, 9.0], [1.0, 1.0]]])
    second["up_rest"].grad = torch.tensor([[[1.0, 0.5]]])
    score_rows([first, second], 0.85)
    # Means of |z g|: (2 + 2) / 2, (3 + 0) / 2, (.1 + .1) / 2; (1 + .5) / 2; each times 1 - .85.
    torch.testing.assert_close(first["up_score"], torch.tensor([[0.3, 0.225, 0.015]]))
    torch.testing.assert_close(second["up_score"], torch.tensor([[0.1125]]))
    score_rows([first, second], 0.85)
    torch.testing.assert_close(first["up_score"], torch.tensor([[0.555, 0.41625, 0.02775]]))
    assert drop_rows([first, second], 1.0) == 4
    assert drop_rows([first, second], 0.5) == 2
    assert first["up_rest"].tolist() == [[[1.0, -2.0], [3.0, 0.0], [pytest.approx(0.0)] * 2]]
    assert second["up_rest"].tolist() == [[[0.0, 0.0]]]


def test_of_equal_rows_as_many_stay_as_asked() -> None:
    factors = residual(torch.ones(1, 4, 2))
    assert drop_rows([factors], 0.5) == 2
    assert factors["up_rest"][0, :, 0].tolist() == [1, 1, 0, 0]


def masked(family: str = "qwen3_moe", rank: int = 3, *, dense: bool = True) -> PreTrainedModel:
    """A model whose residuals have lost most rows, by a mask of another expert each."""
    model = build(family)
    attach(model, Factored(rank=rank, dense=dense))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for on in factored(model)[0].layers.values():
            for rest in factors_on(on).residuals.values():
                rest.mul_((torch.rand(rest.shape[:2], generator=generator) < 0.3)[..., None])
    return model


def test_attached_it_is_the_model_and_nothing_of_the_stock_matrices_trains() -> None:
    model = build("qwen3_moe")
    stock = logits(model)
    attach(model, Factored(rank=5))
    torch.testing.assert_close(logits(model), stock, atol=1e-5, rtol=1e-5)
    train_only(model, ("all",))
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj")))
    assert all(p.requires_grad for p in learned(model).values())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_dropping_zero_rows_changes_nothing_and_stock_experts_follow(family: str, tmp_path: Path) -> None:
    model = masked(family)
    before = logits(model)
    zeros = sum(int((r == 0).all(-1).sum()) for on in factored(model)[0].layers.values() for r in _rests(on))
    counted = finish(model)
    assert counted is not None
    assert counted.all_rows - counted.rows == zeros > 0
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
    moekit.save(model, tmp_path / "m")
    back = moekit.load(tmp_path / "m", dtype=torch.float32, device="cpu")
    assert [a.part for a in attached(back)] == [Factored(rank=3)]
    torch.testing.assert_close(logits(back), before, atol=1e-6, rtol=1e-5)
    again = finish(back)  # what is packed stays
    assert again == counted
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(stock), before, atol=1e-5, rtol=1e-4)


def _rests(on: object) -> list[Tensor]:
    return list(factors_on(on).residuals.values())  # type: ignore[arg-type]


def test_bytes_are_those_that_the_folder_holds() -> None:
    """Per matrix of I = 16 x H = 32 and 8 experts in 2 layers: rank 3 is 3 (16 + 32) numbers, a row its own length."""
    model = masked()
    counted = finish(model)
    assert counted is not None
    layer = find_moe_layers(model)[0].geometry
    experts = 2 * layer.experts
    low = experts * 3 * 3 * (layer.hidden + layer.width)
    kept = [factors_on(on) for on in factored(model)[0].layers.values()]
    rows = sum(f[f"{p}_rows"].numel() for f in kept for p in f.matrices)
    assert counted.factors == 4 * (low + rows) + 8 * counted.rows
    assert counted.dense == 4 * experts * 3 * layer.hidden * layer.width
    assert counted.all_rows == experts * (2 * layer.width + layer.hidden)


def test_packed_factors_follow_reordered_experts() -> None:
    model = masked()
    finish(model)
    before = logits(model)
    orders = {layer.index: [5, 4, 6, 7, 1, 0, 3, 2] for layer in find_moe_layers(model)}
    with without_parts(model):
        permute_experts(model, orders)
    permute_parts(model, orders)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_gradients_of_packed_factors_are_finite() -> None:
    model = masked("gpt_oss")
    finish(model)
    model.train()
    ids = tokens()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name: p.grad for name, p in learned(model).items()}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    assert all(bool((g != 0).any()) for g in gradients.values() if g is not None)


def test_bases_shared_by_experts_compute_as_their_own_would() -> None:
    """L of two experts each; the whole rest as rows."""
    model = build("qwen3_moe")
    layers = find_moe_layers(model)
    stock = copy.deepcopy(model)
    basis = torch.arange(8) // 2
    geometry = layers[0].geometry
    empty = {
        f"{p}_{what}": torch.zeros(0, dtype=torch.int32) for p in ("gate", "up", "down") for what in ("owner", "row")
    }
    attach(model, Factored(rank=4), {layer.index: {"basis": basis, **empty} for layer in layers})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, other in zip(layers, find_moe_layers(stock), strict=True):
            made = factors_on(factored(model)[0].layers[layer.index])
            assert made["up_shared"].shape == (4, geometry.width, 4)
            for parameter in made.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            for expert in range(8):
                for part, matrix in dense(other.experts, other.index, expert):
                    matrix.copy_(made[f"{part}_shared"][expert // 2] @ made[f"{part}_right"][expert])
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_factored_is_refused() -> None:
    model = build("qwen3_moe")
    with pytest.raises(BadConfig, match="no rank of 900") as refused:
        attach(model, Factored(rank=900))
    assert refused.value.layer == 0
    with pytest.raises(ValueError, match="before they begin to go"):
        Factored(after=0.5, until=0.4)
    layer = find_moe_layers(model)[1]
    with torch.no_grad():
        layer.experts.down_proj[2, 0, 0] = float("nan")
    with pytest.raises(NumericFault) as broken:
        Factored(rank=2).parameters(LayerInit(1, layer.geometry, {}, layer.experts, torch.Generator()))
    assert (broken.value.layer, broken.value.expert) == (1, 2)
    rows = {"up_owner": torch.tensor([0, 1]), "up_row": torch.tensor([0])}
    with pytest.raises(BadConfig, match="numbered wrongly"):
        Factored(rank=2).prepare(rows, layer.geometry)


def rows_of_text() -> TokenBatches:
    """Twelve rows of random tokens."""
    ids = tokens(12, 16).int()
    document = torch.arange(12, dtype=torch.int32).unsqueeze(1).repeat(1, 16)
    return TokenBatches(ids, document, torch.zeros(12, 16, dtype=torch.int16), ("a",))


def run(tmp_path: Path, **settings: object) -> PreTrainedModel:
    """A short run in memory, interrupted where settings say so."""
    model = build("qwen3_moe")
    attach(model, Factored(rank=2, keep=0.25))
    train(model, None, rows_of_text(), TrainConfig(steps=6, batch=2, seq_len=16, lr=1e-2, **settings), output=tmp_path)
    return model


def test_training_leaves_the_share_of_rows_that_was_asked_for(tmp_path: Path) -> None:
    model = run(tmp_path / "run", precision="fp32", save_every=None)
    kept = [factors_on(on) for on in factored(model)[0].layers.values()]
    counted = finish(model)
    assert counted is not None
    assert counted.rows == round(0.25 * counted.all_rows)
    assert all(not factors.residuals for factors in kept)
    assert residual_rows(model) is None
    trained = logits(model)
    detach(model)
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-4)


def test_by_command_and_from_python_alike(tmp_path: Path) -> None:
    write_model(tmp_path / "moe", "qwen3_moe")
    write_text(tmp_path / "text", documents=8)
    settings = {"steps": 3, "seq_len": 32, "batch": 2, "lr": 0.01}
    told = moekit.train(
        tmp_path / "moe",
        data=tmp_path / "text",
        experts={"use": "factored", "rank": 2, "keep": 0.5},
        settings=settings,
        device="cpu",
        out=tmp_path / "small",
    )
    assert any(note.startswith("factored experts: ") for note in told.notes)
    back = moekit.load(tmp_path / "small", device="cpu")
    assert [a.part for a in attached(back)] == [Factored(rank=2, keep=0.5)]
    assert set(told.trained) >= {"experts", "router"}


def test_a_shared_basis_by_hand() -> None:
    """[W1 W2] has u_1 = (.9966, .0825); the mean of what is left of the two is what Sub-MoE's rank 1 merges to."""
    first, second = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    left, right, rest = share_basis([first, second], [0, 0], 1)
    assert left.shape == (1, 2, 1)
    assert left[0, :, 0].abs().tolist() == pytest.approx([0.9966, 0.0825], abs=1e-4)
    low = left[0] @ right
    torch.testing.assert_close(low + rest, torch.stack([first, second]), atol=1e-6, rtol=0)
    merged = 0.75 * low[0] + 0.25 * low[1]
    torch.testing.assert_close(merged, torch.tensor([[2.7313, 0.3305], [0.2260, 0.0274]]), atol=2e-4, rtol=0)
    # Each in a group of its own: the best rank 1 of each.
    alone, its, _ = share_basis([first, second], [0, 1], 1)
    for number, matrix in enumerate((first, second)):
        best = torch.linalg.svdvals(matrix)[1]
        torch.testing.assert_close((matrix - alone[number] @ its[number]).norm(), best, atol=1e-5, rtol=0)


def test_experts_in_no_group_have_a_basis_of_their_own() -> None:
    outcome = LayerOutcome(keep=(1, 4), sources=((1, 3), (0, 4)))
    assert bases_of(outcome, 6).tolist() == [1, 0, 2, 0, 1, 3]
    assert bases_of(LayerOutcome(keep=(0, 1, 2)), 3).tolist() == [0, 1, 2]


@pytest.mark.full
@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", precision="fp32", save_every=2)
    step = ResidualRows.on_optimizer_step

    def breaks(self: ResidualRows, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt
        step(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ResidualRows, "on_optimizer_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", precision="fp32", save_every=2)
    again = run(tmp_path / "broken", precision="fp32", save_every=2)
    ended = run(tmp_path / "broken", precision="fp32", save_every=2)  # what a finished run learnt is read
    for other in (again, ended):
        for index, on in factored(whole)[0].layers.items():
            theirs = factored(other)[0].layers[index]
            assert all(torch.equal(t, theirs.stored[n]) for n, t in on.stored.items())
            ours, state = factors_on(on).state_dict(), factors_on(theirs).state_dict()
            assert all(torch.equal(tensor, state[name]) for name, tensor in ours.items())


@pytest.mark.full
@pytest.mark.slow
def test_groups_of_a_merge_plan_share_a_basis(tmp_path: Path) -> None:
    write_model(tmp_path / "moe", "qwen3_moe")
    write_text(tmp_path / "text", documents=8)
    plan = tmp_path / "p.json"
    moekit.merge(
        tmp_path / "moe", method="random-groups", keep=4, data=tmp_path / "text", write="plan", out=plan, device="cpu"
    )
    moekit.train(
        tmp_path / "moe",
        data=tmp_path / "text",
        experts={"use": "factored", "rank": 3, "keep": 0.0, "dense": False},
        basis_plan=plan,
        settings={"steps": 2, "seq_len": 32, "batch": 2},
        device="cpu",
        out=tmp_path / "small",
    )
    back = moekit.load(tmp_path / "small", device="cpu")
    groups = WeightPlan.load(plan).outcomes[0].sources
    assert groups is not None
    on = factored(back)[0].layers[0]
    assert {tuple((on.stored["basis"] == n).nonzero().flatten().tolist()) for n in range(4)} == set(groups)
    assert factors_on(on)["up_shared"].shape == (4, on.geometry.width, 3)
    assert factors_on(on)["up_rows"].shape[0] == 0
    with pytest.raises(BadConfig, match="not factored"):
        moekit.train(tmp_path / "moe", data=tmp_path / "text", basis_plan=plan, out=tmp_path / "no")


def test_an_unknown_part_or_ranks_are_refused_before_work(tmp_path: Path) -> None:
    given = {"data": tmp_path / "text", "settings": {"steps": 1}, "out": tmp_path / "out"}
    write_model(tmp_path / "moe", "qwen3_moe")
    write_text(tmp_path / "text", documents=2)
    with pytest.raises(BadConfig, match="factord"):
        moekit.train(tmp_path / "moe", experts="factord", **given)
    with pytest.raises(BadConfig, match="has no name"):
        moekit.train(tmp_path / "moe", experts={"rank": 2}, **given)
    with pytest.raises(BadConfig, match="more than a rank holds"):
        moekit.train(tmp_path / "moe", experts="factored", ep=2, **given)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_folder_without_whole_matrices_is_as_small_as_its_factors(family: str, tmp_path: Path) -> None:
    model = masked(family, dense=False)
    before = logits(model)
    counted = finish(model)
    assert counted is not None
    moekit.save(model, tmp_path / "m")
    names = set(Checkpoint.open(tmp_path / "m").tensors)
    assert not [name for name in names if "expert" in name and not name.endswith("bias")]
    extra = sum(t.nbytes for t in read_extra_tensors(tmp_path / "m").values())
    assert extra == counted.factors
    assert check(tmp_path / "m").ok
    back = moekit.load(tmp_path / "m", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(back), before, atol=1e-5, rtol=1e-5)
    moekit.save(back, tmp_path / "again")
    again = moekit.load(tmp_path / "again", dtype=torch.float32, device="cpu")
    assert torch.equal(logits(again), logits(back))
    with pytest.raises(BadCheckpoint, match="leave out matrices") as refused:
        verify(Checkpoint.open(tmp_path / "m"))
    assert refused.value.layer == 0
    whole = moekit.load(tmp_path / "m", parts=False, dtype=torch.float32, device="cpu")
    assert attached(whole) == []
    torch.testing.assert_close(logits(whole), before, atol=1e-5, rtol=1e-4)
    moekit.save(whole, tmp_path / "whole")
    assert not is_hollow(find_moe_layers(whole)[0].experts.down_proj)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(stock), before, atol=1e-5, rtol=1e-4)


def test_factors_that_still_train_are_saved_without_whole_matrices_too(tmp_path: Path) -> None:
    model = masked(dense=False)
    moekit.save(model, tmp_path / "m")
    back = moekit.load(tmp_path / "m", dtype=torch.float32, device="cpu")
    assert all(is_hollow(layer.experts.down_proj) for layer in find_moe_layers(back))
    torch.testing.assert_close(logits(back), logits(model), atol=1e-5, rtol=1e-5)
    assert finish(back) == finish(model)
