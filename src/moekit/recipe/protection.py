"""Experts that must stay, whatever a method thinks of them: named by the user, or super experts found on the text."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.errors import BadCheckpoint, BadConfig

if TYPE_CHECKING:
    from moekit.recipe.pruning import Source
    from moekit.trace import Trace

logger = logging.getLogger(__name__)

SUPER = "super"


def parse_protected(text: str, source: Source) -> dict[int, tuple[int, ...]]:
    """Experts that must stay, from `1:68,2:92`, a JSON file `{"1": [68], "2": [92]}`, or a report of super experts.

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
        if max(experts) >= geometries[number].experts:
            raise BadConfig(
                f"a protected expert is not there: experts are 0 to {geometries[number].experts - 1}",
                layer=number,
                expert=max(experts),
            )
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(pairs.items())}


def _read_protected(file: Path, source: Source) -> dict[int, set[int]]:
    from moekit.checkpoint.strictjson import read_json
    from moekit.compress.protect.super_experts import SuperExpertReport

    hint = 'write super, pairs such as 1:68,2:92, or a JSON file {"1": [68], "2": [92]}'
    if not file.is_file():
        raise BadConfig(f"{str(file)!r} names no protected experts", hint=hint)
    try:
        told = read_json(file)
        if "rule" in told:
            report = SuperExpertReport.load(file)
            report.check_model(source.checkpoint.fingerprint, file)
            return {layer: set(experts) for layer, experts in report.protected.items()}
        return {int(layer): {int(e) for e in experts} for layer, experts in told.items() if experts}
    except (BadCheckpoint, ValueError, TypeError) as error:
        raise BadConfig(f"protected experts cannot be read: {error}", file=file, hint=hint) from error


def protection_needs(source: Source) -> tuple[str, ...]:
    """Statistics by which super experts are found."""
    from moekit.compress.protect.super_experts import NEEDS

    shared = any(geometry.shared_width for geometry in source.geometries.values())
    return (*NEEDS, "shared_peak") if shared else NEEDS


def super_experts(source: Source, trace: Trace) -> dict[int, tuple[int, ...]]:
    """Decoder layer -> the experts that carry massive activations; what was found is logged.

    Raises:
        BadData: the trace does not hold what tells them.
    """
    from moekit.checkpoint.fingerprint import text_config
    from moekit.compress.protect.super_experts import find_super_experts

    layers = text_config(source.checkpoint.config).get("num_hidden_layers")
    report = find_super_experts(
        trace.require(protection_needs(source)),
        decoder_layers=layers if isinstance(layers, int) else None,
        model=source.location,
        fingerprint=source.checkpoint.fingerprint,
    )
    logger.warning("%s", report.verdict)
    return {layer: tuple(sorted(experts)) for layer, experts in report.protected.items()}
