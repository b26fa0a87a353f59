"""Costs of recipes on a text, against the whole model run by transformers, and gradients against finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.anatomy.probe import find_moe_layers
from moekit.compress.engine.resize import read_block
from moekit.compress.joint.composing import composer
from moekit.compress.joint.costs import CostRow, CostTable, known_rows
from moekit.compress.joint.gradients import BlockGradients, block_gradients, row_gradients
from moekit.compress.joint.measuring import Error, _Measuring, measure
from moekit.compress.joint.planning import Planner
from moekit.compress.joint.profiles import PROFILES
from moekit.compress.joint.recipe import AS_IT_IS, LayerRecipe
from moekit.compress.joint.sizes import ModelSizes
from moekit.compress.maths.rounding import round_to_nearest
from moekit.data import Document
from moekit.errors import BadConfig
from moekit.jobs.shared.inputs import calibration_rows
from moekit.jobs.shared.opened import OpenedModel, open_source
from moekit.trace.streamed import Streamed
from tests.tiny import SENTENCES, write_model

ROUNDED, DROPPED, BOTH = LayerRecipe(bits=3), LayerRecipe(keep=6, way="drop"), LayerRecipe(keep=6, way="drop", bits=3)
WANTED = {0: (AS_IT_IS, ROUNDED), 1: (AS_IT_IS, ROUNDED, DROPPED, BOTH)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_source(str(write_model(tmp_path_factory.mktemp("made") / "moe", "qwen3_moe", num_hidden_layers=2)))


@pytest.fixture(scope="module")
def batches(source: OpenedModel) -> list[Any]:
    documents = [Document(text * 3, domain, n) for n, (domain, text) in enumerate(SENTENCES.items())]
    rows = calibration_rows(documents, source.tokenizer(), seq_len=40, max_tokens=200)
    return list(rows.batches(3))


@pytest.fixture(scope="module")
def model(source: OpenedModel) -> Any:
    return moekit.load(source.location, device="cpu").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows(source: OpenedModel, batches: list[Any], model: Any) -> dict[tuple[int, LayerRecipe], CostRow]:
    methods = composer("reap", "hc-smoe", "slimmoe", "rtn", {"bits": {"group": 8}})
    sizes = ModelSizes(source.checkpoint, source.geometries, 8)
    with Streamed(source.checkpoint, batches, statistics=methods.required, device="cpu") as streamed:
        streamed.run()
        known = {layer: record.statistics for layer, record in streamed.records.items()}
        gradients = block_gradients(model, streamed.walk.batches, seed=0)
        found = measure(streamed, known, methods, WANTED, sizes, gradients=gradients)
    return {(row.layer, row.recipe): row for row in found}


def seen(model: Any, batch: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input and output of a block, and output of its decoder layer, of the tokens that are no padding."""
    kept: dict[str, Any] = {}
    moe, decoder = find_moe_layers(model)[layer].block, model.model.layers[layer]
    handles = [
        moe.register_forward_hook(lambda _m, args, out: kept.update(given=args[0], made=out)),
        decoder.register_forward_hook(lambda _m, _a, out: kept.update(stream=out)),
    ]
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
    for handle in handles:
        handle.remove()
    parts = [kept[n][0] if isinstance(kept[n], tuple) else kept[n] for n in ("given", "made", "stream")]
    given, made, stream = (part.reshape(-1, 32)[batch.attention_mask.bool().flatten()] for part in parts)
    return given, made, stream


def by_hand(model: Any, layer: int, given_NH: torch.Tensor, bits: int | None, kept: list[int]) -> torch.Tensor:
    """The block by the plain formula: softmax over the kept experts, the two likeliest, renormalised."""
    weights = read_block(find_moe_layers(model)[layer], model.config)
    scores = (given_NH @ weights.router_EH[kept].T).softmax(-1)
    top, index = scores.topk(2, dim=-1)
    top = top / top.sum(-1, keepdim=True)
    output = torch.zeros_like(given_NH)

    def of(matrix: torch.Tensor) -> torch.Tensor:
        return matrix if bits is None else round_to_nearest(matrix, bits, 8)

    assert weights.gate_EIH is not None
    for number, expert in enumerate(kept):
        gate, up, down = (of(t[expert]) for t in (weights.gate_EIH, weights.up_EIH, weights.down_EHI))
        made = (torch.nn.functional.silu(given_NH @ gate.T) * (given_NH @ up.T)) @ down.T
        output += made * (top * (index == number)).sum(-1, keepdim=True)
    return output


def test_relative_errors_are_those_of_the_whole_model(
    model: Any, batches: list[Any], rows: dict[tuple[int, LayerRecipe], CostRow]
) -> None:
    for layer, recipe in ((0, ROUNDED), (1, ROUNDED), (1, AS_IT_IS)):
        change = output = stream = 0.0
        for batch in batches:
            given_NH, made_NH, stream_NH = seen(model, batch, layer)
            other_NH = by_hand(model, layer, given_NH, recipe.bits, list(range(8)))
            change += float((other_NH - made_NH).square().sum())
            output, stream = output + float(made_NH.square().sum()), stream + float(stream_NH.square().sum())
        row = rows[layer, recipe]
        assert row.rho == pytest.approx(change / output, rel=1e-4, abs=1e-9)
        assert row.change == pytest.approx(change / stream, rel=1e-4, abs=1e-9)


def test_to_keep_a_layer_as_it_is_costs_nothing(rows: dict[tuple[int, LayerRecipe], CostRow]) -> None:
    for layer in WANTED:
        row = rows[layer, AS_IT_IS]
        assert (row.rho, row.change, row.fisher) == (0, 0, 0)
    assert rows[1, BOTH].bytes == rows[1, DROPPED].bytes
    assert rows[1, BOTH].weights == 6 * 3 * 32 * 24


def test_fisher_errors_are_squared_slopes_along_changes(
    model: Any, batches: list[Any], rows: dict[tuple[int, LayerRecipe], CostRow], source: OpenedModel
) -> None:
    with Streamed(source.checkpoint, batches, statistics=("load",), device="cpu") as streamed:
        gradients = block_gradients(model, streamed.walk.batches, seed=0)
        total, tokens = 0.0, 0
        for number, batch in enumerate(batches):
            given_NH, made_NH, _ = seen(model, batch, 1)
            change_NH = by_hand(model, 1, given_NH, 3, list(range(8))) - made_NH
            gradient_NH = gradients.get(1, number).flatten(0, 1)[batch.attention_mask.bool().flatten()]
            total += float((change_NH * gradient_NH).sum(1).square().sum())
            tokens += len(given_NH)
    assert rows[1, ROUNDED].fisher == pytest.approx(total / (2 * tokens), rel=1e-3)


def test_gradients_are_slopes_of_the_loss(model: Any) -> None:
    ids, mask = torch.tensor([[5, 9, 12, 7, 6]]), torch.ones(1, 5, dtype=torch.int64)
    layers = find_moe_layers(model)
    found = row_gradients(model, layers, ids, mask, torch.Generator().manual_seed(3))
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    target = torch.multinomial(logs.exp(), 1, generator=torch.Generator().manual_seed(3))[:, 0]

    def loss(step: float, at: tuple[int, int]) -> float:
        def move(_m: Any, _a: Any, out: Any) -> Any:
            made = (out[0] if isinstance(out, tuple) else out).clone()
            made.view(-1, 32)[at] += step
            return (made, *out[1:]) if isinstance(out, tuple) else made

        handle = layers[0].block.register_forward_hook(move)
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        handle.remove()
        return -float(logs.gather(1, target[:, None]).sum())

    for at in ((0, 3), (2, 17), (4, 30)):
        slope = (loss(1e-2, at) - loss(-1e-2, at)) / 2e-2
        assert float(found[0].reshape(-1, 32)[at]) == pytest.approx(slope, rel=0.02, abs=2e-4)


def test_padding_adds_nothing_to_gradients(model: Any) -> None:
    layers = find_moe_layers(model)
    plain = row_gradients(model, layers, torch.tensor([[5, 9, 12]]), torch.ones(1, 3).long(), torch.Generator())
    padded = row_gradients(
        model, layers, torch.tensor([[5, 9, 12, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]]), torch.Generator()
    )
    assert float(padded[1].reshape(-1, 32)[3:].abs().max()) == 0
    assert plain[1].reshape(-1, 32).shape == (3, 32)


def test_errors_of_disjoint_tokens_add_up() -> None:
    change, gradient = torch.randn(6, 4), torch.randn(6, 4)
    whole, parts = Error(), Error()
    whole.add(change, gradient)
    parts.add(change[:2], gradient[:2])
    parts.add(change[2:], gradient[2:])
    assert whole.square == pytest.approx(parts.square)
    assert whole.fisher == pytest.approx(parts.fisher)
    assert whole.fisher == pytest.approx(float((change.double() * gradient.double()).sum(1).square().sum()))


def test_fisher_errors_are_the_second_order_of_the_divergence() -> None:
    # One token of a softmax over 3 classes behind y = logits: all targets by their probabilities in place of a draw.
    p, change = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([[0.01, -0.02, 0.005]]).double()
    expected = 0.0
    for target, weight in enumerate(p.tolist()):
        error = Error()
        error.add(change, (p - torch.eye(3, dtype=torch.float64)[target])[None])
        assert error.fisher is not None
        expected += weight * error.fisher / 2
    moved = (p.log() + change[0]).log_softmax(-1)
    assert expected == pytest.approx(float((p * (p.log() - moved)).sum()), rel=0.02)


@pytest.fixture
def table(rows: dict[tuple[int, LayerRecipe], CostRow]) -> Iterator[CostTable]:
    return CostTable(fingerprint="a", ids_sha256="b").with_rows(rows.values())


def test_a_table_is_read_again_only_where_it_holds(table: CostTable, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(table.model_dump_json())
    assert known_rows(file, table.model_copy(update={"rows": ()})) == table
    assert known_rows(tmp_path / "none.json", table) == table
    with pytest.raises(BadConfig, match="another model or text"):
        known_rows(file, table.model_copy(update={"ids_sha256": "c"}))
    assert table.missing(WANTED, fisher=True) == {}
    more = LayerRecipe(width=8)
    assert table.missing({0: (AS_IT_IS, more), 1: (ROUNDED,)}, fisher=True) == {0: [more]}
    assert table.price == "fisher"
    without = table.with_rows([CostRow(layer=0, recipe=more, bytes=1, weights=1, rho=0.5, change=0.25)])
    assert without.price == "change"
    assert without.cost(without.by_recipe[0, more]) == 0.25
    assert without.missing({0: (more,)}, fisher=True) == {0: [more]}


def test_plans_keep_the_budget_and_the_engines_rules(table: CostTable, source: OpenedModel) -> None:
    sizes = ModelSizes(source.checkpoint, source.geometries, 8)
    engine = PROFILES["moekit"]
    free = Planner(table, sizes, engine, even=False)
    full = sizes.full()
    best = free.plans(full)[0]
    assert (best.cost, best.told) == (0, "as it is")
    budget = sizes.constant + (full - sizes.constant) * 3 // 5
    plan = free.plans(budget)[0]
    assert plan.counted <= budget < plan.stored + 1
    assert plan.cost == pytest.approx(sum(table.cost(table.by_recipe[n, r]) for n, r in plan.recipes.items()))
    assert plan.bound is not None
    assert plan.bound <= plan.cost + 1e-15
    for other in free.random(budget, 3, 0):
        assert other.counted <= budget
        assert other.cost >= plan.cost
    even = Planner(table, sizes, engine, even=True)
    for other in even.plans(budget):
        assert len({recipe.keep for recipe in other.recipes.values()}) == 1
    # Layer 0 has no recipe without bits that is smaller, so files of plain weights cannot be.
    with pytest.raises(BadConfig, match="allow at least"):
        Planner(table, sizes, PROFILES["stock"], even=True).plans(budget)
    costs = [point.cost for point in free.front(6)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


def test_costs_of_another_price_are_measured_again(tmp_path: Path) -> None:
    row = CostRow(layer=0, recipe=AS_IT_IS, bytes=1, weights=1, rho=0, change=0)
    (tmp_path / "costs-0.json").write_text(f"[{row.model_dump_json()}]")
    how: Any = {"streamed": None, "statistics": {}, "composer": None, "wanted": {0: (AS_IT_IS,)}, "sizes": None}
    without = _Measuring(**how, gradients=None, seed=0, folder=tmp_path)
    assert without._known(0) == [row]
    # Since the kill there is memory for gradients: a row without them would leave the layer out of the plan.
    assert _Measuring(**how, gradients=BlockGradients({}), seed=0, folder=tmp_path)._known(0) is None
