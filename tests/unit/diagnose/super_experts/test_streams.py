"""The residual stream of all layers, seen in a streamed pass, against hooks on the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.skeleton import empty_model
from moekit.diagnose.super_experts.finding import NEEDS
from moekit.diagnose.super_experts.massive_activations import LayerStream, StreamedProfile, layer_streams
from moekit.diagnose.super_experts.report import SHARED
from moekit.errors import NumericFault
from moekit.trace import LayerStatistics
from tests.families import HIDDEN, build, tokens


def write(folder: Path, family: str, plant: Mapping[tuple[int, str], float] | None = None) -> Any:
    """A tiny model on disk; one output row of some dense or shared networks multiplied."""
    model = build(family)
    for (layer, module), factor in (plant or {}).items():
        with torch.no_grad():
            model.model.layers[layer].get_submodule(module).down_proj.weight[4] *= factor
    model.save_pretrained(folder)
    return model


def walk(folder: Path, ids: torch.Tensor, scratch: Path | None = None, **options: Any) -> StreamedProfile:
    checkpoint = Checkpoint.open(folder)
    layers = find_moe_layers(empty_model(checkpoint))
    shared = ("shared_peak",) if all(layer.shared for layer in layers) else ()
    moe = {layer.index for layer in layers}
    streamed = StreamedProfile(
        checkpoint, [ids[:1], ids[1:]], moe_layers=moe, statistics=(*NEEDS, *shared), folder=scratch, **options
    )
    with streamed:
        streamed.run()
    return streamed


def streams(streamed: StreamedProfile) -> tuple[LayerStream, ...]:
    return layer_streams({n: r.statistics for n, r in streamed.records.items()}, streamed.dense, streamed.apart)


@torch.no_grad()
def slow(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """|H| after each layer, and before its block (attention's part in it), of a whole model."""
    before: dict[int, torch.Tensor] = {}
    after: dict[int, torch.Tensor] = {}
    for n, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a, n=n: before.__setitem__(n, a[0].abs()))
        layer.register_forward_hook(
            lambda m, a, o, n=n: after.__setitem__(n, (o[0] if isinstance(o, tuple) else o).abs())
        )
    model(input_ids=ids, use_cache=False)
    return [(after[n], before[n]) for n in sorted(after)]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe", "ernie4_5_moe"])
def test_every_layer_is_seen_as_on_the_whole_model(tmp_path: Path, family: str) -> None:
    model, ids = write(tmp_path / "moe", family), tokens(3, 9)
    found = streams(walk(tmp_path / "moe", ids))
    dense = [s.layer for s in found if s.kind == "dense"]
    assert dense == ([] if family == "qwen3_moe" else [0])
    for told, (after, before) in zip(found, slow(model, ids), strict=True):
        assert told.value == pytest.approx(float(after.max()), rel=1e-5)
        place = int(after.argmax())
        assert (told.channel, told.position) == (place % HIDDEN, place // HIDDEN % 9)
        assert told.gain == pytest.approx(float((after - before).max()), rel=1e-4)
        # 512 bins tell the median to 2 %.
        assert told.median == pytest.approx(float(after.median()), rel=0.03)
        assert not told.massive
        assert told.origin == ""


def test_a_dense_network_is_named_for_what_it_makes(tmp_path: Path) -> None:
    write(tmp_path / "moe", "deepseek_v3", {(0, "mlp"): 1e6})
    first, *others = streams(walk(tmp_path / "moe", tokens(3, 9)))
    assert (first.kind, first.massive, first.origin, first.gain_channel) == ("dense", True, "dense", 4)
    assert [s.origin for s in others] == ["passed on", "passed on"]
    assert first.expert is None


def test_a_shared_expert_is_named_for_what_it_makes(tmp_path: Path) -> None:
    write(tmp_path / "moe", "deepseek_v3", {(1, "mlp.shared_experts"): 1e6})
    found = streams(walk(tmp_path / "moe", tokens(3, 9)))
    assert [(s.origin, s.expert) for s in found] == [("", None), ("shared", SHARED), ("passed on", None)]
    assert found[1].gain_channel == 4


def test_padding_is_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "moe", "deepseek_v3")
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    checkpoint = Checkpoint.open(tmp_path / "moe")
    told = []
    for batch in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, :6]}):
        one = StreamedProfile(checkpoint, [batch], moe_layers={1, 2}, statistics=(*NEEDS, "shared_peak"))
        with one:
            one.run()
        told.append(streams(one))
    for padded, bare in zip(*told, strict=True):
        assert padded.value == pytest.approx(bare.value, rel=1e-5)
        assert (padded.channel, padded.position, padded.median) == (bare.channel, bare.position, bare.median)


def test_an_interrupted_pass_goes_on_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "moe", "deepseek_v3")
    ids = tokens(3, 9)
    whole = streams(walk(tmp_path / "moe", ids))
    real = StreamedProfile._layer
    seen: list[int] = []

    def layer(self: StreamedProfile, index: int, *rest: Any) -> None:
        seen.append(index)
        if index == 2 and seen.count(2) == 1:
            raise KeyboardInterrupt
        real(self, index, *rest)

    monkeypatch.setattr(StreamedProfile, "_layer", layer)
    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path / "moe", ids, tmp_path / "scratch")
    again = walk(tmp_path / "moe", ids, tmp_path / "scratch")
    assert seen == [0, 1, 2, 2]
    assert streams(again) == whole
    # Without what was noted of a dense layer, all is done anew.
    (tmp_path / "scratch" / "dense-0.safetensors").unlink()
    assert streams(walk(tmp_path / "moe", ids, tmp_path / "scratch")) == whole
    assert seen == [0, 1, 2, 2, 0, 1, 2]


def told_of(stream: list[float], gain: list[float], experts: list[list[float]] | None = None) -> LayerStatistics:
    """Statistics by hand; the median is 2^-16 or so."""
    counts = torch.zeros(512, dtype=torch.int64)
    counts[0] = 9
    values = {"stream_peak": torch.tensor(stream), "stream_gain": torch.tensor(gain), "stream_magnitude": counts}
    if experts is not None:
        values["output_peak"] = torch.tensor(experts)
    return LayerStatistics(len(experts or [0]), 4, tokens=9, values=values)


def test_origins_by_hand() -> None:
    two = [[300.0, 2.0, 0.0], [200.0, 1.0, 0.0]]
    moe = {
        1: told_of([150.0, 3.0, 0.0], [5.0, 3.0, 0.0], two),  # the block adds none of it: attention does
        2: told_of([250.0, 1.0, 0.0], [240.0, 1.0, 0.0], two),  # the smaller one, as it is large at this channel
        3: told_of([250.0, 1.0, 0.0], [0.0, -1.0, -1.0], two),
        4: told_of([400.0, 0.0, 0.0], [400.0, 0.0, 0.0], two),  # none is largest there: they add up
    }
    dense = {0: told_of([9.0, 0.0, 0.0], [9.0, 0.0, 0.0]), 5: told_of([900.0, 0.0, 0.0], [500.0, 0.0, 0.0])}
    found = layer_streams(moe, dense)
    assert [s.origin for s in found] == ["", "attention", "routed", "passed on", "experts", "layer"]
    assert [s.expert for s in found] == [None, None, 1, None, None, None]
    assert layer_streams(moe, dense, apart=[5])[5].origin == "dense"


def test_infinite_activations_are_named() -> None:
    with pytest.raises(NumericFault) as caught:
        layer_streams({}, {7: told_of([float("inf"), 0.0, 0.0], [0.0, 0.0, 0.0])})
    assert caught.value.layer == 7
