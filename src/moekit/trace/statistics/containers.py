"""Streaming statistics: one small tensor per name and layer, whatever the number of tokens.

Legend: N tokens, K choices a token, E experts, H hidden, I expert width, D domains, B bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moekit.errors import BadData
from moekit.trace.batch import ExpertBatch, TokenBatch, widest
from moekit.trace.vocabulary import BINS, Rule, Statistic, get

# Tokens handled at a time where a whole trace is counted: bounds memory and keeps fp32 counts exact.
CHUNK_TOKENS = 16_384


def load(indices_NK: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert.

    Args:
        indices_NK: chosen experts, any integer type; E means none.
        experts: E.

    Returns:
        [E] int64.
    """
    return torch.bincount(indices_NK.flatten().long(), minlength=experts + 1)[:experts]


def coactivation(indices_NK: Tensor, experts: int) -> Tensor:
    """How many tokens chose both of two experts (arXiv:2504.01337, section 3.2).

    Over N tokens of K distinct choices the upper triangle sums to N K (K-1) / 2, and each row without its diagonal to
    (K-1) times its expert's load.

    Args:
        indices_NK: chosen experts, any integer type; E means none.
        experts: E.

    Returns:
        [E, E] int64, symmetric; the diagonal is the load.
    """
    total_EE = torch.zeros(experts, experts, dtype=torch.int64, device=indices_NK.device)
    measure = get("coactivation").measure
    for chunk_NK in torch.split(indices_NK, CHUNK_TOKENS):
        if len(chunk_NK):
            total_EE += measure(TokenBatch(experts, chunk_NK.long()))
    return total_EE


def combine(rule: Rule, first: Tensor, second: Tensor) -> Tensor:
    """Combine the tensors of two sets of tokens; the first wins a tie between peaks."""
    match rule:
        case "sum":
            return first + second
        case "max":
            return torch.maximum(first, second)
        case "peak":
            return torch.where(second[..., :1] > first[..., :1], second, first)


class LayerStatistics(Mapping[str, Tensor]):
    """Statistics of one MoE layer, by name.

    Args:
        experts: E.
        hidden: H.
        domains: names of the domains; axis D of statistics by domain follows them.
        tokens: N, tokens seen.
        values: name -> tensor.
        width: I; 0 where no statistic counts neurons.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        domains: Sequence[str] = (),
        tokens: int = 0,
        values: Mapping[str, Tensor] | None = None,
        *,
        width: int = 0,
    ) -> None:
        self.width = width
        self.experts = experts
        self.hidden = hidden
        self.domains = tuple(domains)
        self.tokens = tokens
        self._values = dict(values or {})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            get(name)  # an unknown name is another error than one that was not recorded
            raise KeyError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @classmethod
    def empty(
        cls,
        statistics: Iterable[Statistic],
        experts: int,
        hidden: int,
        domains: Sequence[str] = (),
        *,
        width: int = 0,
        device: str = "cpu",
    ) -> LayerStatistics:
        """Statistics of no tokens."""
        made = cls(experts, hidden, domains, width=width)
        for entry in statistics:
            made._values[entry.name] = made._zero(entry, torch.device(device))
        return made

    def shape(self, entry: Statistic) -> tuple[int, ...]:
        """Sizes of a statistic's axes at this layer."""
        sizes = {
            "E": self.experts,
            "H": self.hidden,
            "I": self.width,
            "D": len(self.domains),
            "B": BINS,
            "V": 3,
        }
        return tuple(sizes[letter] for letter in entry.shape)

    def _zero(self, entry: Statistic, device: torch.device) -> Tensor:
        dtype = torch.int64 if entry.integer else widest(device)
        zero = torch.zeros(self.shape(entry), dtype=dtype, device=device)
        if entry.rule == "peak":
            zero[..., 1:] = -1
        return zero

    def with_domains(self, domains: tuple[str, ...]) -> LayerStatistics:
        """The same statistics with axis D following another list of names, of which the own ones are a part."""
        if domains == self.domains:
            return self
        target = [domains.index(name) for name in self.domains]
        wider = LayerStatistics(self.experts, self.hidden, domains, self.tokens, width=self.width)
        for name, value in self._values.items():
            entry = get(name)
            if "D" in entry.shape:
                assert entry.shape.index("D") == 0
                moved = wider._zero(entry, value.device)
                moved[target] = value
                value = moved
            wider._values[name] = value
        return wider

    def measure(self, seen: TokenBatch, statistics: Iterable[Statistic]) -> dict[str, Tensor]:
        """Measure some tokens without adding them."""
        # Autocast would round counts and sums to 8 bits.
        with torch.no_grad(), torch.autocast(seen.indices_NK.device.type, enabled=False):
            return {entry.name: self._measured(entry, seen) for entry in statistics} if seen.tokens else {}

    def _measured(self, entry: Statistic, seen: TokenBatch) -> Tensor:
        if entry.of_expert is None:
            return entry.measure(seen)
        rows = self._zero(entry, seen.indices_NK.device)
        for batch in seen.expert_batches():
            rows[batch.expert] = entry.of_expert(batch).to(rows.dtype)
        return rows

    def add(self, measured: Mapping[str, Tensor]) -> None:
        """Add what `measure` returned."""
        for name, value in measured.items():
            self._values[name] = combine(get(name).rule, self._values[name], value.to(self._values[name].dtype))

    def add_expert_batch(self, seen: ExpertBatch, statistics: Iterable[Statistic]) -> None:
        """Add what some tokens of one expert show to statistics that are measured expert by expert."""
        with torch.no_grad():
            for entry in statistics:
                assert entry.of_expert is not None
                rows = self._values[entry.name]
                measured = entry.of_expert(seen).to(rows.dtype)
                rows[seen.expert] = combine(entry.rule, rows[seen.expert], measured)

    def keep(self, found: Mapping[str, Tensor]) -> None:
        """Keep what a method found beside the statistics, under names that are none of theirs; it is not added up."""
        self._values |= found

    def kept(self, name: str) -> Tensor | None:
        """What `keep` was given under a name; None where it was given nothing."""
        return self._values.get(name)

    def update(self, seen: TokenBatch) -> None:
        """Measure some tokens and add them."""
        self.add(self.measure(seen, [get(name) for name in self._values]))
        self.tokens += seen.tokens

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """Statistics of both sets of tokens; associative, and for sums and maxima commutative.

        Raises:
            BadData: another geometry, or other statistics.
        """
        if (self.experts, self.hidden, set(self)) != (other.experts, other.hidden, set(other)):
            raise BadData(
                f"statistics of {self.experts} experts ({', '.join(sorted(self))}) and of {other.experts} "
                f"({', '.join(sorted(other))}) do not add up",
                hint="merge traces of one model with the same statistics",
            )
        domains = tuple(dict.fromkeys((*self.domains, *other.domains)))
        left, right = self.with_domains(domains), other.with_domains(domains)
        tokens = self.tokens + other.tokens
        merged = LayerStatistics(self.experts, self.hidden, domains, tokens, width=max(self.width, other.width))
        for name, value in left._values.items():
            merged._values[name] = combine(get(name).rule, value, right._values[name])
        return merged

    def to_cpu(self) -> LayerStatistics:
        """The same statistics in main memory."""
        values = {name: value.cpu() for name, value in self._values.items()}
        return LayerStatistics(self.experts, self.hidden, self.domains, self.tokens, values, width=self.width)

    @property
    def load_E(self) -> Tensor:
        """Load of each expert, [E] int64, from whatever counts it.

        Raises:
            BadData: nothing recorded counts choices.
        """
        if "load" in self._values:
            return self._values["load"]
        if "coactivation" in self._values:
            return self._values["coactivation"].diagonal().clone()
        if "domain_load" in self._values:
            return self._values["domain_load"].sum(0)
        raise BadData(
            "the load was not recorded", hint="record it with --statistics load (in Python statistics=('load',))"
        )

    @property
    def never_routed(self) -> list[int]:
        """Experts that no token chose; empty where nothing recorded counts choices."""
        if not {"load", "coactivation", "domain_load"} & set(self._values):
            return []
        return [int(e) for e in (self.load_E == 0).nonzero().flatten()]


class Statistics(Mapping[int, LayerStatistics]):
    """Statistics of all MoE layers: decoder layer -> name -> tensor."""

    def __init__(self, layers: Mapping[int, LayerStatistics]) -> None:
        self._layers = dict(sorted(layers.items()))

    def __getitem__(self, layer: int) -> LayerStatistics:
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names recorded at every layer."""
        return tuple(next(iter(self._layers.values()))) if self._layers else ()

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before trusting the figures: experts never routed, layers without tokens."""
        found = []
        for layer, stats in self._layers.items():
            if not stats.tokens:
                found.append(f"layer {layer}: no tokens")
            elif dead := stats.never_routed:
                which = f"{len(dead)} of {stats.experts} experts never routed in {stats.tokens} tokens"
                found.append(f"layer {layer}: {which}: {', '.join(map(str, dead))}")
        return found

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of tokens.

        Raises:
            BadData: other layers, another geometry, or other statistics.
        """
        if list(self) != list(other):
            raise BadData(f"statistics of layers {list(self)} and of layers {list(other)} do not add up")
        return Statistics({layer: stats.merge(other[layer]) for layer, stats in self.items()})
