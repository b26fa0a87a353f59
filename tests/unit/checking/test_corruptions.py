"""The twelve corruptions that converters, merges and broken downloads leave behind, each caught and named.

Every one is done to a checkpoint that moekit wrote (record present) and, where structure, numbers or a parent can tell
without a record, to a plain one too.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.checking import check
from moekit.checkpoint.model import save
from moekit.checkpoint.parts import PartEntry
from moekit.checkpoint.record import TENSORS_FILE, Record
from tests.checkpoints import edit_json, edit_shard, plain, saved
from tests.families import EXPERTS, build

LAYER = 1
SPLIT = f"model.layers.{LAYER}.mlp.experts"


def names(expert, parts=("gate", "up", "down")):
    return [f"{SPLIT}.{expert}.{part}_proj.weight" for part in parts]


def only(report, code):
    """The single error of a report, whose code must be this one."""
    errors = [f for f in report.findings if f.severity == "error"]
    assert {f.code for f in errors} == {code}, [str(f) for f in errors]
    return errors


def warned(report, code):
    found = [f for f in report.findings if f.code == code]
    assert found, [str(f) for f in report.findings]
    return found


@pytest.fixture
def folder(tmp_path):
    """Qwen2-MoE, split on disk, written by moekit."""
    return saved(tmp_path / "model")


@pytest.fixture
def shard(folder):
    return folder / "model.safetensors"


@pytest.fixture
def stacked(tmp_path):
    """GPT-OSS, experts stacked and gate and up alternating on disk, written by moekit."""
    return saved(tmp_path / "stacked", "gpt_oss")


def forget(folder):
    """Take the record away."""
    (folder / "moekit.json").unlink()
    return folder


def swap(tensors, left, right):
    for a, b in zip(left, right, strict=True):
        tensors[a], tensors[b] = tensors[b], tensors[a]


def test_sound_checkpoints_have_nothing_to_report(folder, stacked):
    for sound in (folder, stacked):
        report = check(sound)
        assert report.ok
        assert report.findings == []
        assert "every tensor is byte for byte the recorded one" in report.proven
        assert report.tensors > 0
        assert report.nbytes > 0
        report.raise_if_bad()


# 1. An expert dropped.


def test_expert_dropped(folder, shard):
    edit_shard(shard, lambda tensors: [tensors.pop(name) for name in names(5)])
    for path in (folder, forget(folder)):
        found = [f for f in check(path).findings if f.code == "missing-expert"]
        assert [(f.layer, f.expert) for f in found] == [(LAYER, 5)]


def test_expert_dropped_and_another_written_in_its_place(folder, shard):
    def copy(tensors):
        for source, target in zip(names(2), names(5), strict=True):
            tensors[target] = tensors[source].clone()

    edit_shard(shard, copy)
    error = only(check(folder), "expert-replaced")[0]
    assert (error.layer, error.expert) == (LAYER, 5)
    assert "expert 2" in error.message
    assert warned(check(forget(folder)), "equal-experts")[0].layer == LAYER


def test_expert_dropped_from_a_stack(stacked):
    edit_shard(
        stacked / "model.safetensors",
        lambda t: t.update({n: t[n][:-1] for n in list(t) if f"layers.{LAYER}.mlp.experts" in n}),
    )
    report = check(forget(stacked))
    assert {f.code for f in report.findings if f.severity == "error"} == {"shape"}
    assert {f.layer for f in report.findings if f.severity == "error"} == {LAYER}


# 2. Two experts swapped in one layer only.


def test_experts_swapped_in_one_layer(folder, shard):
    edit_shard(shard, lambda tensors: swap(tensors, names(2), names(6)))
    (error,) = only(check(folder), "experts-swapped")
    assert (error.layer, error.expert) == (LAYER, 2)
    assert "2 and 6" in error.message


def test_experts_swapped_in_a_stack(stacked):
    order = torch.tensor([0, 1, 6, 3, 4, 5, 2, 7])
    edit_shard(
        stacked / "model.safetensors",
        lambda t: t.update({n: t[n][order] for n in list(t) if f"layers.{LAYER}.mlp.experts" in n}),
    )
    (error,) = only(check(stacked), "experts-swapped")
    assert (error.layer, error.expert) == (LAYER, 2)
    assert "2 and 6" in error.message


@pytest.mark.parametrize("tuned", [False, True], ids=["exact", "fine-tuned"])
def test_experts_swapped_without_a_record_show_against_the_parent(tmp_path, tuned):
    parent, child = plain(tmp_path / "parent"), plain(tmp_path / "child")

    def change(tensors):
        swap(tensors, names(2), names(6))
        if tuned:
            for name in tensors:
                tensors[name] += 0.2 * tensors[name].std() * torch.randn_like(tensors[name])

    edit_shard(child / "model.safetensors", change)
    assert check(child).ok  # alone, nothing can tell
    (error,) = only(check(child, parent=parent), "experts-swapped")
    assert (error.layer, error.expert) == (LAYER, 2)


def test_experts_reordered_with_their_router_rows_are_lawful(tmp_path):
    parent, child = plain(tmp_path / "parent"), plain(tmp_path / "child")

    def change(tensors):
        swap(tensors, names(2), names(6))
        router = f"model.layers.{LAYER}.mlp.gate.weight"
        tensors[router] = tensors[router][[0, 1, 6, 3, 4, 5, 2, 7]]

    edit_shard(child / "model.safetensors", change)
    report = check(child, parent=parent)
    assert report.ok
    assert [(f.code, f.layer) for f in report.findings] == [("permuted", LAYER)]


def test_router_rows_reordered_without_their_experts(tmp_path):
    parent, child = plain(tmp_path / "parent"), plain(tmp_path / "child")
    router = f"model.layers.{LAYER}.mlp.gate.weight"
    edit_shard(child / "model.safetensors", lambda t: t.update({router: t[router][[0, 1, 6, 3, 4, 5, 2, 7]]}))
    (error,) = only(check(child, parent=parent), "router-rows-moved")
    assert error.layer == LAYER


# 3. Gate and up halves swapped.


def test_gate_and_up_swapped(folder, shard):
    edit_shard(shard, lambda tensors: swap(tensors, names(3, ["gate"]), names(3, ["up"])))
    errors = only(check(folder), "gate-up-swapped")
    assert {(f.layer, f.expert) for f in errors} == {(LAYER, 3)}


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_gate_and_up_halves_of_a_stack_swapped(tmp_path, family):
    folder = saved(tmp_path / "model", family)
    name = next(n for n in load_file(folder / "model.safetensors") if f"layers.{LAYER}." in n and _is_gate_up(n))

    def change(tensors):
        one = tensors[name][4]
        if family == "gpt_oss":  # [H, 2I], gate and up alternate
            tensors[name][4] = one.view(one.shape[0], -1, 2).flip(-1).reshape(one.shape)
        else:  # [2I, H], gate first
            tensors[name][4] = torch.cat([one[24:], one[:24]])

    edit_shard(folder / "model.safetensors", change)
    (error,) = only(check(folder), "gate-up-swapped")
    assert (error.layer, error.expert) == (LAYER, 4)


def _is_gate_up(name):
    return name.endswith(("gate_up_proj", "input_linear.weight"))


def test_gate_and_up_swapped_shows_against_the_parent(tmp_path):
    parent, child = plain(tmp_path / "parent"), plain(tmp_path / "child")
    edit_shard(child / "model.safetensors", lambda t: swap(t, names(3, ["gate"]), names(3, ["up"])))
    errors = only(check(child, parent=parent), "gate-up-swapped")
    assert {(f.layer, f.expert) for f in errors} == {(LAYER, 3)}


@pytest.mark.parametrize("whole_layer", [False, True], ids=["one-expert", "whole-layer"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_gate_and_up_swapped_shows_in_their_sizes(tmp_path, fused, whole_layer):
    """In trained models gate and up differ in size; so they do here."""
    model = build("qwen2_moe", num_hidden_layers=6)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.experts.gate_up_proj
            weight[:, :24] *= 1.4
            for expert in range(EXPERTS) if whole_layer and layer is model.model.layers[LAYER] else ():
                weight[expert] = weight[expert].roll(24, dims=0)
        if not whole_layer:
            one = model.model.layers[LAYER].mlp.experts.gate_up_proj
            one[3] = one[3].roll(24, dims=0)
    model.save_pretrained(tmp_path / "model", save_original_format=not fused)
    report = check(tmp_path / "model")
    found = warned(report, "gate-up-suspect")
    assert [(f.layer, f.expert) for f in found] == [(LAYER, None if whole_layer else 3)]


@pytest.mark.parametrize("whole_layer", [False, True], ids=["one-expert", "whole-layer"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_gate_and_up_swapped_shows_in_the_dimensions_they_favour(tmp_path, fused, whole_layer):
    """Sizes are equal, but gates favour other hidden dimensions than ups, as in trained models."""
    model = build("qwen2_moe", num_hidden_layers=8, hidden_size=64)
    generator = torch.Generator().manual_seed(5)
    gate_H, up_H = (torch.exp(0.7 * torch.randn(64, generator=generator)) for _ in range(2))
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            weight = layer.mlp.experts.gate_up_proj
            weight[:, :24] *= gate_H / gate_H.square().mean().sqrt()
            weight[:, 24:] *= up_H / up_H.square().mean().sqrt()
            for expert in (range(EXPERTS) if whole_layer else [3]) if number == 3 else ():
                weight[expert] = weight[expert].roll(24, dims=0)
    model.save_pretrained(tmp_path / "model", save_original_format=not fused)
    report = check(tmp_path / "model")
    assert [(f.code, f.layer, f.expert) for f in report.findings] == [
        ("gate-up-suspect", 3, None if whole_layer else 3)
    ]


# 4. Down transposed.


def test_down_transposed(folder, shard):
    (name,) = names(3, ["down"])
    edit_shard(shard, lambda t: t.update({name: t[name].T.contiguous()}))
    for path in (folder, forget(folder)):
        error = only(check(path), "transposed")[0]
        assert (error.layer, error.expert) == (LAYER, 3)


SQUARE = {"moe_intermediate_size": 32}


def test_square_down_transposed(tmp_path):
    folder = saved(tmp_path / "model", **SQUARE)
    (name,) = names(3, ["down"])
    edit_shard(folder / "model.safetensors", lambda t: t.update({name: t[name].T.contiguous()}))
    (error,) = only(check(folder), "transposed")
    assert (error.layer, error.expert) == (LAYER, 3)
    parent = plain(tmp_path / "parent", **SQUARE)
    (error,) = only(check(forget(folder), parent=parent), "transposed")
    assert (error.layer, error.expert) == (LAYER, 3)


def test_down_of_a_stack_transposed(tmp_path):
    folder = saved(tmp_path / "model", "granitemoe", intermediate_size=32)
    name = f"model.layers.{LAYER}.block_sparse_moe.output_linear.weight"
    edit_shard(folder / "model.safetensors", lambda t: t[name][5].copy_(t[name][5].T.clone()))
    (error,) = only(check(folder), "transposed")
    assert (error.layer, error.expert) == (LAYER, 5)


def trained_like(**overrides):
    """A model whose hidden dimensions differ in size, alike for all experts, as in trained ones."""
    model = build("qwen2_moe", num_hidden_layers=4, hidden_size=64, **overrides)
    profile_H = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.mul_(profile_H)
            layer.mlp.experts.down_proj.mul_(profile_H[:, None])
    return model


def test_square_down_transposed_shows_in_its_profile(tmp_path):
    """Neither record nor parent; hidden 64, width 63 and 65 are told by shape, so pad by profile alone is needed."""
    model = trained_like(moe_intermediate_size=63)
    model.save_pretrained(tmp_path / "model")
    assert check(tmp_path / "model").findings == []
    other = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(6)))
    (name,) = names(3, ["down"])
    edit_shard(tmp_path / "model" / "model.safetensors", lambda t: t[name].copy_(torch.randn(64, 63) * other[:, None]))
    (found,) = warned(check(tmp_path / "model"), "stranger")
    assert (found.layer, found.expert) == (LAYER, 3)


# 5. A router row zeroed.


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "ernie4_5_moe"])
def test_router_row_zeroed(tmp_path, family):
    folder = saved(tmp_path / "model", family)
    ending = ("mlp.gate.weight", "router.weight", "router.layer.weight")
    name = next(n for n in load_file(folder / "model.safetensors") if f"layers.{LAYER}." in n and n.endswith(ending))
    edit_shard(folder / "model.safetensors", lambda t: t[name][6].zero_())
    errors = [f for f in check(folder).findings if f.severity == "error"]
    assert {f.code for f in errors} == {"router-row-zero", "changed"}
    error = next(f for f in errors if f.code == "router-row-zero")
    assert (error.layer, error.expert) == (LAYER, 6)
    (error,) = only(check(forget(folder)), "router-row-zero")
    assert (error.layer, error.expert) == (LAYER, 6)


# 6. NaN in a scale.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_norms_scale(folder, shard, value):
    name = f"model.layers.{LAYER}.post_attention_layernorm.weight"
    edit_shard(shard, lambda t: t[name][3].fill_(value))
    for path in (folder, forget(folder)):
        found = [f for f in check(path).findings if f.code == "non-finite"]
        assert [f.layer for f in found] == [LAYER]


def quantize(folder, scale):
    """Make an fp8 checkpoint; expert 5's down projection gets this scale."""
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))

    def change(tensors):
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            bad = name == names(5, ["down"])[0]
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), scale if bad else 0.5)

    edit_shard(folder / "model.safetensors", change)
    return folder


@pytest.mark.parametrize(
    ("scale", "code"),
    [(float("nan"), "non-finite"), (0.0, "bad-scale"), (-1.0, "bad-scale"), (float("inf"), "non-finite")],
)
def test_nan_in_the_scale_of_a_quantized_expert(tmp_path, scale, code):
    (error,) = only(check(quantize(plain(tmp_path / "model"), scale)), code)
    assert (error.layer, error.expert) == (LAYER, 5)
    assert "scale" in error.message


def test_sound_quantized_checkpoints_pass(tmp_path):
    assert check(quantize(plain(tmp_path / "model"), 0.25)).ok


def test_nan_in_an_expert_of_a_stack(stacked):
    name = f"model.layers.{LAYER}.mlp.experts.down_proj"
    edit_shard(stacked / "model.safetensors", lambda t: t[name][7, 0, 0].fill_(float("nan")))
    (error,) = only(check(forget(stacked)), "non-finite")
    assert (error.layer, error.expert) == (LAYER, 7)


# 7. A dead expert.


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_expert_of_zeros(folder, shard, part):
    edit_shard(shard, lambda t: [t[name].zero_() for name in names(4, [part])])
    assert "dead-expert" in check(folder).codes()
    (error,) = only(check(forget(folder)), "dead-expert")
    assert (error.layer, error.expert) == (LAYER, 4)
    assert part in error.message


def test_expert_that_can_never_be_chosen(tmp_path):
    folder = saved(tmp_path / "model", "deepseek_v3", n_group=1, topk_group=1)
    name = f"model.layers.{LAYER}.mlp.gate.e_score_correction_bias"
    edit_shard(folder / "model.safetensors", lambda t: t[name][3].fill_(-100.0))
    assert "unroutable-expert" in check(folder).codes()
    (error,) = only(check(forget(folder)), "unroutable-expert")
    assert (error.layer, error.expert) == (LAYER, 3)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "gpt_oss"])
def test_expert_that_no_probe_reaches(tmp_path, family):
    folder = plain(tmp_path / "model", family)
    bias = next(
        n
        for n in load_file(folder / "model.safetensors")
        if f"layers.{LAYER}." in n and n.endswith(("e_score_correction_bias", "router.bias"))
    )
    edit_shard(folder / "model.safetensors", lambda t: t[bias][3].fill_(-100.0))
    found = warned(check(folder), "never-routed")
    # DeepSeek-V3 scores a group by its two best: here the bias shuts out the whole group of experts 2 and 3.
    expected = {2, 3} if family == "deepseek_v3" else {3}
    assert {(f.layer, f.expert) for f in found} == {(LAYER, expert) for expert in expected}


def test_fresh_conversions_are_only_warned_about(tmp_path):
    """Residual conversions start with silent experts in every layer, and fresh models with zero routers."""
    model = build("qwen2_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.gate.weight.zero_()
    save(model, tmp_path / "model", record=Record(command="convert"))
    report = check(tmp_path / "model")
    assert report.ok
    assert report.codes() == {"silent-layer", "untrained-router"}


# 8. The config's expert count off by one.


@pytest.mark.parametrize("by", [-1, 1])
def test_expert_count_off_by_one(folder, stacked, by):
    keys = ("num_experts", "num_local_experts")
    for path in (folder, stacked):
        edit_json(path / "config.json", lambda c: c.update({k: EXPERTS + by for k in keys if k in c}))
        for view in (path, forget(path)):
            found = [f for f in check(view).findings if f.code == "expert-count"]
            assert len(found) == 1
            assert f"hold {EXPERTS} experts" in found[0].message


# 9. A shard of another model.


def test_shard_of_another_model(tmp_path):
    folder = saved(tmp_path / "model", max_shard_bytes=60_000)
    other = saved(tmp_path / "other", seed=1, max_shard_bytes=60_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1].name
    shutil.copy(other / shard, folder / shard)
    (error,) = only(check(folder), "foreign-shard")
    assert error.file.endswith(shard)
    parent = plain(tmp_path / "parent")
    report = check(forget(folder), parent=parent)
    assert {f.code for f in report.findings if f.severity == "error"} == {"unrelated"}


def test_shard_of_a_model_of_another_size(tmp_path):
    folder = saved(tmp_path / "model", max_shard_bytes=60_000)
    other = saved(tmp_path / "other", max_shard_bytes=60_000, moe_intermediate_size=16)
    shards = (sorted(path.glob("model-*.safetensors"))[1] for path in (other, folder))
    shutil.copy(*shards)
    assert not check(folder).ok
    assert not check(forget(folder)).ok


def test_layer_of_another_model_shows_in_its_profile(tmp_path):
    """Neither record nor parent: experts of one layer favour other hidden dimensions than all others."""
    model = trained_like(moe_intermediate_size=24)
    other = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(6)))
    with torch.no_grad():
        experts = model.model.layers[LAYER].mlp.experts
        experts.down_proj.copy_(torch.randn(experts.down_proj.shape) * other[:, None])
    model.save_pretrained(tmp_path / "model")
    (found,) = warned(check(tmp_path / "model"), "stranger")
    assert (found.layer, found.expert) == (LAYER, None)


# 10. Wrong dtype.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_one_tensor_of_another_dtype(folder, shard, dtype):
    (name,) = names(2, ["up"])
    edit_shard(shard, lambda t: t.update({name: (t[name] * 10).to(dtype)}))
    for path in (folder, forget(folder)):
        errors = only(check(path), "dtype")
        assert {(f.layer, f.expert) for f in errors} == {(LAYER, 2)}


def test_a_norm_of_another_dtype(folder, shard):
    name = f"model.layers.{LAYER}.input_layernorm.weight"
    edit_shard(shard, lambda t: t.update({name: t[name].half()}))
    assert {f.layer for f in only(check(forget(folder)), "dtype")} == {LAYER}


def test_all_tensors_of_another_dtype_show_in_the_record(folder, shard):
    edit_shard(shard, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    report = check(folder)
    assert not report.ok


# 11. The partner list of another layer.


@pytest.fixture
def routed(tmp_path):
    """A checkpoint with a policy's partner lists for both layers."""
    generator = torch.Generator().manual_seed(0)
    lists = {
        f"constants.0.{layer}.partners": torch.stack([torch.randperm(8, generator=generator) for _ in range(8)]).short()
        for layer in (0, 1)
    }
    record = Record(command="route", parts=[PartEntry(kind="routing", name="c2r", config={"top_t": 3}, layers=[0, 1])])
    save(build("qwen2_moe"), tmp_path / "routed", record=record, extra_tensors=lists)
    return tmp_path / "routed"


def edit_extra(folder, change):
    tensors = load_file(folder / TENSORS_FILE)
    change(tensors)
    save_file(tensors, folder / TENSORS_FILE)


def test_sound_policies_pass(routed):
    assert check(routed).findings == []


def test_partner_list_of_another_layer(routed):
    def change(tensors):
        tensors["constants.0.1.partners"] = tensors["constants.0.0.partners"].clone()

    edit_extra(routed, change)
    (error,) = only(check(routed), "policy-of-another-layer")
    assert error.layer == 1
    assert "layer 0" in error.message


def test_partner_lists_of_two_layers_swapped(routed):
    edit_extra(routed, lambda t: swap(t, ["constants.0.0.partners"], ["constants.0.1.partners"]))
    assert {f.layer for f in only(check(routed), "policy-of-another-layer")} == {0, 1}


@pytest.mark.full
@pytest.mark.slow
def test_other_damage_to_the_policy(routed, tmp_path):
    changes = {
        "policy-tensor-changed": lambda t: t["constants.0.1.partners"][0, 0].add_(1),
        "policy-tensor-missing": lambda t: t.pop("constants.0.1.partners"),
        "policy-tensor-surplus": lambda t: t.update({"constants.0.7.partners": torch.zeros(8, 8)}),
    }
    for code, change in changes.items():
        twin = shutil.copytree(routed, tmp_path / code)
        edit_extra(twin, change)
        assert code in check(twin).codes()
    (routed / TENSORS_FILE).unlink()
    only(check(routed), "policy-missing")


def test_policy_of_another_model(routed):
    edit_json(routed / "moekit.json", lambda record: record["parts"][0].update(layers=[0, 1, 7]))
    assert {f.layer for f in only(check(routed), "policy-layer")} == {7}


# 12. A stale index.


@pytest.fixture
def sharded(tmp_path):
    return saved(tmp_path / "model", max_shard_bytes=60_000)


def test_index_that_names_other_tensors(sharded):
    def change(index):
        index["weight_map"]["model.layers.9.gone.weight"] = next(iter(index["weight_map"].values()))

    edit_json(sharded / "model.safetensors.index.json", change)
    for path in (sharded, forget(sharded)):
        (error,) = only(check(path), "stale-index")
        assert "layers.9.gone" in error.message


def test_index_that_names_other_shards(sharded):
    def change(index):
        shards = sorted(set(index["weight_map"].values()))
        name = min(n for n, shard in index["weight_map"].items() if shard == shards[0])
        index["weight_map"][name] = shards[1]

    edit_json(sharded / "model.safetensors.index.json", change)
    assert "another shard" in only(check(sharded), "stale-index")[0].message


def test_index_left_over_from_an_older_save(folder):
    stale = {"metadata": {}, "weight_map": {"old.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    only(check(folder), "stale-index")


def test_shards_left_over_from_an_older_save(sharded):
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    shutil.copy(first, sharded / "model-00009-of-00009.safetensors")
    report = check(sharded)
    assert report.ok
    assert report.codes() == {"stray-shard"}


def test_index_with_a_wrong_total(sharded):
    edit_json(sharded / "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=1))
    report = check(sharded)
    assert report.ok
    assert report.codes() == {"index-total"}
