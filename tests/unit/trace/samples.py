"""Small traces, and an independent record of what a model's experts are called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from moekit.anatomy import find_moe_layers
from moekit.trace import Trace, TraceMeta
from moekit.trace.meta import DataEntry, index_dtype
from moekit.trace.statistics import LayerStatistics, Statistics
from moekit.trace.tokens import TokenLabels
from moekit.trace.vocabulary import resolve


def labels_of(lengths: Sequence[int], domains: Sequence[int], first: int = 0) -> TokenLabels:
    """One sequence a document, of these lengths and domains."""
    repeat = torch.tensor(lengths, dtype=torch.int64)
    sequence_N = torch.arange(len(lengths)).repeat_interleave(repeat).to(torch.int32)
    position_N = torch.cat([torch.zeros(0), *(torch.arange(n) for n in lengths)]).to(torch.int32)
    return TokenLabels(
        sequence_N=sequence_N,
        document_N=sequence_N + first,
        domain_N=torch.tensor(domains, dtype=torch.int16).repeat_interleave(repeat),
        position_N=position_N,
        phase_N=torch.zeros(len(sequence_N), dtype=torch.uint8),
    )


def random_trace(
    seed: int = 0,
    *,
    experts: int = 6,
    top_k: int = 2,
    layers: Sequence[int] = (1, 3),
    lengths: Sequence[int] = (4, 1, 7),
    domains: Sequence[str] = ("a", "b"),
    weights: bool = True,
    statistics: Sequence[str] = ("basic", "gate_mass"),
    fingerprint: str = "model-a",
    keep: bool = True,
) -> Trace:
    """A trace of random choices; document i is of domain i modulo their number."""
    g = torch.Generator().manual_seed(seed)
    labels = labels_of(lengths, [i % len(domains) for i in range(len(lengths))])
    tokens = len(labels)
    indices, gates = {}, {}
    for layer in layers:
        scores, chosen = torch.rand(tokens, experts, generator=g).topk(top_k)
        indices[layer], gates[layer] = chosen.to(index_dtype(experts)), scores.half()
    data = []
    for number, name in enumerate(domains):
        here = [n for i, n in enumerate(lengths) if i % len(domains) == number]
        if here:
            data.append(DataEntry(source="made", domain=name, documents=len(here), tokens=sum(here)))
    names = [entry.name for entry in resolve(statistics)]
    meta = TraceMeta(
        model="tiny",
        fingerprint=fingerprint,
        data=data,
        seed=seed,
        layers=list(layers),
        experts=[experts] * len(layers),
        top_k=[top_k] * len(layers),
        hidden=5,
        tokens=tokens,
        has_choices=True,
        has_weights=weights,
        domains=list(domains),
        statistics=names,
    )
    full = Trace(meta.model_copy(update={"has_weights": True, "statistics": []}), labels, indices, gates)
    found: Statistics | None = full.require(names) if names else None
    warned = {"warnings": found.warnings} if found is not None else {}
    if not keep:
        return Trace(meta.model_copy(update={"has_choices": False, "has_weights": False, **warned}), statistics=found)
    return Trace(meta.model_copy(update=warned), labels, indices, gates if weights else {}, found)


def same_statistics(first: Statistics | None, second: Statistics | None) -> None:
    """Assert equal statistics: counts exactly, sums to fp64 rounding."""
    assert first is not None
    assert second is not None
    assert list(first) == list(second)
    for layer in first:
        same_layer(first[layer], second[layer])


def same_layer(first: LayerStatistics, second: LayerStatistics) -> None:
    """Assert equal statistics of one layer."""
    assert (first.tokens, first.domains, set(first)) == (second.tokens, second.domains, set(second))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def same_trace(first: Trace, second: Trace) -> None:
    """Assert that two traces hold the same, whatever their models are called."""
    assert first.meta.model_copy(update={"model": ""}) == second.meta.model_copy(update={"model": ""})
    for name, value in first.tensors().items():
        torch.testing.assert_close(second.tensors()[name], value, rtol=1e-9, atol=1e-12)


class Spy:
    """Sees the calls of experts by replacing each module's `forward`, one sequence at a time: no hooks, no padding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.calls: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        for layer in find_moe_layers(model):
            self.calls[layer.index] = []
            layer.experts.forward = self._wrap(layer.index, layer.experts.forward)

    def _wrap(self, index: int, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapped(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            self.calls[index].append((hidden.detach().clone(), chosen.clone(), weights.detach().clone()))
            return forward(hidden, chosen, weights)

        return wrapped

    def restore(self) -> None:
        for layer in find_moe_layers(self.model):
            del layer.experts.forward

    @torch.no_grad()
    def run(self, sequences: Sequence[torch.Tensor]) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(hidden, indices, weights) by layer, of all tokens of the sequences one after the other."""
        for ids in sequences:
            self.model(input_ids=ids[None], use_cache=False)
        self.restore()
        return {n: tuple(torch.cat(part) for part in zip(*calls, strict=True)) for n, calls in self.calls.items()}
