"""Laws of traces and statistics, on random choices."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moekit.trace import Trace, domain_divergence, domain_information
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics, coactivation, load
from moekit.trace.tokens import TokenLabels
from moekit.trace.vocabulary import known_statistics
from tests.unit.trace.samples import random_trace, same_layer, same_statistics, same_trace

# Statistics of tokens and experts; what else they may look at is tried on real models, in tests/laws.
SHOWN = {"choices", "weights", "logits", "inputs", "inner", "outputs", "residual", "shared", "stream"}
KNOWN = {name: entry for name, entry in known_statistics().items() if set(entry.sources) <= SHOWN}
EVERY = tuple(KNOWN)
seeds = st.integers(0, 2**31)
quick = settings(deadline=None, max_examples=40)


def observation(seed: int, tokens: int, experts: int, top_k: int, hidden: int = 3, domains: int = 2) -> TokenBatch:
    """Random everything, in fp64 where the recorder would have the model's dtype; some choices are none."""
    g = torch.Generator().manual_seed(seed)
    chosen_NK = torch.rand(tokens, experts, generator=g).topk(top_k).indices
    chosen_NK[torch.rand(tokens, top_k, generator=g) < 0.1] = experts

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    outputs_NKH = real(tokens, top_k, hidden).masked_fill((chosen_NK == experts).unsqueeze(-1), 0.0)
    return TokenBatch(
        experts,
        chosen_NK,
        domains=domains,
        domain=torch.randint(0, domains, (tokens,), generator=g),
        position=torch.arange(tokens),
        weights=torch.rand(tokens, top_k, generator=g),
        logits=real(tokens, experts),
        hidden=real(tokens, hidden),
        inner=outputs_NKH[..., :2],
        outputs=outputs_NKH,
        shared=real(tokens, hidden),
        stream=real(tokens, hidden),
        residual=real(tokens, hidden),
        routed=real(tokens, hidden),
    )


def part(seen: TokenBatch, rows: slice) -> TokenBatch:
    """Some tokens of an observation."""
    names = (
        "domain",
        "position",
        "weights",
        "logits",
        "hidden",
        "inner",
        "outputs",
        "shared",
        "stream",
        "residual",
        "routed",
    )
    cut = {name: getattr(seen, name)[rows] for name in names}
    return TokenBatch(seen.experts, seen.indices_NK[rows], domains=seen.domains, **cut)


def collect(*parts: TokenBatch) -> LayerStatistics:
    """Statistics of some observations, one after the other."""
    stats = LayerStatistics.empty(KNOWN.values(), parts[0].experts, 3, ("a", "b"), width=2)
    for seen in parts:
        stats.update(seen)
    return stats


def close(first: LayerStatistics, second: LayerStatistics) -> None:
    """Counts and extremes exactly, sums (fp32 products inside) to rounding."""
    assert first.tokens == second.tokens
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if not value.is_floating_point():
            assert torch.equal(second[name], value)


sizes = st.tuples(st.integers(0, 25), st.integers(2, 9)).flatmap(
    lambda ne: st.tuples(st.just(ne[0]), st.just(ne[1]), st.integers(1, ne[1]))
)


@quick
@given(seed=seeds, size=sizes)
def test_identities_of_counts(seed: int, size: tuple[int, int, int]) -> None:
    tokens, experts, top_k = size
    chosen_NK = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(top_k).indices
    counts_EE, load_E = coactivation(chosen_NK, experts), load(chosen_NK, experts)
    assert torch.equal(counts_EE, counts_EE.T)
    assert torch.equal(counts_EE.diagonal(), load_E)
    assert int(load_E.sum()) == tokens * top_k
    assert int(counts_EE.triu(1).sum()) == tokens * top_k * (top_k - 1) // 2
    assert torch.equal(counts_EE.sum(1) - load_E, (top_k - 1) * load_E)


@quick
@given(seed=seeds, size=sizes)
def test_identities_of_sums(seed: int, size: tuple[int, int, int]) -> None:
    tokens, experts, top_k = size
    seen = observation(seed, tokens, experts, top_k)
    stats = collect(seen)
    real = int((seen.indices_NK < experts).sum())
    assert int(stats["load"].sum()) == real
    assert torch.equal(stats["domain_load"].sum(0), stats["load"])
    assert abs(float(stats["soft_frequency"].sum()) - tokens) < 1e-3
    torch.testing.assert_close(stats["domain_gate_mass"].sum(0), stats["gate_mass"])
    assert bool((stats["first_load"] <= stats["load"]).all())
    # Cauchy-Schwarz, and a maximum is no less than a root mean square over channels.
    assert bool((stats["output_norm"] ** 2 <= stats["load"] * stats["output_square"] + 1e-4).all())
    assert bool((3 * stats["load"] * stats["output_peak"][:, 0] ** 2 + 1e-4 >= stats["output_square"]).all())
    torch.testing.assert_close(stats["logit_gram"].diagonal(), stats["logit_square"], rtol=1e-4, atol=1e-4)
    for name, value in stats.items():
        assert bool(value.isfinite().all()), name


@quick
@given(seed=seeds, size=sizes, cut=st.floats(0, 1))
def test_streaming_equals_the_whole(seed: int, size: tuple[int, int, int], cut: float) -> None:
    seen = observation(seed, *size)
    middle = int(cut * size[0])
    close(collect(part(seen, slice(0, middle)), part(seen, slice(middle, None))), collect(seen))


@quick
@given(seed=seeds, size=sizes, first=st.floats(0, 1), second=st.floats(0, 1))
def test_merging_statistics_is_associative_and_equals_the_whole(
    seed: int, size: tuple[int, int, int], first: float, second: float
) -> None:
    seen = observation(seed, *size)
    i, j = sorted((int(first * size[0]), int(second * size[0])))
    a, b, c = (collect(part(seen, rows)) for rows in (slice(0, i), slice(i, j), slice(j, None)))
    same_layer(a.merge(b).merge(c), a.merge(b.merge(c)))
    close(a.merge(b).merge(c), collect(seen))


@quick
@given(seed=seeds, size=sizes)
def test_relabelling_experts_relabels_statistics(seed: int, size: tuple[int, int, int]) -> None:
    tokens, experts, top_k = size
    seen = observation(seed, tokens, experts, top_k)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))  # order[new] = old
    place = torch.cat([order.argsort(), torch.tensor([experts])])
    moved = part(seen, slice(None))
    moved = TokenBatch(
        experts,
        place[seen.indices_NK],
        domains=seen.domains,
        logits=seen.logits[:, order],  # type: ignore[index]
        **{
            n: getattr(moved, n)
            for n in (
                "domain",
                "position",
                "weights",
                "hidden",
                "inner",
                "outputs",
                "shared",
                "stream",
                "residual",
                "routed",
            )
        },
    )
    before, after = collect(seen), collect(moved)
    for name, entry in KNOWN.items():
        value = before[name]
        for axis, letter in enumerate(entry.shape):
            if letter == "E":
                value = value.index_select(axis, order)
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


lengths = st.lists(st.integers(1, 6), max_size=5)
names = st.permutations(["a", "b", "c"]).flatmap(lambda p: st.integers(1, 3).map(lambda n: tuple(p[:n])))


@quick
@given(parts=st.lists(st.tuples(seeds, lengths, names), min_size=3, max_size=3))
def test_merging_traces_is_associative(parts: list[tuple[int, list[int], tuple[str, ...]]]) -> None:
    a, b, c = (random_trace(seed % 1000, lengths=n, domains=d) for seed, n, d in parts)
    left = Trace.merge([Trace.merge([a, b]), c])
    right = Trace.merge([a, Trace.merge([b, c])])
    same_trace(left, right)
    same_trace(left, Trace.merge([a, b, c]))
    same_statistics(left.statistics, left.require(left.meta.statistics))
    assert left.meta.tokens == sum(sum(n) for _, n, _ in parts)


@pytest.mark.full
@pytest.mark.slow
@quick
@given(seed=seeds, n=lengths, d=names, weights=st.booleans(), experts=st.sampled_from([5, 255, 256]))
def test_a_trace_survives_the_disk(seed: int, n: list[int], d: tuple[str, ...], weights: bool, experts: int) -> None:
    trace = random_trace(seed % 1000, lengths=n, domains=d, weights=weights, experts=experts)
    with tempfile.TemporaryDirectory() as folder:
        trace.save(Path(folder) / "trace")
        back = Trace.load(Path(folder) / "trace")
    same_trace(trace, back)
    assert back.digest == trace.digest


@quick
@given(seed=seeds, tokens=st.integers(0, 30), spread=st.integers(1, 4))
def test_any_labels_survive_as_runs(seed: int, tokens: int, spread: int) -> None:
    g = torch.Generator().manual_seed(seed)
    labels = TokenLabels(
        **{
            name: torch.randint(0, spread, (tokens,), generator=g).to(dtype)
            for name, dtype in TokenLabels.DTYPES.items()
        }
    )
    back = TokenLabels.decode(labels.encode(), tokens)
    for name in TokenLabels.DTYPES:
        assert torch.equal(getattr(back, name), getattr(labels, name))


@quick
@given(seed=seeds, domains=st.integers(1, 5), experts=st.integers(1, 6))
def test_information_and_divergence_stay_in_their_ranges(seed: int, domains: int, experts: int) -> None:
    counts_DE = torch.randint(0, 20, (domains, experts), generator=torch.Generator().manual_seed(seed)) + 1
    information, normalised = domain_information(counts_DE)
    assert 0 <= float(normalised) <= 1 + 1e-12
    assert -1e-12 <= float(information) <= min(domains, experts) ** 0.5 * 10
    divergence_DD = domain_divergence(counts_DE)
    assert bool(((divergence_DD >= 0) & (divergence_DD <= 1)).all())
    assert torch.equal(divergence_DD, divergence_DD.T)
    # Domains routed alike share no information with the experts, however often each occurs.
    alike_DE = counts_DE[:1] * torch.arange(1, domains + 1)[:, None]
    assert abs(float(domain_information(alike_DE)[0])) < 1e-9
