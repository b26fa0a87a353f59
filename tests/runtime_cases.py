"""Runtime parts that laws try: all of the catalogue and those of `tests.parts`, chosen by trait."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.catalogue import MethodRecord, Trait
from moekit.runtime import attach
from moekit.runtime.attachment import Attachment
from moekit.runtime.part import PlanInputs, RuntimePart
from moekit.trace import record as record_trace
from tests.families import EXPERTS, build, tokens
from tests.parts import FAMILIES, records

KINDS = ("routing", "block", "experts")


def known() -> list[MethodRecord]:
    """Records of the parts of `tests.parts`, and of all registered ones."""
    ours = [record for record in catalogue.methods() if record.kind in KINDS and record.origin != "tests"]
    return [*records().values(), *ours]


def cases(
    kinds: Sequence[str],
    *having: Trait,
    any_of: Collection[Trait] = (),
    without: Collection[Trait] = (),
    families: int = 2,
) -> list[Any]:
    """Parameters (record, family): each part with some of the families, so that a law sees every part and every family.

    Args:
        kinds: of the catalogue.
        having: traits that all must have.
        any_of: traits of which one is enough; () for no such demand.
        without: traits that none may have.
        families: how many each part is tried on.
    """
    found = []
    for place, record in enumerate(known()):
        traits = record.traits
        if record.kind not in kinds or not traits.issuperset(having) or traits & set(without):
            continue
        if any_of and not traits & set(any_of):
            continue
        for turn in range(families):
            family = FAMILIES[(place + 2 * turn + turn // 2) % len(FAMILIES)]
            found.append(pytest.param(record, family, id=f"{record.name}-{family}"))
    return found


@cache
def statistics(family: str, needs: tuple[str, ...]) -> dict[int, dict[str, Tensor]] | None:
    """What a method declares to need, recorded on the family's stock model."""
    if not needs:
        return None
    return record_trace(build(family), [tokens(8, 24, seed=1)], statistics=needs).require(needs)


def examples(record: MethodRecord, model: PreTrainedModel) -> Sequence[RuntimePart]:
    """Settings that a part wants to be tried with."""
    cls: type[RuntimePart] = record.cls
    return cls.examples(find_moe_layers(model)[0].geometry)


def hang(model: PreTrainedModel, family: str, record: MethodRecord, part: RuntimePart | None = None) -> Attachment:
    """Attach a part, by default its first example, planned from recorded statistics and two devices a layer."""
    part = examples(record, model)[0] if part is None else part
    known_ = statistics(family, record.needs) or {}
    constants = {}
    for layer in find_moe_layers(model):
        part.check(layer.geometry, layer.index)
        devices = [expert % 2 for expert in range(EXPERTS)]
        constants[layer.index] = part.plan(
            PlanInputs(layer.index, layer.geometry, known_.get(layer.index, {}), devices)
        )
    return attach(model, part, constants)
