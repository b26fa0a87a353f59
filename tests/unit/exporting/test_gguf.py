"""GGUF files, read back with the package's reader and, where transformers reads them, run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import moekit
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
from moekit.data.text import Document
from moekit.data.tokenizer import train_tokenizer
from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.exporting.gguf_blocks import packed
from moekit.exporting.recovery import Recovered
from tests.checkpoints import edit_json, edit_shard, plain
from tests.exporting import rounded
from tests.families import EXPERTS, HIDDEN, TOP_K, VOCAB, WIDTH, logits

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

RECORD = Record(command="a test")


def export(source: Path, out: Path, **how: Any) -> Any:
    return moekit.export(source, to="gguf", out=out, **how)


def read(folder: Path) -> tuple[Any, dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Reader, numbers of each tensor in float32, and what kind they are of."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    numbers = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    shaped = {t.name: numbers[t.name].reshape([int(n) for n in t.shape[::-1]]) for t in reader.tensors}
    return reader, shaped, {t.name: t.tensor_type.name for t in reader.tensors}


def value(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


def disk(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def test_blocks_by_hand() -> None:
    numbers = torch.arange(32)[None] % 16 - 8
    found = Recovered(numbers.to(torch.int16), torch.tensor([[0.5]]))
    # Scale .5 is 0x3800; number j + 8 in the low half of byte j, number j + 16 + 8 in the high half: both are j here.
    assert packed(found, "Q4_0").tolist() == [[0x00, 0x38, *(j | j << 4 for j in range(16))]]
    wide = Recovered((torch.arange(32)[None] - 16).to(torch.int16), torch.tensor([[0.5]]))
    # q + 16 is 0 to 31: fifth bits are set in the upper half of the word.
    assert packed(wide, "Q5_0").tolist() == [[0x00, 0x38, 0, 0, 0xFF, 0xFF, *(j | j << 4 for j in range(16))]]
    assert packed(wide, "Q8_0").tolist() == [[0x00, 0x38, *((j - 16) % 256 for j in range(32))]]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_names_shapes_and_values(family: str, tmp_path: Path) -> None:
    heads_of_keys = {"olmoe": 4}.get(family, 2)
    source = plain(tmp_path / "source", family, fused=family == "qwen2_moe", num_key_value_heads=heads_of_keys)
    stock = disk(plain(tmp_path / "split", family, num_key_value_heads=heads_of_keys))
    made = export(source, tmp_path / "out")
    reader, numbers, kinds = read(tmp_path / "out")
    assert set(kinds.values()) == {"F32"}
    assert made.matrices == {"F32": 6}
    left = dict(numbers)
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    short = {"gate": "w1", "up": "w3", "down": "w2"}
    names = short if family == "mixtral" else {part: f"{part}_proj" for part in short}
    for layer in range(2):
        for part, name in names.items():
            stack = [stock[f"model.layers.{layer}.{block}.experts.{e}.{name}.weight"] for e in range(EXPERTS)]
            assert np.array_equal(left.pop(f"blk.{layer}.ffn_{part}_exps.weight"), torch.stack(stack).numpy())
        router = stock[f"model.layers.{layer}.{block}.gate.weight"]
        assert np.array_equal(left.pop(f"blk.{layer}.ffn_gate_inp.weight"), router.numpy())
        for which, heads in (("q", 4), ("k", heads_of_keys)):
            rows = stock[f"model.layers.{layer}.self_attn.{which}_proj.weight"]
            if family == "mixtral":  # row i of a head's first half is followed by row i of its second half
                half = len(rows) // heads // 2
                order = [h * 2 * half + side * half + i for h in range(heads) for i in range(half) for side in (0, 1)]
                rows = rows[order]
            assert np.array_equal(left.pop(f"blk.{layer}.attn_{which}.weight"), rows.numpy())
    assert np.array_equal(left.pop("token_embd.weight"), stock["model.embed_tokens.weight"].numpy())
    assert np.array_equal(left.pop("output.weight"), stock["lm_head.weight"].numpy())
    if family == "qwen2_moe":
        gate = stock["model.layers.1.mlp.shared_expert_gate.weight"]
        assert np.array_equal(left.pop("blk.1.ffn_gate_inp_shexp.weight"), gate[0].numpy())
        up = stock["model.layers.1.mlp.shared_expert.up_proj.weight"]
        assert np.array_equal(left.pop("blk.1.ffn_up_shexp.weight"), up.numpy())
        bias = stock["model.layers.1.self_attn.k_proj.bias"]
        assert np.array_equal(left.pop("blk.1.attn_k.bias"), bias.numpy())
    total = sum(t.numel() for t in stock.values())
    assert sum(n.size for n in numbers.values()) == total, "every number is in the file once"
    name = value(reader, "general.architecture")
    assert name == {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}[family]
    told = {"expert_count": EXPERTS, "expert_used_count": TOP_K, "embedding_length": HIDDEN, "block_count": 2,
            "expert_feed_forward_length": WIDTH, "vocab_size": VOCAB, "attention.head_count": 4,
            "attention.head_count_kv": heads_of_keys, "attention.key_length": 8, "context_length": 128}  # fmt: skip
    for key, number in told.items():
        assert value(reader, f"{name}.{key}") == number, key
    config = AutoConfig.from_pretrained(source)
    assert value(reader, f"{name}.attention.layer_norm_rms_epsilon") == pytest.approx(config.rms_norm_eps)
    assert value(reader, f"{name}.rope.freq_base") == pytest.approx(config.rope_parameters["rope_theta"])


@pytest.mark.parametrize(("bits", "kind"), [(2, "Q4_0"), (4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
def test_rounded_experts_are_held_exactly(bits: int, kind: str, tmp_path: Path) -> None:
    source = rounded(tmp_path / "rounded", "qwen3_moe", bits, group=32 if bits != 4 else 0)
    made = export(source, tmp_path / "out")
    _, numbers, kinds = read(tmp_path / "out")
    before = disk(source)
    for layer in range(2):
        for part in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            assert kinds.pop(name) == kind
            stack = [before[f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"] for e in range(EXPERTS)]
            assert np.array_equal(numbers[name], torch.stack(stack).numpy())
    assert set(kinds.values()) == {"F32"}
    assert made.matrices == {kind: 6}
    assert made.bytes["experts"] == 2 * 3 * EXPERTS * 64 * 64 // 32 * {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}[kind]


def test_experts_of_different_widths_take_the_widest_of_their_layer_and_part(tmp_path: Path) -> None:
    def bits(layer: int, part: str, expert: int) -> int:
        return {"gate": 1 + expert % 3, "up": 5 if expert == 3 and layer == 1 else 4, "down": 8 - expert}[part]

    source = rounded(tmp_path / "rounded", "mixtral", bits, dtype=torch.bfloat16)
    export(source, tmp_path / "out")
    _, numbers, kinds = read(tmp_path / "out")
    assert [kinds[f"blk.{layer}.ffn_up_exps.weight"] for layer in (0, 1)] == ["Q4_0", "Q5_0"]
    assert [kinds[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "down")] == ["Q4_0", "Q8_0"]
    before = disk(source)
    for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        stack = [before[f"model.layers.1.block_sparse_moe.experts.{e}.{name}.weight"] for e in range(EXPERTS)]
        # Products, which the folder has in bfloat16.
        made = torch.from_numpy(np.array(numbers[f"blk.1.ffn_{part}_exps.weight"])).to(torch.bfloat16)
        assert torch.equal(made, torch.stack(stack))
    others = {kind for name, kind in kinds.items() if "exps" not in name}
    assert others == {"BF16", "F32"}, "as stored; vectors and routers in float32"
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_other_matrices_are_written_as_asked(kind: str, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen3_moe")
    export(source, tmp_path / "out", tensor_type=kind)
    _, numbers, kinds = read(tmp_path / "out")
    before = disk(source)["model.layers.0.self_attn.q_proj.weight"]
    assert kinds["blk.0.attn_q.weight"] == kind.upper()
    # Rows of 24 do not come in blocks of 32.
    assert kinds["blk.0.ffn_down_exps.weight"] == {"q8_0": "F16"}.get(kind, kind.upper())
    if kind == "q8_0":
        assert np.abs(numbers["blk.0.attn_q.weight"] - before.numpy()).max() <= float(before.abs().max()) / 127 * 0.51
    else:
        dtype = torch.float16 if kind == "f16" else torch.bfloat16
        assert np.array_equal(numbers["blk.0.attn_q.weight"], before.to(dtype).float().numpy())


def test_transformers_reads_the_file_and_computes_the_same(tmp_path: Path) -> None:
    source = rounded(tmp_path / "rounded", "qwen3_moe", 4)
    export(source, tmp_path / "out")
    config = AutoConfig.from_pretrained(source)
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", config=config, dtype=torch.float32
    )
    wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(made.eval()), logits(wanted), rtol=1e-5, atol=1e-6)


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen3_moe")
    edit_json(source / "config.json", lambda config: config.update(norm_topk_prob=False))
    with pytest.raises(UnsupportedModel, match=r"norm_topk_prob is False, and llama\.cpp computes qwen3_moe with True"):
        export(source, tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="phimoe is not written as GGUF: known are mixtral"):
        export(plain(tmp_path / "other", "phimoe"), tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="layers after 1 are dense"):
        export(plain(tmp_path / "ernie", "ernie4_5_moe", moe_layer_end_index=1), tmp_path / "out")
    # The best group by its best expert: llama.cpp takes the two best of each group together.
    with pytest.raises(UnsupportedModel, match="topk_method is 'group_limited_greedy', and llama"):
        export(plain(tmp_path / "v2", "deepseek_v2"), tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="those of this model are not compressed, and it has 3 layers"):
        export(plain(tmp_path / "lite", "deepseek_v3", q_lora_rank=None), tmp_path / "out")
    uneven = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    uneven |= {"mscale": 1.0, "mscale_all_dim": 0.5}
    with pytest.raises(UnsupportedModel, match="mscale equal to mscale_all_dim"):
        export(plain(tmp_path / "yarn", "deepseek_v3", rope_parameters=uneven), tmp_path / "out")
    with pytest.raises(UnsupportedModel, match=r"2 key heads serve 4 query heads, and llama\.cpp reads olmoe"):
        export(plain(tmp_path / "olmoe", "olmoe"), tmp_path / "out")
    source = rounded(tmp_path / "short", "qwen3_moe", 4, group=16)
    with pytest.raises(BadConfig, match="layer 0: the gate projections were rounded with groups of 16"):
        export(source, tmp_path / "out")
    assert export(source, tmp_path / "floats", tensor_type="bf16").matrices == {"BF16": 6}
    edit_json(source / "moekit.json", lambda record: record["scores"]["grids"].update(symmetric=False))
    with pytest.raises(BadConfig, match="rounded with zero points"):
        export(source, tmp_path / "out")
    with pytest.raises(BadConfig, match="tensor_type changes nothing for auto-round"):
        moekit.export(source, to="auto-round", tensor_type="f16", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_activation_and_layers_of_different_sizes_are_refused(tmp_path: Path) -> None:
    source = plain(tmp_path / "gelu", "qwen3_moe", hidden_act="gelu")
    with pytest.raises(UnsupportedModel, match=r"hidden_act is 'gelu', and .* with 'silu'"):
        export(source, tmp_path / "out")
    outcomes = {0: LayerOutcome(keep=(0, 1, 2, 3)), 1: LayerOutcome(keep=(1, 2, 4))}
    apply(Checkpoint.open(plain(tmp_path / "whole", "qwen3_moe")), outcomes, tmp_path / "uneven", record=RECORD)
    with pytest.raises(UnsupportedModel, match="layers hold 3 to 4 experts"):
        export(tmp_path / "uneven", tmp_path / "out")


def test_numbers_that_a_type_does_not_hold_are_no_infinities(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen3_moe")
    (shard,) = source.glob("model*.safetensors")
    edit_shard(shard, lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"].mul_(1e7))
    with pytest.raises(NumericFault, match=r"layer 1: .*o_proj\.weight holds numbers beyond what F16 holds"):
        export(source, tmp_path / "out", tensor_type="f16")
    assert not (tmp_path / "out").exists()
    export(source, tmp_path / "out", tensor_type="bf16")


def test_byte_level_tokenizers_are_in_the_file(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen3_moe", vocab_size=300)
    text = [Document("the cat sat on the mat, the rat sat on the cat. 123 " * 40, "a", "a")]
    train_tokenizer(text, 270).save_pretrained(source)
    assert export(source, tmp_path / "out").tokenizer == "byte-level BPE (gpt2, smollm)"
    reader, _, _ = read(tmp_path / "out")
    told = json.loads((source / "tokenizer.json").read_text())
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 300
    assert {token: number for number, token in enumerate(tokens[:270])} == told["model"]["vocab"] | {
        entry["content"]: entry["id"] for entry in told["added_tokens"]
    }
    types = value(reader, "tokenizer.ggml.token_type")
    assert types[0] == types[1] == 3, "control"
    assert set(types[2:270]) == {1}
    assert set(types[270:]) == {5}, "unused"
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in told["model"]["merges"]]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 1
    assert not value(reader, "tokenizer.ggml.add_bos_token")


def test_scores_of_a_byte_fallback_tokenizer_are_the_places_of_merges(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(3)), "\u2581", "a", "b", "ab", "\u2581ab"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("\u2581", "ab")], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(source)
    assert export(source, tmp_path / "out").tokenizer == "BPE with scores (llama)"
    reader, _, _ = read(tmp_path / "out")
    assert value(reader, "tokenizer.ggml.model") == "llama"
    scores = value(reader, "tokenizer.ggml.scores")
    assert (scores[9], scores[10], scores[7]) == (0, -1, -2), "the first merge goes first"
    assert value(reader, "tokenizer.ggml.token_type")[:7] == [2, 3, 3, 6, 6, 6, 1]
    assert value(reader, "tokenizer.ggml.add_space_prefix")


def test_tokenizers_that_llama_cpp_does_not_run_are_told(tmp_path: Path) -> None:
    source = rounded(tmp_path / "rounded", "qwen3_moe", 4)
    assert export(source, tmp_path / "words").tokenizer == (
        "none: llama.cpp runs no tokenizer of type WordLevel; give token ids"
    )
    inner = Tokenizer(models.BPE({"a": 0}, []))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(source)
    assert "split in a way that llama.cpp does not know" in export(source, tmp_path / "split").tokenizer


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_routers_with_groups_shared_experts_and_latent_attention(family: str, tmp_path: Path) -> None:
    changes = {"topk_method": "greedy"} if family == "deepseek_v2" else {}
    source = plain(tmp_path / "source", family, **changes)
    stock = disk(source)
    export(source, tmp_path / "out")
    reader, numbers, _ = read(tmp_path / "out")
    assert sum(n.size for n in numbers.values()) == sum(t.numel() for t in stock.values()), "every number once"
    name = {"glm4_moe": "glm4moe"}.get(family, "deepseek2")
    assert value(reader, "general.architecture") == name
    sigmoid = family != "deepseek_v2"
    told = {"leading_dense_block_count": 1, "expert_shared_count": 1, "expert_gating_func": 2 if sigmoid else 1,
            "expert_weights_norm": sigmoid, "expert_count": EXPERTS}  # fmt: skip
    for key, wanted in told.items():
        assert value(reader, f"{name}.{key}") == wanted, key
    assert value(reader, f"{name}.expert_weights_scale") == (1.5 if family == "glm4_moe" else 2.5)
    groups = reader.get_field(f"{name}.expert_group_count")
    assert (None if groups is None else groups.contents()) == {"deepseek_v3": 4, "glm4_moe": 2}.get(family)
    block = "model.layers.1.mlp"
    shared = stock[f"{block}.shared_experts.down_proj.weight"]
    assert np.array_equal(numbers["blk.1.ffn_down_shexp.weight"], shared.numpy())
    assert np.array_equal(numbers["blk.0.ffn_up.weight"], stock["model.layers.0.mlp.up_proj.weight"].numpy())
    if sigmoid:
        bias = stock[f"{block}.gate.e_score_correction_bias"]
        assert np.array_equal(numbers["blk.1.exp_probs_b.bias"], bias.numpy())
    if family == "glm4_moe":
        assert value(reader, f"{name}.rope.dimension_count") == 4, "half of a head of 8"
        return
    # Four heads of 8 rows of keys and 8 of values each, of a latent that is 8 wide; two of a token's numbers turn.
    spread = stock["model.layers.2.self_attn.kv_b_proj.weight"].reshape(4, 16, 8)
    assert np.array_equal(numbers["blk.2.attn_k_b.weight"], spread[:, :8].transpose(1, 2).numpy())
    assert np.array_equal(numbers["blk.2.attn_v_b.weight"], spread[:, 8:].numpy())
    sizes = {"attention.key_length": 8 + 4, "attention.value_length": 8, "attention.key_length_mla": 8 + 4,
             "attention.value_length_mla": 8, "attention.kv_lora_rank": 8, "attention.q_lora_rank": 16,
             "attention.head_count": 4, "attention.head_count_kv": 1, "rope.dimension_count": 4}  # fmt: skip
    for key, wanted in sizes.items():
        assert value(reader, f"{name}.{key}") == wanted, key


def test_ernie(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "ernie4_5_moe")
    stock = disk(source)
    export(source, tmp_path / "out")
    reader, numbers, _ = read(tmp_path / "out")
    assert value(reader, "general.architecture") == "ernie4_5-moe"
    assert sum(n.size for n in numbers.values()) == sum(t.numel() for t in stock.values()), "every number once"
    told = {"expert_count": EXPERTS, "expert_used_count": TOP_K, "leading_dense_block_count": 1,
            "expert_shared_count": 2, "expert_shared_feed_forward_length": 2 * WIDTH,
            "interleave_moe_layer_step": 1, "expert_feed_forward_length": WIDTH}  # fmt: skip
    for key, wanted in told.items():
        assert value(reader, f"ernie4_5-moe.{key}") == wanted, key
    bias = stock["model.layers.2.mlp.moe_statics.e_score_correction_bias"]
    assert np.array_equal(numbers["blk.2.exp_probs_b.bias"].reshape(-1), bias.numpy().reshape(-1))
    shared = stock["model.layers.2.mlp.shared_experts.gate_proj.weight"]
    assert np.array_equal(numbers["blk.2.ffn_gate_shexp.weight"], shared.numpy())


def test_yarn_of_deepseek(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    source = plain(tmp_path / "source", "deepseek_v3", rope_parameters=yarn | {"mscale": 0.5, "mscale_all_dim": 0.5})
    export(source, tmp_path / "out", tensor_type="q8_0")
    reader, _, kinds = read(tmp_path / "out")
    assert value(reader, "deepseek2.rope.scaling.type") == "yarn"
    assert value(reader, "deepseek2.rope.scaling.factor") == 4
    assert value(reader, "deepseek2.rope.scaling.original_context_length") == 32
    assert value(reader, "deepseek2.rope.scaling.yarn_log_multiplier") == pytest.approx(0.05)
    assert kinds["blk.0.attn_k_b.weight"] == "F16", "rows of 8 do not come in blocks"
