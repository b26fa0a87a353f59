"""All figures of a trace at once."""

from __future__ import annotations

import pytest
import torch

from moekit.errors import BadConfig, BadData
from moekit.jobs.options.profile import ProfileOptions
from moekit.trace import Recording, check_summary, collaboration, record, summarise
from moekit.trace.domains import domain_report
from tests.families import build, tokens
from tests.unit.trace.samples import random_trace


def test_figures_are_those_of_the_parts() -> None:
    trace = random_trace(lengths=[9] * 12, experts=6)
    before = trace.digest
    summary = summarise(trace, permutations=50, seed=7)
    assert trace.digest == before, "describing a trace must not change it"
    assert summary.tokens == 108
    assert [layer.layer for layer in summary.layers] == [1, 3]
    counts = trace.require(("coactivation",))
    assert summary.layers[1].collaboration == collaboration(counts[3]["coactivation"])
    assert summary.layers[0].domains == domain_report(
        trace.indices(1), trace.domain_N, trace.document_N, 6, permutations=50, seed=7
    )
    assert summary.mean_collaboration is not None
    assert summary.mean_collaboration.entropy == pytest.approx(
        sum(layer.collaboration.entropy for layer in summary.layers if layer.collaboration) / 2
    )
    assert summary.mean_domains is not None
    assert set(summary.mean_domains) == {"information", "normalised", "shuffled", "excess", "divergence"}
    assert type(summary).model_validate_json(summary.model_dump_json()) == summary


def test_what_a_trace_cannot_tell_is_left_out() -> None:
    one_domain = summarise(random_trace(domains=("a",)))
    assert one_domain.mean_domains is None
    assert one_domain.layers[0].collaboration is not None
    without_choices = summarise(random_trace(keep=False, statistics=("load", "coactivation")))
    assert without_choices.mean_domains is None
    single = summarise(random_trace(top_k=1))
    assert single.mean_collaboration is None
    assert single.layers[0].load.max_over_mean >= 1
    few = summarise(random_trace(lengths=(3, 3)))
    assert few.mean_domains is None


def test_nothing_to_describe() -> None:
    with pytest.raises(BadData, match="empty"):
        summarise(random_trace(lengths=[]))
    with pytest.raises(BadData, match="'load'"):
        summarise(random_trace(keep=False, statistics=("gate_mass",)))


@pytest.mark.parametrize("name", ["load", "domain_load", "coactivation"])
def test_one_statistic_that_counts_choices_is_enough(name: str) -> None:
    check_summary(Recording(statistics=name, keep_choices=False))
    whole, counted = summarise(random_trace()), summarise(random_trace(keep=False, statistics=(name,)))
    assert [layer.load for layer in counted.layers] == [layer.load for layer in whole.layers]
    assert (counted.layers[0].collaboration is None) == (name != "coactivation")


def test_what_could_not_be_summarised_is_refused_before_anything_runs() -> None:
    for statistics, choices, complaint in [
        (("gate_mass",), False, "neither choices nor their counts"),
        (("gate_mess",), True, "no statistic is called"),
    ]:
        with pytest.raises(BadConfig, match=complaint):
            ProfileOptions(model="none", data="none", statistics=statistics, choices=choices).check()
    ProfileOptions(model="none", data="none", statistics=("gate_mass", "load"), choices=False).check()


def test_warnings_of_a_real_trace_are_passed_on() -> None:
    trace = record(build("mixtral"), [tokens(1, 2)])
    summary = summarise(trace)
    assert summary.warnings == trace.warnings != []
    assert summary.layers[0].load.never_routed > 0
    assert torch.isfinite(torch.tensor(summary.layers[0].load.cv))
