"""Experts that must stay, whatever a method thinks of them: named by the user, or super experts found on the text."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from moekit.checkpoint.names import stated_depth
from moekit.checkpoint.strictjson import read_json
from moekit.diagnose.super_experts.finding import NEEDS, find_super_experts
from moekit.diagnose.super_experts.report import SuperExpertReport
from moekit.errors import BadCheckpoint, BadConfig
from moekit.evaluation.super_expert_study import SuperExpertStudy
from moekit.jobs.shared.opened import OpenedModel
from moekit.trace import Trace

logger = logging.getLogger(__name__)

SUPER = "super"
_STUDY = "super-experts.json"


def parse_protected(text: str, source: OpenedModel) -> dict[int, tuple[int, ...]]:
    """Experts that must stay: `1:68,2:92`, a JSON file `{"1": [68], "2": [92]}`, or what `moekit super-experts` wrote.

    Raises:
        BadConfig: it cannot be read, or names what the model does not have.
    """
    pairs: dict[int, set[int]] = {}
    if re.fullmatch(r"\s*\d+:\d+(\s*,\s*\d+:\d+)*\s*", text):
        for pair in text.split(","):
            layer, _, expert = pair.partition(":")
            pairs.setdefault(int(layer), set()).add(int(expert))
    else:
        pairs = _read_protected(Path(text).expanduser(), source)
    geometries = source.geometries
    for number, experts in pairs.items():
        if number not in geometries:
            raise BadConfig(
                f"experts of layer {number} are protected, which holds no routed experts",
                hint=f"layers with experts: {min(geometries)} to {max(geometries)}",
            )
        if missing := sorted(experts - set(range(geometries[number].experts))):
            raise BadConfig(
                f"a protected expert is not there: experts are 0 to {geometries[number].experts - 1}",
                layer=number,
                expert=missing[-1],
            )
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(pairs.items())}


def _read_protected(file: Path, source: OpenedModel) -> dict[int, set[int]]:
    hint = 'write super, pairs such as 1:68,2:92, or a JSON file {"1": [68], "2": [92]}, or OUT of super-experts'
    # Not Path.is_file: what is no path at all, too long for one, would end in an error of the system.
    file = file / _STUDY if os.path.isdir(file) else file
    if not os.path.exists(file):
        raise BadConfig(f"{str(file)!r} names no protected experts", hint=hint)
    try:
        told = read_json(file)
        # Which of the three it is, its own keys say: a plain mapping has nothing but numbers of layers.
        if "kind" in told:
            return _of_study(file, source)
        if "rule" in told:
            report = SuperExpertReport.load(file)
            report.check_model(source.checkpoint.fingerprint, file)
            return {layer: set(experts) for layer, experts in report.protected.items()}
        return {int(layer): _numbers(layer, experts) for layer, experts in told.items() if experts}
    except (BadCheckpoint, ValueError, TypeError) as error:
        raise BadConfig(f"protected experts cannot be read: {error}", file=file, hint=hint) from error


def _numbers(layer: str, experts: Any) -> set[int]:
    # JSON's true would pass for 1, and a text for a list of its digits.
    if not isinstance(experts, list) or not all(type(expert) is int for expert in experts):
        raise ValueError(f"layer {layer} names {experts!r}, which is no list of numbers of experts")
    return set(experts)


def _of_study(file: Path, source: OpenedModel) -> dict[int, set[int]]:
    """What a study of super experts protects; it must be of this model."""
    study = SuperExpertStudy.load(file)
    study.report.check_model(source.checkpoint.fingerprint, file)
    if not study.protect:
        logger.warning("%s protects no routed expert; %s", file, study.report.verdict)
    return {layer: set(experts) for layer, experts in study.protect.items() if experts}


def protection_needs(source: OpenedModel) -> tuple[str, ...]:
    """Statistics by which super experts are found."""
    shared = all(geometry.shared_width for geometry in source.geometries.values())
    return (*NEEDS, "shared_peak") if shared else NEEDS


def find_in_trace(source: OpenedModel, trace: Trace, **rule: Any) -> SuperExpertReport:
    """The super experts that a trace of the model shows.

    Args:
        source: the model.
        trace: with what tells them (`protection_needs`).
        **rule: see `moekit.diagnose.super_experts.report.Rule`.

    Raises:
        BadData: the trace does not hold what tells them.
        NumericFault: an output is infinite.
    """
    return find_super_experts(
        trace.require(protection_needs(source)),
        decoder_layers=stated_depth(source.checkpoint.config),
        model=source.location,
        fingerprint=source.checkpoint.fingerprint,
        **rule,
    )


def super_experts(source: OpenedModel, trace: Trace) -> dict[int, tuple[int, ...]]:
    """Decoder layer -> the experts that carry massive activations; what was found is logged.

    Raises:
        BadData: the trace does not hold what tells them.
    """
    report = find_in_trace(source, trace)
    logger.warning("%s", report.verdict)
    return {layer: tuple(sorted(experts)) for layer, experts in report.protected.items()}
