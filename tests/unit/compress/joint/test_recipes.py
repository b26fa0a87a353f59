"""Recipes of a layer: what they say, what they make of its weights, and what that takes on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from moekit.anatomy.moe_layer import Geometry
from moekit.checkpoint import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.narrowing import select_neurons
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.joint.composing import Composer, composer
from moekit.compress.joint.menu import MenuKnobs, make_menu, most_experts, width_step, widths_of
from moekit.compress.joint.neurons import NeuronStore
from moekit.compress.joint.profiles import PROFILES, profile_of
from moekit.compress.joint.recipe import AS_IT_IS, LayerRecipe
from moekit.compress.joint.sizes import ModelSizes
from moekit.compress.maths.rounding import round_to_nearest
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.jobs.shared.opened import OpenedModel, open_source
from moekit.trace.statistics import LayerStatistics
from tests.tiny import write_model

E, H, WIDE, GROUP = 4, 8, 16, 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_source(str(write_model(tmp_path_factory.mktemp("made") / "moe", "qwen3_moe", num_hidden_layers=2)))


@pytest.fixture(scope="module")
def sizes(source: OpenedModel) -> ModelSizes:
    return ModelSizes(source.checkpoint, source.geometries, GROUP)


def layer(seed: int = 0) -> LayerWeights:
    draw = torch.Generator().manual_seed(seed)
    up, gate, down = (torch.randn(E, *shape, generator=draw) for shape in ((WIDE, H), (WIDE, H), (H, WIDE)))
    return LayerWeights(up, down, gate, router={"weight": torch.randn(E, H, generator=draw)})


def inputs_of(weights: LayerWeights) -> LayerInputs:
    draw = torch.Generator().manual_seed(1)
    values = {
        "load": torch.tensor([5, 9, 2, 7]),
        "gated_output_norm": torch.tensor([50.0, 9.0, 30.0, 7.0]),
        "renormalised_output_norm": torch.tensor([50.0, 9.0, 30.0, 7.0]),
        "all_output_sum": torch.randn(E, H, generator=draw).double(),
    }
    geometry = Geometry(H, E, 2, WIDE, 0, True, False, False, True)
    return LayerInputs(0, geometry, LayerStatistics(E, H, (), 10, values, width=WIDE), lambda: weights)


@pytest.fixture
def methods() -> Composer:
    """Neurons of every expert are worth their number, and are never active together."""
    knobs = {"bits": {"group": GROUP}, "narrow": {"score": "fisher"}}
    store = NeuronStore()
    worth_EI = torch.arange(float(WIDE)).expand(E, WIDE).clone()
    worth_EI[2] = worth_EI[2].flip(0)
    store.put(0, {"neuron_fisher": worth_EI.double()}, [torch.eye(WIDE) for _ in range(E)])
    return dataclasses.replace(composer("reap", "hc-smoe", "slimmoe", "rtn", knobs), neurons=store)


def test_a_recipe_says_how_experts_go_or_keeps_all() -> None:
    with pytest.raises(ValidationError):
        LayerRecipe(keep=3)
    with pytest.raises(ValidationError):
        LayerRecipe(way="drop")
    assert str(AS_IT_IS) == "as it is"
    assert str(LayerRecipe(keep=3, way="merge", width=4, bits=3)) == "merge to 3, width 4, 3 bit"
    assert LayerRecipe(keep=8, way="drop", width=24, bits=4).fitted(8, 24) == LayerRecipe(bits=4)
    assert LayerRecipe(keep=8, way="drop").fitted(9, 24) == LayerRecipe(keep=8, way="drop")


def test_a_narrower_expert_computes_what_the_wide_one_does_without_those_neurons() -> None:
    weights = layer()
    biased = dataclasses.replace(
        weights, up_bias_EI=torch.randn(E, WIDE), gate_bias_EI=torch.randn(E, WIDE), down_bias_EH=torch.randn(E, H)
    )
    kept_MW = torch.stack([torch.randperm(WIDE)[:6].sort().values for _ in range(E)])
    made, x = select_neurons(biased, kept_MW), torch.randn(5, H)
    for e in range(E):

        def inner(w: LayerWeights, e: int = e) -> torch.Tensor:
            assert w.gate_EIH is not None
            assert w.gate_bias_EI is not None
            assert w.up_bias_EI is not None
            gate = torch.nn.functional.silu(x @ w.gate_EIH[e].T + w.gate_bias_EI[e])
            return gate * (x @ w.up_EIH[e].T + w.up_bias_EI[e])

        wide = inner(biased)
        mask = torch.zeros(WIDE)
        mask[kept_MW[e]] = 1
        assert torch.allclose((wide * mask) @ biased.down_EHI[e].T, inner(made) @ made.down_EHI[e].T, atol=1e-5)
    assert torch.equal(made.router_EH, weights.router_EH)
    assert biased.down_bias_EH is not None
    assert made.down_bias_EH is not None
    assert torch.equal(made.down_bias_EH, biased.down_bias_EH)


def test_the_steps_of_a_recipe_follow_one_another(methods: Composer) -> None:
    weights = layer()
    inputs = inputs_of(weights)
    recipe = LayerRecipe(keep=2, way="drop", width=8, bits=4)
    outcome = methods.outcome(recipe, inputs)
    # Norms over loads are 10, 1, 15, 1: the first and the third stay.
    assert outcome == LayerOutcome(keep=(0, 2), width=8, bits={"gate": (4, 4), "up": (4, 4), "down": (4, 4)})
    made = methods.weights(recipe, outcome, weights, inputs)
    # The last half of the first one's neurons, the first half of the third's; what is not seen together mends nothing.
    for row, (expert, kept) in enumerate(((0, slice(8, 16)), (2, slice(0, 8)))):
        up = round_to_nearest(weights.up_EIH[expert][kept], 4, GROUP)
        down = round_to_nearest(weights.down_EHI[expert][:, kept], 4, GROUP)
        assert torch.equal(made.up_EIH[row], up)
        assert torch.equal(made.down_EHI[row], down)
    assert torch.equal(made.router_EH, weights.router_EH[[0, 2]])
    merged = methods.outcome(LayerRecipe(keep=3, way="merge"), inputs)
    assert merged.merges
    assert merged.experts == 3
    assert merged.width is None
    unchanged = methods.weights(AS_IT_IS, methods.outcome(AS_IT_IS, inputs), weights, inputs)
    assert torch.equal(unchanged.up_EIH, weights.up_EIH)


def test_routers_that_stay_as_they_are_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(BadConfig, match="hc-smoe leaves the router as it is"):
        composer("reap", "hc-smoe", "slimmoe", "rtn", {"merge": {"router": "redirect"}})
    with pytest.raises(BadConfig, match="mone leaves the router as it is"):
        composer("mone", "hc-smoe", "slimmoe", "rtn")
    composer("mone", "hc-smoe", "slimmoe", "rtn", {"drop": {"operator": "drop"}})


def test_methods_that_need_more_than_statistics_are_refused() -> None:
    with pytest.raises(BadConfig, match="naee"):
        composer("naee", "hc-smoe", "slimmoe", "rtn")
    with pytest.raises(BadConfig, match="gptq"):
        composer("reap", "hc-smoe", "slimmoe", "gptq")
    with pytest.raises(BadConfig, match="no methods of 'prune'"):
        composer("reap", "hc-smoe", "slimmoe", "rtn", {"prune": {}})


def test_a_written_folder_is_as_large_as_planned(source: OpenedModel, sizes: ModelSizes, tmp_path: Path) -> None:
    stock = PROFILES["stock"]
    for number, recipe in enumerate((LayerRecipe(keep=5, way="drop"), LayerRecipe(width=16))):
        outcomes = {n: LayerOutcome(keep=tuple(range(recipe.experts(8))), width=recipe.width) for n in (0, 1)}

        def rewrite(index: int, weights: LayerWeights, outcomes: dict[int, LayerOutcome] = outcomes) -> LayerWeights:
            made = weights.select(outcomes[index].keep)
            width = outcomes[index].width
            return made if width is None else select_neurons(made, torch.arange(width).expand(made.experts, -1))

        apply(source.checkpoint, outcomes, tmp_path / str(number), rewrite=rewrite, record=Record(command="test"))
        written = sum(f.stat().st_size for f in (tmp_path / str(number)).glob("*.safetensors"))
        # To the header: fewer tensors have a shorter one.
        assert written <= sizes.total(recipe, stock) <= written + 12_000
    assert sizes.full() == sizes.total(AS_IT_IS, stock)


def test_packed_bytes_by_hand(sizes: ModelSizes) -> None:
    # 8 experts of three matrices of 32 x 24 numbers in float32, and a router of 8 x 32.
    weights = 8 * 3 * 32 * 24
    size = sizes.of(AS_IT_IS, 0)
    assert (size.weights, size.stored) == (weights, 4 * weights + 4 * 8 * 32)
    packed = 4 * 8 * 32 + weights * 4 // 8 + weights // GROUP * 16 // 8
    # Beside them what headers say of two tensors for each of 24 matrices, 160 bytes at most.
    assert sizes.counted(size, 4, PROFILES["moekit"]) == packed + 24 * 2 * 160
    assert sizes.counted(size, 4, PROFILES["stock"]) == size.stored
    assert sizes.counted(size, None, PROFILES["moekit"]) == size.stored


def test_blocks_of_llama_cpp() -> None:
    engine = PROFILES["llama.cpp"]
    # Bytes of a block of 32 weights: 18, 22, 34.
    assert [engine.packed_bytes(1024, bits, 0) for bits in (4, 5, 8)] == [576, 704, 1088]
    assert engine.bits_of(2048, 1440) == (8, 5, 4)
    assert engine.bits_of(2048, 24) == ()
    with pytest.raises(BadConfig, match="stock, vllm"):
        profile_of("tgi")


def test_widths_go_in_steps_that_kernels_take() -> None:
    assert (width_step(768), width_step(1024), width_step(24)) == (64, 128, 8)
    assert widths_of(768, (0.75, 0.5)) == [576, 384]
    assert widths_of(24, (0.75, 0.5)) == [16]


def test_a_menu_holds_what_each_kind_alone_makes_of_the_budget(sizes: ModelSizes) -> None:
    engine = PROFILES["moekit"]
    budget = sizes.constant + (sizes.full() - sizes.constant) * 6 // 10
    menu = make_menu(sizes, engine, budget, MenuKnobs())
    assert menu.singles == {
        "drop alone": LayerRecipe(keep=4, way="drop"),
        "merge alone": LayerRecipe(keep=4, way="merge"),
        "width alone": LayerRecipe(width=8),
        "bits alone": LayerRecipe(bits=8),
    }
    assert set(menu.singles.values()) <= set(menu.recipes)
    assert menu.recipes[0] == AS_IT_IS
    assert len(menu.recipes) <= 24
    for recipe in menu.singles.values():
        assert sizes.total(recipe, engine) <= budget
    assert most_experts(sizes, engine, budget, None, None) == 4
    assert make_menu(sizes, engine, sizes.full(), MenuKnobs()).singles == {}
