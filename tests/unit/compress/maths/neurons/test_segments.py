"""Segments: what an expert is a sum of, their similarities against a plain comparison, and router rows by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu
from torch.utils._python_dispatch import TorchDispatchMode

from moekit.compress.maths.neurons.segments import (
    Compare,
    balanced,
    comparable,
    gather,
    moved_shares,
    nearest_targets,
    parts,
    recombination_figures,
    share_router_rows,
    write_segments,
)
from moekit.compress.weights import LayerWeights, outputs
from moekit.errors import NumericFault

COMPARE: list[Compare] = ["up_down", "all", "mean"]


def layer(
    experts: int = 5, width: int = 6, hidden: int = 8, *, gate: bool = True, bias: bool = False, seed: int = 0
) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return LayerWeights(
        up_EIH=draw(experts, width, hidden),
        down_EHI=draw(experts, hidden, width),
        gate_EIH=draw(experts, width, hidden) if gate else None,
        up_bias_EI=draw(experts, width) if bias else None,
        gate_bias_EI=draw(experts, width) if bias and gate else None,
        down_bias_EH=draw(experts, hidden) if bias else None,
        router={"weight": draw(experts, hidden), "bias": draw(experts)},
    )


def by_hand() -> LayerWeights:
    """Three experts of two segments in two channels."""
    gate = [[[1.0, 0], [0, 1.5]], [[1, 1], [1, -1]], [[2, 0], [-1, 1]]]
    up = [[[1.0, 0], [0, 1]], [[0, 2], [1, 0]], [[1, 0.5], [-1, 0]]]
    down = [[[1.0, 0], [0, 1]], [[0, 1], [1, 1]], [[1, 0], [0, -1]]]
    router = {"weight": torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]])}
    return LayerWeights(torch.tensor(up), torch.tensor(down).transpose(1, 2), torch.tensor(gate), router=router)


KINDS = [{"gate": g, "bias": b} for g in (True, False) for b in (True, False)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_expert_is_the_sum_of_its_segments(kind: dict[str, bool]) -> None:
    weights = layer(**kind)
    x_NH = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    x1_NH = torch.cat([x_NH, torch.ones(7, 1)], dim=1) if kind["bias"] else x_NH
    total_NH = torch.zeros(7, 8) if weights.down_bias_EH is None else weights.down_bias_EH[2].expand(7, 8)
    *gate, up, down = parts(weights, 2, balance=False)
    for i in range(6):
        inner_N = silu(x1_NH @ gate[0][i]) * (x1_NH @ up[i]) if gate else silu(x1_NH @ up[i])
        total_NH = total_NH + inner_N[:, None] * down[i]
    torch.testing.assert_close(total_NH, outputs(weights, 2, x_NH, silu), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_neurons_in_another_order_compute_the_same(kind: dict[str, bool]) -> None:
    weights = layer(**kind)
    x_NH = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    expected_NH = outputs(weights, 3, x_NH, silu)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = gather(weights, [(3, order[:2]), (3, order[2:])], balance=False)
    assert not torch.equal(shuffled, gather(weights, [(3, torch.arange(6))], balance=False))
    write_segments(weights, 3, shuffled)
    torch.testing.assert_close(outputs(weights, 3, x_NH, silu), expected_NH, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_was_read_is_written_back(kind: dict[str, bool]) -> None:
    weights, other = layer(**kind), layer(**kind, seed=1)
    for e in range(5):
        write_segments(other, e, gather(weights, [(e, torch.arange(6))], balance=False))
        mine, written = (
            [t for t in (w.up_EIH, w.down_EHI, w.gate_EIH, w.up_bias_EI, w.gate_bias_EI) if t is not None]
            for w in (weights, other)
        )
        assert all(torch.equal(a[e], b[e]) for a, b in zip(mine, written, strict=True))


def test_balanced_segments_compute_the_same() -> None:
    weights = layer()
    weights.up_EIH[1, 0] = 0
    weights.down_EHI[1, :, 1] = 0
    x_NH = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    expected_NH = outputs(weights, 1, x_NH, silu)
    up, down = balanced(weights.up_EIH[1], weights.down_EHI[1].T)
    torch.testing.assert_close(up[2:].norm(dim=1), down[2:].norm(dim=1))
    torch.testing.assert_close(
        up[2:].norm(dim=1) ** 2, weights.up_EIH[1, 2:].norm(dim=1) * weights.down_EHI[1].T[2:].norm(dim=1)
    )
    assert bool((up.gather(1, up.abs().argmax(1, keepdim=True)) >= 0).all())
    write_segments(weights, 1, gather(weights, [(1, torch.arange(6))], balance=True))
    torch.testing.assert_close(outputs(weights, 1, x_NH, silu), expected_NH, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [-1.0, 3.0, -0.2])
@pytest.mark.parametrize("compare", COMPARE)
def test_balance_finds_the_same_neuron_in_another_scale(compare: Compare, factor: float) -> None:
    weights = layer(2)
    weights.up_EIH[1] = weights.up_EIH[0] * factor
    weights.down_EHI[1] = weights.down_EHI[0] / factor
    assert weights.gate_EIH is not None
    weights.gate_EIH[1] = weights.gate_EIH[0]
    found = nearest_targets(weights, [1], [0], compare=compare, balance=True)
    torch.testing.assert_close(found.similarity_DI, torch.ones(1, 6))
    if factor < 0:
        assert float(nearest_targets(weights, [1], [0], compare=compare).similarity_DI.max()) < 0.95


@pytest.mark.parametrize(
    ("compare", "first", "second"), [("up_down", 0.9428090, -0.3162278), ("all", 0.9237604, None), ("mean", None, None)]
)
def test_similarities_by_hand(compare: Compare, first: float | None, second: float | None) -> None:
    found = nearest_targets(by_hand(), [2], [0, 1], compare=compare)
    if first is not None:
        assert float(found.similarity_DI[0, 0]) == pytest.approx(first, abs=5e-8)
        assert int(found.target_DI[0, 0]) == 0
    if second is not None:
        assert float(found.similarity_DI[0, 1]) == pytest.approx(second, abs=5e-8)
    if compare == "mean":
        # Segment 0 of expert 2 and of expert 0: (1, .5) and (1, 0), (1, 0) and (1, 0).
        assert float(found.similarity_DI[0, 0]) == pytest.approx((1 / 1.25**0.5 + 1) / 2, abs=1e-7)


def plain(weights: LayerWeights, source: int, targets: list[int], compare: Compare) -> tuple[Tensor, Tensor]:
    """Best target and similarity of each segment, by one loop over all pairs, in fp64."""
    best = torch.full((weights.width,), -9.0, dtype=torch.float64)
    which = torch.full((weights.width,), -1)
    for u in range(weights.width):
        for target in targets:
            for v in range(weights.width):
                left, right = (
                    [p[i].double() for p in parts(weights, e, balance=False)] for e, i in ((source, u), (target, v))
                )
                cosines = [float(cosine_similarity(a, b, dim=0)) for a, b in zip(left[-2:], right[-2:], strict=True)]
                start = 0 if compare == "all" else -2
                value = float(cosine_similarity(torch.cat(left[start:]), torch.cat(right[start:]), dim=0))
                value = sum(cosines) / 2 if compare == "mean" else value
                if value > best[u]:
                    best[u], which[u] = value, target
    return which, best


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("compare", COMPARE)
def test_chunks_find_what_a_plain_comparison_finds(compare: Compare, kind: dict[str, bool]) -> None:
    weights, sources, targets = layer(**kind), [0, 3], [1, 2, 4]
    expected = [plain(weights, e, targets, compare) for e in sources]
    for source_rows, target_rows in ((8192, 2048), (4, 5), (1, 1), (13, 6), (6, 4)):
        found = nearest_targets(
            weights, sources, targets, compare=compare, source_rows=source_rows, target_rows=target_rows
        )
        assert torch.equal(found.target_DI, torch.stack([which for which, _ in expected]))
        torch.testing.assert_close(
            found.similarity_DI.double(), torch.stack([best for _, best in expected]), atol=1e-6, rtol=0
        )


def test_a_search_in_bf16_reports_similarities_in_fp32() -> None:
    weights = layer(6, 16, 24)
    exact = nearest_targets(weights, [0, 1], [2, 3, 4, 5])
    rough = nearest_targets(weights, [0, 1], [2, 3, 4, 5], precision="bf16", source_rows=5, target_rows=7)
    assert float((exact.similarity_DI - rough.similarity_DI).min()) > -1e-6
    assert float((exact.similarity_DI - rough.similarity_DI).max()) < 0.008
    for i, source in enumerate(rough.sources):
        left_IF = comparable(weights, source, slice(None), "up_down", balance=False)
        for left_F, target, value in zip(left_IF, rough.target_DI[i].tolist(), rough.similarity_DI[i], strict=True):
            right_IF = comparable(weights, target, slice(None), "up_down", balance=False)
            assert float((right_IF @ left_F - value).abs().min()) < 1e-6


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.numbers = max([self.numbers, *[t.numel() for t in made if isinstance(t, Tensor) and not t._is_view()]])
        return result


def test_the_whole_similarity_is_never_held() -> None:
    weights = layer(12, 64, 4)
    with Largest() as seen:
        nearest_targets(weights, range(6), range(6, 12), source_rows=128, target_rows=32)
    assert seen.numbers == 128 * 32
    with Largest() as seen:
        nearest_targets(weights, range(6), range(6, 12), source_rows=40, target_rows=4096)
    assert seen.numbers == 40 * 64


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copies_go_to_the_first_of_the_targets(precision: Any) -> None:
    weights = layer(4, 32, 16).map(lambda t: t[:1].expand_as(t).clone())
    for e in range(1, 4):
        order = torch.randperm(32, generator=torch.Generator().manual_seed(e))
        write_segments(weights, e, gather(weights, [(e, order)], balance=False))
    found = nearest_targets(weights, [3], [1, 0, 2], precision=precision)
    assert found.target_DI.tolist() == [[1] * 32]
    torch.testing.assert_close(found.similarity_DI, torch.ones(1, 32))
    assert float(found.similarity_DI.max()) <= 1.0
    assert moved_shares(found, 0.99) == {3: 1.0}
    assert moved_shares(found, 1.0) == {3: 0.0}


def test_moved_and_discarded_are_all() -> None:
    found = nearest_targets(layer(), [0, 3], [1, 2, 4])
    for alpha in (-1.0, 0.0, 0.3, 0.5, 2.0):
        moved = [found.moved(e, alpha) for e in found.targets]
        counts = {s: sum(len(m[s]) for m in moved if s in m) for s in found.sources}
        assert counts == {s: int((found.similarity_DI[i] > alpha).sum()) for i, s in enumerate(found.sources)}
        assert moved_shares(found, alpha) == {s: pytest.approx(n / 6) for s, n in counts.items()}
        shares = found.shares([2, 0], alpha)
        assert shares[0].tolist() == pytest.approx([len(moved[1].get(s, [])) / 6 for s in (0, 3)])
        assert shares[1].tolist() == [0, 0]
    assert moved_shares(found, -1.0) == {0: 1.0, 3: 1.0}
    assert moved_shares(found, 2.0) == {0: 0.0, 3: 0.0}


def test_figures_by_hand() -> None:
    found = nearest_targets(by_hand(), [2], [0, 1])
    figures = recombination_figures(found, [2], 0.5)
    assert figures == {
        "moved_share": 0.5,
        "moved_share_least": 0.5,
        "moved_share_most": 0.5,
        "similarity": pytest.approx((0.9428090 - 0.3162278) / 2, abs=1e-7),
        "receiving": 1.0,
        "nothing_to_recombine": 0.0,
    }
    assert recombination_figures(found, [2], 0.95)["nothing_to_recombine"] == 1.0
    nothing = recombination_figures(nearest_targets(by_hand(), [], [0, 1]), [], 0.5)
    assert nothing["moved_share"] == nothing["similarity"] == 0.0
    # An expert that is dropped and not taken apart counts as not moved.
    assert recombination_figures(found, [2, 3], 0.5)["moved_share"] == 0.25


@pytest.mark.parametrize(
    ("mode", "row"), [("add", [1.25, 0.25]), ("mean", [1.25 / 1.5, 0.25 / 1.5]), ("none", [1.0, 0.0])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_router_rows_by_hand(mode: Any, row: list[float], dtype: torch.dtype) -> None:
    router = {"weight": by_hand().router_EH.to(dtype), "bias": torch.tensor([0.0, -0.0, 4.0]), "count": torch.arange(3)}
    share = torch.tensor([[0.5], [0.0]])
    found = share_router_rows(router, [0, 1], [2], share, mode)
    torch.testing.assert_close(found["weight"], torch.tensor([row, [0, 1]], dtype=dtype))
    bias = {"add": 2.0, "mean": 4 / 3, "none": 0.0}[mode]
    torch.testing.assert_close(found["bias"], torch.tensor([bias, 0.0]))
    assert found["bias"][1].signbit()
    assert found["count"].tolist() == [0, 1]


def test_rows_of_two_sources() -> None:
    router = {"weight": torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.bfloat16)}
    share = torch.tensor([[0.25, 0.5]], dtype=torch.float64)
    assert share_router_rows(router, [1], [0, 2], share, "add")["weight"].tolist() == [[60.25]]
    assert share_router_rows(router, [1], [0, 2], share, "mean")["weight"].item() == pytest.approx(
        60.25 / 1.75, rel=4e-3
    )
    assert share_router_rows(router, [1], [], torch.zeros(1, 0), "add")["weight"].tolist() == [[10.0]]


@pytest.mark.parametrize("part", ["up_EIH", "gate_EIH", "down_EHI"])
@pytest.mark.parametrize("expert", [1, 3])
def test_damaged_weights_name_the_expert(part: str, expert: int) -> None:
    weights = layer()
    getattr(weights, part)[expert, 1, 2] = float("inf")
    with pytest.raises(NumericFault) as caught:
        nearest_targets(weights, [0, 3], [1, 2])
    assert caught.value.expert == expert
