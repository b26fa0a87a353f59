"""The vocabulary of statistics: methods name what they need, the recorder collects exactly that.

A statistic is one tensor per MoE layer with a fixed meaning, a shape in letters, and a rule by which the tensors of two
sets of tokens combine. So memory does not grow with tokens, batches and ranks merge, and a method added later names
statistics in `needs` instead of running its own pass. What only one method reads stands in the method's own file, what
several read in `moekit.trace.statistics`. A package adds its own by the entry point that brings its method::

    @statistic(shape="E", sources=("weights",))
    def gate_cube(seen: TokenBatch) -> Tensor:
        "Sum of cubed gate weights."
        return seen.per_expert(seen.weights_NK**3)

A family of statistics takes numbers in its name, as in `power(0,1,2)`; see `statistic_family`.

Letters of shapes: E experts, H hidden, I expert width, D domains, B bins, V the three figures of a peak (value,
channel, position).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from moekit import catalogue
from moekit._names import hint_for
from moekit.errors import BadConfig
from moekit.trace.batch import ExpertBatch, TokenBatch
from moekit.trace.sources.table import source_of

# Name of what must be seen of a forward pass (`moekit.trace.sources.table`). Choices (the expert indices) always are.
Source = str
# How the tensors of two sets of tokens combine. "peak": the row with the larger first column.
Rule = Literal["sum", "max", "peak"]
Measure = Callable[[TokenBatch], Tensor]
# Of a statistic that is measured expert by expert.
MeasureExpert = Callable[[ExpertBatch], Tensor]
# Bins of a histogram over [0, 1].
BINS = 512

# Not statistics, but legal among a method's needs: the trace must keep each token's choices, and their weights.
KEPT = ("choices", "weights")

# Names for several statistics at once.
GROUPS: dict[str, tuple[str, ...]] = {
    "basic": ("load", "coactivation", "domain_load"),
    "gates": ("load", "gate_mass", "gate_square", "gate_max", "first_load", "domain_gate_mass"),
    "router": ("soft_frequency", "logit_sum", "logit_square", "logit_gram", "score_entropy"),
    "inputs": ("load", "input_sum", "input_square", "input_norm"),
    "outputs": (
        "load",
        "gate_mass",
        "output_norm",
        "output_square",
        "gated_output_norm",
        "gated_output_square",
        "output_sum",
        "output_peak",
    ),
    "inner": ("load", "inner_square"),
    "block": ("layer_cosine", "block_cosine", "block_residual_cosine", "block_output_norm"),
    "residual": ("residual_change", "residual_max", "residual_change_weighted_output_norm"),
}


@dataclass(frozen=True)
class Statistic:
    """One entry of the vocabulary.

    Attributes:
        name: what methods call it.
        shape: letters of its axes, "" for a single number.
        sources: what must be seen of a forward pass to measure it.
        rule: how two sets of tokens combine.
        integer: whether it counts (int64) or sums reals (fp64).
        doc: what it is, one sentence.
        measure: its value on some tokens.
        of_expert: its row for one expert, where it is measured expert by expert: for what is too large to be held for
            all choices at once.
    """

    name: str
    shape: str
    sources: tuple[Source, ...]
    rule: Rule
    integer: bool
    doc: str
    measure: Measure
    of_expert: MeasureExpert | None = None

    @property
    def origin(self) -> str:
        """The package it came from."""
        return self.measure.__module__.split(".")[0]

    @property
    def routed(self) -> bool:
        """Whether it is of experts, so that dense layers cannot have it."""
        return any(source_of(source).routed for source in self.sources)

    @property
    def from_choices(self) -> bool:
        """Whether kept choices (with weights, if it reads them) suffice to compute it later."""
        return set(self.sources) <= {"choices", "weights"}


def expert_statistic(
    *, shape: str, sources: Sequence[Source], rule: Rule = "sum"
) -> Callable[[MeasureExpert], MeasureExpert]:
    """Enter a function that measures one expert's tokens; its result is the expert's row of a tensor [E, ...].

    Raises:
        BadConfig: another function already has this name, or there is no such source.
    """

    def enter(of_expert: MeasureExpert) -> MeasureExpert:
        def by_token(seen: TokenBatch) -> Tensor:
            raise TypeError(f"{of_expert.__name__} is measured expert by expert")

        by_token.__name__, by_token.__doc__ = of_expert.__name__, of_expert.__doc__
        by_token.__module__ = of_expert.__module__
        statistic(shape=shape, sources=sources, rule=rule)(by_token)
        entry = _statistics[of_expert.__name__]
        _statistics[entry.name] = replace(entry, of_expert=of_expert)
        return of_expert

    return enter


_statistics: dict[str, Statistic] = {}
_families: dict[str, Callable[..., Statistic]] = {}
_MEMBER = re.compile(r"^(?P<family>\w+)\((?P<numbers>[-\d., ]*)\)$")


def statistic(
    *, shape: str, sources: Sequence[Source] = ("choices",), rule: Rule = "sum", integer: bool = False
) -> Callable[[Measure], Measure]:
    """Enter a function into the vocabulary under its own name.

    Raises:
        BadConfig: another function already has this name, or there is no such source.
    """

    def enter(measure: Measure) -> Measure:
        name = getattr(measure, "__name__", "")
        for source in sources:
            source_of(source)  # an unknown one is refused where it is named
        known = _statistics.get(name)
        if known is not None and known.measure.__module__ != measure.__module__:
            raise BadConfig(
                f"two statistics are called {name!r}: in {known.measure.__module__} and {measure.__module__}",
                hint="rename one of them, or uninstall one of the packages",
            )
        _statistics[name] = Statistic(name, shape, tuple(sources), rule, integer, _first_sentence(measure), measure)
        return measure

    return enter


def statistic_family(make: Callable[..., Statistic]) -> Callable[..., Statistic]:
    """Enter a family of statistics: `make(*numbers)` gives the member whose name holds these numbers.

    The function's name is the family's; the member's `name` must be `member_name(family, *numbers)`.
    """
    _families[make.__name__] = make
    return make


def member_name(family: str, *numbers: float) -> str:
    """Name of a family's member: `power(0,1,2)`."""
    return f"{family}({','.join(f'{number:g}' for number in numbers)})"


def _load_general() -> None:
    """Import the statistics that several methods share: the modules of `moekit.trace.statistics`."""
    package = importlib.import_module("moekit.trace.statistics")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def known_statistics() -> dict[str, Statistic]:
    """The whole vocabulary, by name, those of methods here and in other packages too; families are left out."""
    _load_general()
    catalogue.load_all()
    return dict(sorted(_statistics.items()))


def known_families() -> dict[str, str]:
    """Families of statistics by name, each with the first sentence of what its members are."""
    known_statistics()
    return {name: _first_sentence(make) for name, make in sorted(_families.items())}


def _first_sentence(function: Callable[..., object]) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")


def _member(name: str) -> Statistic | None:
    match = _MEMBER.match(name)
    make = _families.get(match["family"]) if match else None
    if match is None or make is None:
        return None
    try:
        return make(*(float(number) for number in match["numbers"].split(",") if number.strip()))
    except (TypeError, ValueError) as error:
        raise BadConfig(f"the statistic {name!r} does not exist: {error}", hint="see its family's numbers") from error


def get(name: str) -> Statistic:
    """Look one statistic up.

    Raises:
        BadConfig: no such statistic; the message names near matches.
    """
    # What is not there yet may stand in a module that nobody has imported: a general one, then any method's.
    for load in (None, _load_general, catalogue.load_all):
        if load is not None:
            load()
        found = _statistics.get(name) or _member(name)
        if found is not None:
            return found
    way_out = f"there are: {', '.join([*GROUPS, *sorted(_statistics)])}"
    raise BadConfig(
        f"no statistic is called {name!r}", hint=hint_for(name, [*_statistics, *GROUPS, *KEPT], otherwise=way_out)
    )


def resolve(names: Iterable[str]) -> tuple[Statistic, ...]:
    """Statistics behind names and group names, each once; what only asks to keep choices or weights is left out.

    Raises:
        BadConfig: an unknown name.
    """
    if isinstance(names, str):
        names = (names,)
    found: dict[str, Statistic] = {}
    for name in names:
        if name in KEPT:
            continue
        for single in GROUPS.get(name, (name,)):
            found[single] = get(single)
    return tuple(found.values())


def sources_of(statistics: Iterable[Statistic]) -> frozenset[Source]:
    """All that must be seen for some statistics."""
    return frozenset(source for s in statistics for source in s.sources)
