"""Massive activations against numbers worked by hand, and against loops over a model's layers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.diagnose.super_experts.magnitudes import (
    is_massive,
    massive_tokens,
    median_magnitude,
    shared_peak,
    stream_gain,
    stream_magnitude,
    stream_peak,
    stream_ratio_peak,
)
from moekit.errors import UnsupportedModel
from moekit.trace import TokenBatch, record
from moekit.trace.streamed import record_streamed
from tests.checkpoints import plain
from tests.families import FAMILIES, HIDDEN, build, tokens

NAMES = ("stream_peak", "stream_gain", "stream_magnitude", "stream_ratio_peak", "massive_tokens")
# Three tokens of four channels; lower medians 1, 2 and 0.25.
STREAM = torch.tensor([[1.0, -0.5, 3.0, 1.5], [2.0, -2000.5, 1.0, 4.0], [0.25, 0.125, -0.25, 300.0]])


def seen(stream: torch.Tensor = STREAM, **parts: torch.Tensor) -> TokenBatch:
    count = len(stream)
    index = torch.zeros(count, 1, dtype=torch.int64)
    return TokenBatch(2, index, position=torch.arange(count) + 5, stream=stream, **parts)


def test_peaks_by_hand() -> None:
    assert stream_peak(seen()).tolist() == [2000.5, 1, 6]
    assert shared_peak(seen(shared=STREAM.flip(0))).tolist() == [2000.5, 1, 6]
    assert stream_ratio_peak(seen()).tolist() == [1200, 3, 7]  # 300 / 0.25, more than 2000.5 / 2


def test_massive_needs_both_size_and_ratio() -> None:
    # 2000.5 and 300 exceed 100 and 1,000 medians; 0.5 is 1,250 medians of its token and still small.
    assert int(massive_tokens(seen())) == 2
    small = torch.tensor([[4e-4, 4e-4, 0.5, 4e-4], [90.0, 1.0, 1.0, 1.0], [150.0, 1.0, 1.0, 1.0]])
    assert int(massive_tokens(seen(small))) == 0
    assert is_massive(torch.tensor([101.0, -101.0, 100.0]), 0.1).tolist() == [True, True, False]
    assert not bool(is_massive(torch.tensor(101.0), 0.2))


def test_a_gain_is_what_the_block_adds_to_a_magnitude() -> None:
    before = STREAM.clone()
    before[1] = torch.tensor([2.0, -1990.0, 1.0, -30.0])  # the largest value gains 10.5, another shrinks by 26
    before[2, 3] = -200.0  # and this one gains 100, its sign turned
    assert stream_gain(seen(residual=before)).tolist() == [100, 3, 7]


def test_the_histogram_knows_the_median_to_a_bin() -> None:
    values = torch.randn(301, 7, generator=torch.Generator().manual_seed(0)).exp() * 3
    counts = stream_magnitude(seen(values))
    assert int(counts.sum()) == values.numel()
    assert abs(math.log2(median_magnitude(counts) / float(values.median()))) <= 1 / 32 + 1e-6
    assert median_magnitude(torch.zeros(512, dtype=torch.int64)) == 0.0


def test_zeros_infinities_and_nan_are_counted_at_the_ends() -> None:
    odd = torch.tensor([[0.0, float("inf"), float("nan"), 1e-30, -float("inf"), 1e30]])
    counts = stream_magnitude(seen(odd))
    assert (int(counts[0]), int(counts[-1])) == (3, 3)


def reference(family: str, ids: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """What goes into and comes out of each decoder layer's block, by hooks of its own."""
    model = build(family)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for layer in find_moe_layers(model):
        held = found[layer.index] = {}

        def block(m: nn.Module, a: object, out: object, held: dict[str, torch.Tensor] = held) -> None:
            held["block"] = (out[0] if isinstance(out, tuple) else out).detach().reshape(-1, HIDDEN)  # type: ignore

        def whole(m: nn.Module, a: object, out: object, held: dict[str, torch.Tensor] = held) -> None:
            held["stream"] = (out[0] if isinstance(out, tuple) else out).detach().reshape(-1, HIDDEN)  # type: ignore

        layer.block.register_forward_hook(block)
        decoder = model.model.layers[layer.index]
        decoder.register_forward_hook(whole)
        held["scale"] = torch.tensor(getattr(decoder, "residual_multiplier", 1.0))
        if layer.shared:
            layer.shared[0].register_forward_hook(
                lambda m, a, out, held=held: held.__setitem__("shared", out.detach().reshape(-1, HIDDEN))
            )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("once", [False, True])
def test_recorded_by_every_family(family: str, once: bool) -> None:
    ids = tokens(2, 9, seed=3)
    expected = reference(family, ids)
    has_shared = "shared" in next(iter(expected.values()))
    names = (*NAMES, "shared_peak") if has_shared else NAMES
    statistics = record(build(family), [ids], statistics=names, once=once).statistics
    assert statistics is not None
    for layer, held in expected.items():
        stats = statistics[layer]
        stream = held["stream"]
        before = stream - held["scale"] * held["block"]
        for name, values in (("stream_peak", stream.abs()), ("stream_gain", stream.abs() - before.abs())):
            value, channel, position = stats[name].tolist()
            assert value == pytest.approx(float(values.max()), rel=1e-4, abs=1e-4), name
            token = int(values.max(1).values.argmax())
            assert (channel, position) == (int(values[token].argmax()), token % 9), name
        assert int(stats["stream_magnitude"].sum()) == 18 * HIDDEN
        ratio = (stream.abs().max(1).values / stream.abs().median(1).values).max()
        assert float(stats["stream_ratio_peak"][0]) == pytest.approx(float(ratio), rel=1e-4)
        assert int(stats["massive_tokens"]) == 0
        if has_shared:
            assert float(stats["shared_peak"][0]) == pytest.approx(float(held["shared"].abs().max()), rel=1e-5)


def test_halves_merge_to_the_whole_and_padding_is_not_seen() -> None:
    ids = tokens(4, 9, seed=3)
    names = (*NAMES, "output_peak")
    whole = record(build("qwen3_moe"), [ids], statistics=names, keep_choices=False).statistics
    halves = [record(build("qwen3_moe"), [part], statistics=names).statistics for part in ids.chunk(2)]
    padded = {
        "input_ids": torch.cat([ids, torch.full((4, 3), 99)], dim=1),
        "attention_mask": torch.cat([torch.ones(4, 9), torch.zeros(4, 3)], dim=1).long(),
    }
    beside = record(build("qwen3_moe"), [padded], statistics=names).statistics
    assert whole is not None
    assert beside is not None
    assert halves[0] is not None
    assert halves[1] is not None
    for merged in (halves[0].merge(halves[1]), halves[1].merge(halves[0]), beside):
        for layer, stats in whole.items():
            for name in names:
                torch.testing.assert_close(merged[layer][name], stats[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_layer_without_shared_experts_has_no_peak_of_them() -> None:
    with pytest.raises(UnsupportedModel, match="shared"):
        record(build("mixtral"), [tokens()], statistics=("shared_peak",))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_streamed_from_disk_the_same(tmp_path: Path, family: str) -> None:
    names = (*NAMES, "output_peak")
    live = record(build(family), [tokens()], statistics=names).statistics
    streamed = record_streamed(
        Checkpoint.open(plain(tmp_path / "model", family)), [tokens()], statistics=names
    ).statistics
    assert live is not None
    assert streamed is not None
    for layer, stats in live.items():
        for name in names:
            torch.testing.assert_close(streamed[layer][name], stats[name], rtol=1e-5, atol=1e-5, msg=name)
