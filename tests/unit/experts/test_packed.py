"""Packed experts: every width by hand, products against the plain formula, folders against the rounded model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import moekit
from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.hollow import hollow_names
from moekit.checkpoint.model import load as load_stock
from moekit.checkpoint.packed_loading import PackedMatrix
from moekit.checkpoint.quantized.packed_experts import numbers_of, weights_of, words_of
from moekit.errors import BadCheckpoint, BadConfig
from moekit.experts import kernels
from moekit.experts.methods.packed import Packed
from moekit.experts.packed_model import attach_packed
from moekit.experts.packing import Stored, tensors_of_layer
from moekit.recipe import runner
from moekit.recipe.schema import load_recipe
from moekit.runtime import attach, attached, detach
from tests.checkpoints import edit_json
from tests.exporting import rounded
from tests.families import build, logits, tokens

WIDTHS = (1, 2, 3, 4, 8)


def by_expert(layer: int, part: str, expert: int) -> int:
    """Widths that differ in a layer."""
    return WIDTHS[(layer + expert + len(part)) % len(WIDTHS)]


def legal(bits: int) -> Tensor:
    """All numbers of a width."""
    return torch.tensor([-1, 1]) if bits == 1 else torch.arange(-(1 << (bits - 1)), 1 << (bits - 1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A rounded model, and the same packed."""
    folder = tmp_path_factory.mktemp("packed")
    source = rounded(folder / "rounded", "qwen3_moe", by_expert)
    made = moekit.export(source, to="packed", out=folder / "packed")
    assert made.check is not None
    assert made.check["ok"]
    assert sum(made.matrices.values()) == 48
    return source, folder / "packed"


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_number_of_a_width_comes_back(bits: int) -> None:
    numbers = legal(bits)[torch.randint(0, len(legal(bits)), (3, 50), generator=torch.Generator().manual_seed(bits))]
    numbers[0, : len(legal(bits))] = legal(bits)[:50]
    words = words_of(numbers, bits)
    assert words.shape == (3, -(-50 * bits // 32))
    # A row is one whole number, lowest bits first, of numbers above the least one.
    for row, of_row in zip(numbers.tolist(), (words.long() & 0xFFFFFFFF).tolist(), strict=True):
        whole = sum(word << (32 * place) for place, word in enumerate(of_row))
        told = [whole >> (bits * place) & ((1 << bits) - 1) for place in range(50)]
        assert [2 * n - 1 if bits == 1 else n - (1 << (bits - 1)) for n in told] == row
    assert numbers_of(words, bits, 50).dtype == torch.int8
    assert torch.equal(numbers_of(words, bits, 50).long(), numbers)


def test_words_by_hand() -> None:
    assert words_of(torch.tensor([[0, 1, 2, 3]]), 3).tolist() == [[0o7654]]
    assert weights_of(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0.5, 2.0]])).tolist() == [[0, 0.5, 4, 6]]
    with pytest.raises(BadConfig, match="-1 and 1 alone"):
        words_of(torch.tensor([[0, 1]]), 1)


@pytest.mark.parametrize(
    ("bits", "group", "kernel", "within"),
    [
        (1, 32, "int4", 6e-3),
        (3, 64, "int4", 6e-3),
        (4, 0, "int4", 6e-3),
        (6, 0, "", 6e-3),
        (8, 128, "int4-twice", 6e-3),
    ],
)
def test_products_equal_the_plain_formula(bits: int, group: int, kernel: str, within: float) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = legal(bits)[torch.randint(0, len(legal(bits)), (48, 256), generator=generator)]
    scale = (torch.rand(48, 256 // (group or 256), generator=generator) + 0.1).bfloat16()
    one = Stored(bits, words_of(numbers, bits), scale, 256)
    assert not kernel or kernels.kernel_for(bits, 48, 256, scale.shape[1]) in (kernel, None)
    product = kernels.lay(one)
    if product is None:
        pytest.skip("this torch has no such kernel")
    given = torch.randn(5, 256, generator=generator)
    wanted = given.double() @ (numbers.double() * scale.double().repeat_interleave(256 // scale.shape[1], 1)).T
    made = product(given)
    assert float((made - wanted).norm() / wanted.norm()) < within
    # A token's answer does not depend on the tokens beside it.
    torch.testing.assert_close(product(given[2:3]), made[2:3], rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


def test_wide_rows_by_halves_of_activations_are_nearly_exact() -> None:
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        pytest.skip("this torch has no such kernel")
    generator = torch.Generator().manual_seed(0)
    # The extremes, where sums of pairs of bytes in 16 bits would overflow were halves of 8 bits.
    numbers = torch.randint(-128, 128, (32, 512), generator=generator, dtype=torch.int8)
    numbers[0], numbers[1] = -128, 127
    given = torch.randn(4, 512, generator=generator)
    given[0] = 1
    given[1] = -1
    made = kernels._by_rows(numbers, torch.full((32,), 0.01))(given)
    wanted = given.double() @ numbers.double().T * 0.01
    assert float((made - wanted).norm() / wanted.norm()) < 3e-4
    assert torch.equal(kernels._by_rows(numbers, torch.full((32,), 0.01))(given[2:3]), made[2:3])
    halves, scale = kernels.halved(given)
    assert int(halves.max()) <= 127
    whole = 128 * (halves[:4].long() - 64) + halves[4:].long() - 64
    torch.testing.assert_close(whole * scale, given, rtol=0, atol=float(scale.max()) / 2 + 1e-6)


def test_the_folder_is_small_and_holds_no_float_expert(folders: tuple[Path, Path]) -> None:
    packed = folders[1]
    tensors = {n: t for file in packed.glob("model*.safetensors") for n, t in load_file(file).items()}
    experts = {name: t for name, t in tensors.items() if ".experts." in name}
    assert {name.rpartition(".")[2] for name in experts} == {"weight_packed", "weight_scale"}
    # 64 x 64 matrices in groups of 32: so many bits a number, and sixteen a group.
    sizes = [
        64 * 64 * by_expert(layer, part, e) // 8 + 64 * 2 * 2
        for layer in (0, 1)
        for part in ("gate", "up", "down")
        for e in range(8)
    ]
    assert sum(t.numel() * t.element_size() for t in experts.values()) == sum(sizes)
    live = moekit.load(packed)
    assert sum(p.untyped_storage().nbytes() for name, p in live.named_parameters() if ".experts." in name) <= 16
    assert len(hollow_names(live)) == 4
    assert moekit.check(packed).ok
    with pytest.raises(ValueError, match="no `quant_method` attribute"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_what_it_computes_is_the_rounded_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, packed = folders
    wanted, live = logits(moekit.load(source)), moekit.load(packed)
    assert torch.equal(logits(live), wanted)  # more than 16 tokens: unpacked weights, bit for bit
    assert torch.equal(logits(moekit.load(packed, parts=False)), wanted)
    moekit.save(live, tmp_path / "again")
    again = moekit.load(tmp_path / "again")
    assert torch.equal(logits(again), logits(live))
    assert moekit.check(tmp_path / "again").ok
    few = tokens(1, 6)
    with torch.no_grad():
        exact, fast = moekit.load(source)(few).logits, live(few).logits
        assert torch.equal(again(few).logits, fast)
    assert 0 < float((fast - exact).norm() / exact.norm()) < 1e-2
    plain = load_stock(packed, keep_packed=True)
    attach_packed(plain, Checkpoint.open(packed), kernel="none")
    with torch.no_grad():
        torch.testing.assert_close(plain(few).logits, exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(copy.deepcopy(live)), wanted)


def test_experts_of_a_layer_against_its_own_matrices() -> None:
    model = build("mixtral", hidden_size=64, intermediate_size=64)
    layer = find_moe_layers(model)[0]
    generator = torch.Generator().manual_seed(0)
    made, weights = [], {}
    for expert in range(layer.geometry.experts):
        for part in ("gate", "up", "down"):
            bits = by_expert(0, part, expert)
            numbers = legal(bits)[torch.randint(0, len(legal(bits)), (64, 64), generator=generator)]
            scale = (torch.rand(64, 2, generator=generator) * 0.1 / (1 << bits)).bfloat16()
            made.append(PackedMatrix(0, expert, part, bits, words_of(numbers, bits), scale))
            weights[expert, part] = numbers.float() * scale.float().repeat_interleave(32, 1)
    tensors = tensors_of_layer(made, 0)
    order = [3, 1, 0, 2, *range(4, layer.geometry.experts)]
    attach(model, Packed(kernel="none"), {0: Packed().permute(tensors, order)})
    hidden = torch.randn(5, 64, generator=generator)
    index = torch.tensor([[0, 1], [2, 0], [3, 1], [1, 2], [0, layer.geometry.experts]])
    gates = torch.rand(5, 2, generator=generator)
    gates[4, 1] = 0
    with torch.no_grad():
        answer = layer.experts(hidden, index, gates)
    for token in range(5):
        total = torch.zeros(64)
        for expert, gate in zip(index[token].tolist(), gates[token], strict=True):
            if expert < layer.geometry.experts:
                w = {part: weights[order[expert], part] for part in ("gate", "up", "down")}
                inner = torch.nn.functional.silu(w["gate"] @ hidden[token]) * (w["up"] @ hidden[token])
                total += gate * (w["down"] @ inner)
        torch.testing.assert_close(answer[token], total, rtol=1e-4, atol=1e-5)


def test_refusals(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, packed = folders
    live = moekit.load(packed)
    with pytest.raises(BadConfig, match="not trained"):
        live.train()(tokens(1, 4))
    live.eval()
    detach(live, "experts")
    with pytest.raises(BadConfig, match="without floats in their place"):
        moekit.save(live, tmp_path / "never")
    assert not attached(live)
    with torch.no_grad():  # never a number that looks right
        assert bool(find_moe_layers(live)[0].experts.down_proj.isnan().all())

    def lied(config: dict[str, Any]) -> None:
        config["quantization_config"]["columns"]["gate_proj"] = 96

    other = tmp_path / "other"
    moekit.export(source, to="packed", out=other)
    edit_json(other / "config.json", lied)
    with pytest.raises(BadCheckpoint, match="has shape"):
        moekit.load(other)


def test_a_recipe_packs_and_a_pruned_folder_stays_packed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, packed = folders
    steps = [
        {"use": "export", "id": "small", "model": str(source), "to": "packed"},
        {"use": "prune", "id": "fewer", "model": "${steps.small}", "method": "random", "keep": 0.5, "proof": False},
    ]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "short", "out": str(tmp_path / "run"), "steps": steps}))
    runner.run(load_recipe(file))
    one, two = (folder / "model.safetensors" for folder in (packed, tmp_path / "run" / "small"))
    assert one.read_bytes() == two.read_bytes()
    fewer = moekit.load(tmp_path / "run" / "fewer")
    assert hollow_names(fewer)
    assert torch.equal(logits(fewer), logits(moekit.load(tmp_path / "run" / "fewer", parts=False)))
