"""All figures of a trace in one object: what `moekit profile` prints and a report shows."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from moekit._progress import Progress, track
from moekit.errors import BadConfig, BadData
from moekit.trace.domains import DomainReport, choose_unit, domain_report, mean_report
from moekit.trace.metrics import Collaboration, LoadBalance, collaboration, load_balance, mean_collaboration
from moekit.trace.recording import Recording
from moekit.trace.store import Trace


class LayerSummary(BaseModel):
    """Figures of one layer.

    Attributes:
        layer: decoder layer.
        experts: E.
        top_k: K.
        load: how even the load is.
        collaboration: how broadly experts fire together; None where K is 1, or where pairs were not counted.
        domains: how well routing tells domains apart; None without choices, or with a single domain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    experts: int
    top_k: int
    load: LoadBalance
    collaboration: Collaboration | None
    domains: DomainReport | None


class TraceSummary(BaseModel):
    """Figures of a trace.

    Attributes:
        model: name of the model.
        tokens: N.
        domains: names of the domains.
        layers: figures by layer.
        mean_collaboration: mean over layers; None where no layer has it.
        mean_domains: means over layers of information, NMI, its shuffled baseline, excess and divergence.
        warnings: what to know before trusting the figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    tokens: int
    domains: list[str]
    layers: list[LayerSummary]
    mean_collaboration: Collaboration | None
    mean_domains: dict[str, float] | None
    warnings: list[str]


# Any of these counts choices, so that a summary can be made without the choices themselves.
_COUNTS = ("load", "coactivation", "domain_load")


def check_summary(recording: Recording) -> None:
    """Refuse what is going to be recorded if no summary could be made of it.

    Raises:
        BadConfig: neither choices are kept, nor does a statistic count them; or a statistic is unknown.
    """
    names = [entry.name for entry in recording.entries]
    if not recording.keeps_choices and not set(names) & set(_COUNTS):
        raise BadConfig(
            f"neither choices nor their counts would be kept, only {', '.join(names) or 'nothing'}",
            hint="keep the choices, or record a statistic that counts them too (load, coactivation or domain_load)",
        )


def summarise(
    trace: Trace, *, permutations: int = 200, seed: int = 0, progress: Progress | None = None
) -> TraceSummary:
    """Compute every figure a trace allows.

    Args:
        trace: with choices, or with a statistic that counts them ("load", "coactivation" or "domain_load").
        permutations: shuffles for the significance of domains.
        seed: of the shuffles.
        progress: told of each layer.

    Raises:
        BadData: the trace is empty, or has neither choices nor their counts.
    """
    if not trace.meta.tokens:
        raise BadData("the trace is empty", hint="record a text that is not empty")
    names: tuple[str, ...] = ("load", "coactivation")
    if not trace.meta.has_choices:
        names = tuple(name for name in _COUNTS if name in trace.meta.statistics) or names
    counts = trace.require(names)
    layers = []
    for layer, experts, top_k in track(
        list(zip(trace.meta.layers, trace.meta.experts, trace.meta.top_k, strict=True)), "summarising", progress
    ):
        load_E, pairs_EE = counts[layer].load_E, counts[layer].get("coactivation")
        paired = pairs_EE is not None and bool(pairs_EE.triu(1).any())
        layers.append(
            LayerSummary(
                layer=layer,
                experts=experts,
                top_k=top_k,
                load=load_balance(load_E),
                collaboration=collaboration(pairs_EE, load_E) if paired and pairs_EE is not None else None,
                domains=_domains(trace, layer, permutations, seed),
            )
        )
    company = [s.collaboration for s in layers if s.collaboration is not None]
    apart = [s.domains for s in layers if s.domains is not None]
    return TraceSummary(
        model=trace.meta.model,
        tokens=trace.meta.tokens,
        domains=trace.meta.domains,
        layers=layers,
        mean_collaboration=mean_collaboration(company) if company else None,
        mean_domains=mean_report(apart) if apart else None,
        warnings=trace.warnings,
    )


def _domains(trace: Trace, layer: int, permutations: int, seed: int) -> DomainReport | None:
    if not trace.meta.has_choices or len(trace.meta.domains) < 2:
        return None
    unit = choose_unit(trace.document_N, trace.domain_N)
    unit_N = trace.document_N if unit == "document" else trace.sequence_N
    try:
        return domain_report(
            trace.raw_indices(layer),
            trace.domain_N,
            unit_N,
            trace.meta.experts_of(layer),
            unit=unit,
            permutations=permutations,
            seed=seed,
        )
    except BadData:  # one sequence a domain: nothing to shuffle
        return None
