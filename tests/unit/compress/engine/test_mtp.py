"""Multi-token-prediction layers cut to as many experts as the decoder keeps: bytes, and what decides who stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moekit.checking import check
from moekit.checkpoint import Checkpoint, Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.mtp import highest, mtp_blocks, refuse_gap
from moekit.compress.engine.mtp_routing import mtp_scores
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadCheckpoint, BadConfig, UnsupportedModel
from moekit.trace.streamed import Streamed
from tests.checkpoints import edit_json
from tests.families import EXPERTS, HIDDEN, build
from tests.odd_folders import tensors_of, with_mtp, with_mtp_stack

KEEP = (1, 4, 6)


def behind(folder: Path, *, fused: bool = False) -> Path:
    """GLM-4.5: a layer behind the last one."""
    with_mtp(folder, fused=fused)
    tensors = tensors_of(folder)
    generator = torch.Generator().manual_seed(4)
    tensors["model.layers.2.enorm.weight"] = torch.randn(HIDDEN, generator=generator)
    tensors["model.layers.2.hnorm.weight"] = torch.randn(HIDDEN, generator=generator)
    tensors["model.layers.2.eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN, generator=generator) * 0.2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def everywhere(source: Path, keep: tuple[int, ...]) -> tuple[Checkpoint, dict[int, LayerOutcome]]:
    checkpoint = Checkpoint.open(source)
    return checkpoint, {layer: LayerOutcome(keep=keep) for layer in geometries_of(checkpoint)}


def cut(source: Path, target: Path, keep: tuple[int, ...], **mtp: tuple[int, ...]) -> Record:
    checkpoint, outcomes = everywhere(source, keep)
    kept = {name.replace("_", "."): experts for name, experts in mtp.items()}
    return apply(checkpoint, outcomes, target, record=Record(command="a test"), mtp="prune", mtp_kept=kept)


def by_hand(tensors: dict[str, torch.Tensor], prefix: str, keep: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """One layer with these experts alone: split names are counted anew, whatever has 8 rows of experts is cut."""
    made = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".experts.")
        number, _, tail = rest.partition(".")
        if not name.startswith(prefix):
            continue
        if number.isdigit() and not head.endswith("shared"):
            if int(number) in keep:
                made[f"{head}.experts.{keep.index(int(number))}.{tail}"] = tensor
        elif ".mlp.experts." in name or name.endswith(("mlp.gate.weight", "mlp.gate.e_score_correction_bias")):
            made[name] = tensor[list(keep)]
        else:
            made[name] = tensor
    return made


@pytest.mark.parametrize("kind", ["behind", "behind, fused", "beside"])
def test_the_block_is_cut_row_by_row_and_all_else_is_as_without_it(kind: str, tmp_path: Path) -> None:
    source = with_mtp_stack(tmp_path / "m") if kind == "beside" else behind(tmp_path / "m", fused="fused" in kind)
    prefix = "mtp.layers.0." if kind == "beside" else "model.layers.2."
    other = (0, 2, 7)
    record = cut(source, tmp_path / "out", KEEP, **{prefix.replace(".", "_"): other})
    checkpoint, outcomes = everywhere(source, KEEP)
    apply(checkpoint, outcomes, tmp_path / "bare", record=Record(command="a test"), mtp="drop")
    made, bare, before = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "bare"), tensors_of(source)
    extra = {name for name in before if name.startswith(prefix) or name.startswith("mtp.")}
    wanted = by_hand(before, prefix, other) | {n: before[n] for n in extra if not n.startswith(prefix)} | bare
    assert made.keys() == wanted.keys()
    assert all(made[name].dtype == wanted[name].dtype and torch.equal(made[name], wanted[name]) for name in wanted)
    assert record.scores["kept_mtp"] == {prefix: list(other)}
    report = check(tmp_path / "out")
    assert report.ok, report.findings
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    changed = {key for key in old | new if old.get(key) != new.get(key)}
    count = "num_experts" if kind == "beside" else "n_routed_experts"
    assert changed - {"n_group", "topk_group"} == {count}
    assert new[count] == len(KEEP)
    (block,) = mtp_blocks(Checkpoint.open(tmp_path / "out"))
    assert (block.prefix, block.experts) == (prefix, 3)


@pytest.mark.parametrize("kind", ["behind", "beside"])
def test_scores_are_gate_weights_of_a_slow_forward(kind: str, tmp_path: Path) -> None:
    source = with_mtp_stack(tmp_path / "m") if kind == "beside" else behind(tmp_path / "m")
    if kind == "behind":  # all in one type, as the slow forward has it
        tensors = {n: t.float() for n, t in tensors_of(source).items()}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    tensors = tensors_of(source)
    ids = torch.randint(4, 128, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 7:] = 0
    batches = [{"input_ids": ids[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]
    got: dict[str, tuple[float, ...]] = {}
    with Streamed(Checkpoint.open(source), batches, statistics=("load",)) as streamed:
        streamed.run(then=lambda last: got.update(mtp_scores(streamed, last)))
    (prefix, scores), *rest = got.items()
    assert not rest
    assert prefix == ("mtp.layers.0." if kind == "beside" else "model.layers.2.")

    longer, slow = longer_model(source, prefix), torch.zeros(EXPERTS, dtype=torch.float64)
    decoder = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    names = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc")
    if kind == "behind":
        names = ("model.layers.2.enorm", "model.layers.2.hnorm", "model.layers.2.eh_proj")
    first, second, projection = (tensors[f"{name}.weight"] for name in names)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = 1 + weight if kind == "beside" else weight  # Qwen3-Next stores weights less one
        return x / (x.square().mean(-1, keepdim=True) + decoder.config.rms_norm_eps).sqrt() * scale

    with torch.no_grad():
        for row, length in zip(ids, (12, 12, 7), strict=True):
            row = row[None, :length]
            state = decoder.model(input_ids=row).last_hidden_state[:, :-1]
            ahead = decoder.get_input_embeddings()(row[:, 1:])
            given = torch.cat([norm(ahead, first), norm(state, second)], -1) @ projection.T
            slow += gates(longer, given)[0]
    assert slow.sum() > 0
    assert torch.tensor(scores, dtype=torch.float64) == pytest.approx(slow, rel=1e-4, abs=1e-6)
    assert highest(scores, 3) == tuple(sorted(slow.argsort(descending=True)[:3].tolist()))


def test_a_second_layer_stands_on_the_first_and_looks_two_tokens_ahead(tmp_path: Path) -> None:
    source = behind(tmp_path / "m")
    tensors = {n: t.float() for n, t in tensors_of(source).items()}
    tensors |= {n.replace(".layers.2.", ".layers.3."): t * 0.8 for n, t in tensors.items() if ".layers.2." in n}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(source / "config.json", lambda config: config.update(num_nextn_predict_layers=2))
    ids = torch.randint(4, 128, (1, 12), generator=torch.Generator().manual_seed(1))
    got: dict[str, tuple[float, ...]] = {}
    with Streamed(Checkpoint.open(source), [{"input_ids": ids}], statistics=("load",)) as streamed:
        streamed.run(then=lambda last: got.update(mtp_scores(streamed, last)))
    longer = longer_model(source, "model.layers.2.", layers=4)
    decoder = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        state = decoder.model(input_ids=ids).last_hidden_state
        for layer in (2, 3):
            ahead = decoder.get_input_embeddings()(ids[:, layer - 1 :])
            parts = []
            for given, name in ((ahead, "enorm"), (state[:, :-1], "hnorm")):
                scale = (given.square().mean(-1, keepdim=True) + decoder.config.rms_norm_eps).rsqrt()
                parts.append(given * scale * tensors[f"model.layers.{layer}.{name}.weight"])
            mixed = torch.cat(parts, -1) @ tensors[f"model.layers.{layer}.eh_proj.weight"].T
            slow, state = gates(longer, mixed, layer)
            told = torch.tensor(got[f"model.layers.{layer}."], dtype=torch.float64)
            assert told == pytest.approx(slow, rel=1e-4, abs=1e-6)


def longer_model(source: Path, prefix: str, layers: int = 3) -> Any:
    """A stock model that has the layer as its third, with everything else of the source."""
    config = transformers.AutoConfig.from_pretrained(source)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    if getattr(config, "mlp_layer_types", None) is not None:
        config.mlp_layer_types = [*config.mlp_layer_types, *["sparse"] * (layers - 2)]
    tensors = {name.replace(prefix, "model.layers.2."): t for name, t in tensors_of(source).items()}
    kind = build("glm4_moe", num_hidden_layers=layers) if prefix != "mtp.layers.0." else None
    model: Any = kind if kind is not None else AutoModelForCausalLM.from_config(config)
    folder = source.parent / "longer"
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def gates(model: Any, given: torch.Tensor, index: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's experts are given as weights when it gets these states, and what it gives."""
    total, made = torch.zeros(EXPERTS, dtype=torch.float64), []

    def see(_: Any, args: Any, kwargs: Any) -> None:
        _, indices, weights = [*args, *kwargs.values()][:3]
        for experts, own in zip(indices, weights, strict=True):
            for expert, weight in zip(experts.tolist(), own.tolist(), strict=True):
                total[expert] += weight

    layers = model.model.layers
    handles = [
        layers[index].mlp.experts.register_forward_pre_hook(see, with_kwargs=True),
        layers[index].register_forward_hook(lambda _m, _a, answer: made.append(answer)),
    ]
    others = [layer for number, layer in enumerate(layers) if number != index]
    for layer in others:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    model.model(inputs_embeds=given, use_cache=False)
    for layer in others:
        del layer.forward
    for handle in handles:
        handle.remove()
    return total, made[0] if isinstance(made[0], torch.Tensor) else made[0][0]


def test_what_no_head_could_follow_is_refused(tmp_path: Path) -> None:
    source = behind(tmp_path / "m")
    with pytest.raises(BadConfig, match=r"0 of the 8 experts of model\.layers\.2\.\* are named.* announce 3") as caught:
        cut(source, tmp_path / "out", KEEP)
    assert caught.value.layer == 2
    with pytest.raises(BadConfig, match="2 of the 8 experts"):
        cut(source, tmp_path / "out", KEEP, model_layers_2_=(0, 1))
    checkpoint = Checkpoint.open(with_two(tmp_path / "two"))
    outcomes = {1: LayerOutcome(keep=(0, 1)), 2: LayerOutcome(keep=(0, 1, 2))}
    with pytest.raises(BadConfig, match="different numbers of experts"):
        apply(checkpoint, outcomes, tmp_path / "out", record=Record(command="a test"), mtp="prune")
    assert not (tmp_path / "out").exists()


def with_two(folder: Path) -> Path:
    """Two MoE layers in the decoder, and one behind them."""
    build("glm4_moe").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {n.replace(".layers.2.", ".layers.3."): t.clone() for n, t in tensors.items() if ".layers.2." in n}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=1))
    return folder


def test_a_layer_that_mixes_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    source = with_two(tmp_path / "m")
    with (
        Streamed(Checkpoint.open(source), [{"input_ids": torch.arange(4, 14)[None]}], statistics=("load",)) as streamed,
        pytest.raises(UnsupportedModel, match=r"nothing known says how model\.layers\.3\.\* mixes"),
    ):
        streamed.run(then=lambda last: mtp_scores(streamed, last))


def test_of_each_group_equally_many_stay() -> None:
    scores = (5.0, 4.0, 3.0, 2.0, 0.0, 1.0, 1.0, 0.0)
    assert highest(scores, 4) == (0, 1, 2, 3)
    assert highest(scores, 4, groups=2) == (0, 1, 5, 6)
    assert highest(scores, 4, groups=4) == (0, 2, 5, 6)


def test_the_first_missing_expert_is_named(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    refuse_gap({0, 1, 2}, checkpoint, 5)
    with pytest.raises(BadCheckpoint, match="of this expert are missing, those of later ones are there") as told:
        refuse_gap({0, 1, 3, 4}, checkpoint, 5)
    assert (told.value.layer, told.value.expert) == (5, 2)
