"""Layers from disk one at a time give what the whole model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.skeleton import empty_model
from moekit.errors import BadCheckpoint
from moekit.streaming import LayerLoader, States, Walk
from moekit.streaming.walk import Inputs
from tests.checkpoints import edit_shard, plain
from tests.families import FAMILIES, HIDDEN, build, tokens
from tests.wrappers import save_wrapper

IDS = tokens(3, 12, seed=8)
MASK = torch.ones_like(IDS)
MASK[1, 9:] = 0
BATCHES = [Inputs(IDS[:2], MASK[:2]), Inputs(IDS[2:, :7], MASK[2:, :7])]


def opened(folder: Path, family: str, fused: bool = False) -> Checkpoint:
    checkpoint = Checkpoint.open(plain(folder, family, fused=fused))
    verify(checkpoint)
    return checkpoint


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_loaded_layer_holds_the_models_weights_and_leaves_again(family: str, fused: bool, tmp_path: Path) -> None:
    loader = LayerLoader(opened(tmp_path / "m", family, fused))
    expected = build(family).state_dict()
    for index in range(loader.layers):
        with loader.loaded(index) as layer:
            for name, tensor in layer.state_dict().items():
                (key,) = [k for k in expected if k.endswith(f".layers.{index}.{name}")]
                assert torch.equal(tensor, expected[key]), key
        assert all(p.is_meta for p in loader.layer(index).parameters())
    loader.load_rest()
    rest = {n: t for n, t in loader.model.state_dict().items() if ".layers." not in n}
    assert rest
    assert all(torch.equal(tensor, expected[name]) for name, tensor in rest.items())
    loader.release_rest()
    assert all(p.is_meta for p in loader.model.parameters())


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_walking_gives_the_whole_models_logits(family: str, spilled: bool, tmp_path: Path) -> None:
    loader = LayerLoader(opened(tmp_path / "m", family))
    loader.load_rest()
    walk = Walk(loader, BATCHES, limit=0 if spilled else 1 << 20)
    passes = walk.passes("states")
    passes.begin()
    for index in range(loader.layers):
        with loader.loaded(index):
            moe = walk.moe(index)
            assert moe is None or (moe.index == index and loader.model.get_submodule(moe.name) is moe.block)
            for number in range(len(BATCHES)):
                passes.run(index, number)
                passes.go_on(index, number)
    model = build(family)
    for number, batch in enumerate(BATCHES):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        with torch.no_grad(), walk.finished_with(lambda n=number: passes.answer(n)):
            logits = loader.model(**inputs).logits
        with torch.no_grad():
            expected = model(**inputs).logits
        real = batch.attention_mask.bool()
        assert torch.equal(logits[real], expected[real])
        assert torch.equal(passes.finish(number).logits, expected)
    passes.close()


@pytest.mark.parametrize("head", ["left out", "equal", "own"])
def test_the_head_is_the_one_that_loading_the_folder_gives(head: str, tmp_path: Path) -> None:
    """A config may say "tied" while the file holds a head of its own: stock transformers keeps it."""
    folder = plain(tmp_path / "m", "qwen3_moe", tie_word_embeddings=True)

    def store(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        if head != "left out":
            tensors["lm_head.weight"] = embedding.clone() if head == "equal" else embedding.flip(0)

    edit_shard(folder / "model.safetensors", store)
    expected = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    loader = LayerLoader(Checkpoint.open(folder))
    for _ in range(2):  # a second time too, after it was forgotten
        loader.load_rest()
        assert torch.equal(loader.model.lm_head.weight, expected)
        assert (loader.model.lm_head.weight is loader.model.model.embed_tokens.weight) == (head != "own")
        loader.release_rest()
        assert loader.model.lm_head.weight.is_meta


def test_an_empty_model_has_shapes_but_no_weights(tmp_path: Path) -> None:
    model = empty_model(opened(tmp_path / "m", "qwen3_moe"))
    expected = {name: tensor.shape for name, tensor in build("qwen3_moe").state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(not buffer.is_meta for buffer in model.model.rotary_emb.buffers())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", "mixtral")
    del checkpoint.tensors["model.layers.1.input_layernorm.weight"]
    with pytest.raises(BadCheckpoint, match=r"input_layernorm.weight") as caught:
        LayerLoader(checkpoint).load(1)
    assert caught.value.layer == 1


def test_states_in_a_folder_outlive_the_object(tmp_path: Path) -> None:
    shapes = [(2, 3), (1, 5)]
    values = [torch.randn(*shape, HIDDEN) for shape in shapes]
    first = States(shapes, HIDDEN, torch.float32, folder=tmp_path)
    for number in (1, 0):
        first.put(number, values[number])
    first.close()
    again = States(shapes, HIDDEN, torch.float32, folder=tmp_path)
    assert all(torch.equal(again.get(number), value) for number, value in enumerate(values))
    half = States(shapes, HIDDEN, torch.bfloat16, limit=0)
    half.put(1, values[1])
    assert torch.equal(half.get(1), values[1].bfloat16())
    with pytest.raises(EOFError):
        States(shapes, HIDDEN, torch.float32, limit=0).get(0)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llama4"])
def test_what_towers_compute_for_themselves_lies_where_their_weights_go(family: str, tmp_path: Path) -> None:
    """Rotary frequencies of a tower are in no checkpoint: nothing else would bring them to the device."""
    loader = LayerLoader(Checkpoint.open(save_wrapper(tmp_path / "m", family)), device="meta")
    within = {id(module) for index in range(loader.layers) for module in loader.layer(index).modules()}
    beside = [module for module in loader.model.modules() if id(module) not in within]
    buffers = [buffer for module in beside for buffer in module.buffers(recurse=False)]
    assert len(buffers) > 1
    assert all(buffer.is_meta for buffer in buffers)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_single_rows_of_states(limit: int) -> None:
    states = States([(1, 2), (2, 4)], HIDDEN, torch.bfloat16, limit=limit)
    value = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    states.put(1, value)
    for chosen in ([], [3], [0, 1, 2, 5, 7], [6, 1, 0]):
        rows_nH = states.rows(1, torch.tensor(chosen, dtype=torch.int64))
        assert rows_nH.shape == (len(chosen), HIDDEN)
        assert all(torch.equal(row, value[at // 4, at % 4]) for row, at in zip(rows_nH, chosen, strict=True))
