"""What ranks are asked to do with parts on experts that lie on several ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moekit.errors import BadConfig, UnsupportedModel
from moekit.parallel import expert_parallel, gather_experts
from moekit.parallel.ranks import Ranks
from moekit.runtime import attach, detach
from moekit.trace import Recorder
from tests.parallel.jobs import step, tiny
from tests.parts import Gain, leftovers, stir


class Reading(Gain):
    """A part that says it reads the experts' weights."""

    reads_weights = True


def composed(ranks: Ranks, family: str, dispatch: str, tokens: Tensor, gain_first: bool) -> dict[str, Any]:
    """A step with a part that has parameters, recorded, over experts dealt out; and what is left when all have gone."""
    model = tiny(family)
    if gain_first:
        attach(model, Gain())
        expert_parallel(model, ranks, dispatch=dispatch)
    else:
        expert_parallel(model, ranks, dispatch=dispatch)
        attach(model, Gain())
    stir(model)
    with Recorder(model, statistics=("load", "gate_mass"), fingerprint="") as recorder:
        answer = step(model, tokens[ranks.rank :: ranks.size])
    trace = recorder.trace()
    if gain_first:
        detach(model)
        gather_experts(model)
    else:
        gather_experts(model)
        detach(model)
    answer["grads"] = {name: grad for name, grad in answer["grads"].items() if "Gain" in name}
    return answer | {"choices": {layer: trace.indices(layer) for layer in trace.meta.layers}, "left": leftovers(model)}


def refused(ranks: Ranks) -> list[str]:
    """What cannot be done with experts that lie on several ranks."""
    model = tiny("olmoe")
    attach(model, Reading())
    said = []
    try:
        expert_parallel(model, ranks)
    except BadConfig as error:
        said.append(str(error))
    detach(model)
    expert_parallel(model, ranks)
    for attempt in (lambda: attach(model, Reading()), Recorder(model, statistics=("outputs",)).__enter__):
        try:
            attempt()
        except (BadConfig, UnsupportedModel) as error:
            said.append(str(error))
    return said
