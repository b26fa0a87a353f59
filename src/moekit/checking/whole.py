"""Check a checkpoint: structure, record, numbers, routers, extra files, parent, target."""

from __future__ import annotations

from pathlib import Path

from moekit._progress import Progress
from moekit.checking.contents import check_announced, check_lost, expert_layers
from moekit.checking.extras import check_extras
from moekit.checking.integrity import Integrity
from moekit.checking.parent import ParentCheck
from moekit.checking.peers import check_peers
from moekit.checking.report import CheckReport, Finding, from_error, make_report
from moekit.checking.routers import check_routers
from moekit.checking.scan import TensorScan, scan
from moekit.checking.settings import (
    check_fingerprint,
    check_generation_file,
    check_parent_settings,
    check_recorded_settings,
)
from moekit.checking.structure import (
    build_layout,
    check_dtypes,
    check_index,
    check_layout,
    check_tokenizer_file,
    open_checkpoint,
)
from moekit.checking.targets import TARGETS, check_target
from moekit.checking.values import (
    check_copies,
    check_dead,
    check_finite,
    check_scales,
)
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import text_config
from moekit.errors import BadConfig, MoekitError


def check(
    folder: str | Path,
    *,
    parent: str | Path | None = None,
    for_: str | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Prove that a checkpoint is what its record says, or find what is wrong with it.

    Every byte is read once, in bounded memory. Without a record the same is checked as far as structure, statistics
    and, if given, the parent can tell.

    Args:
        folder: local model folder.
        parent: folder or hub id of a trusted version to compare with: experts by likeness, and byte for byte what the
            record says has stayed.
        for_: also say what keeps "transformers" or "vllm" from loading it.
        progress: told bytes read.

    Returns:
        The report; `report.ok` is False if there is any error.

    Raises:
        BadConfig: an unknown target.
        MoekitError: the parent cannot be opened.
    """
    if for_ is not None and for_ not in TARGETS:
        raise BadConfig(f"there is nothing known of {for_!r}", hint=f"choose {' or '.join(TARGETS)}")
    path = Path(folder)
    checkpoint, findings = open_checkpoint(path)
    if checkpoint is None:
        return make_report(path, findings, [], 0, 0)
    layout, layers, trouble = build_layout(checkpoint)
    findings += trouble
    for looks in (
        check_index,
        check_dtypes,
        check_tokenizer_file,
        check_generation_file,
    ):
        findings += looks(checkpoint)
    if layout is not None:
        findings += check_layout(checkpoint, layout)
        findings += check_announced(checkpoint)
    try:
        scans = scan(path, checkpoint.tensors.values(), hidden=_hidden(checkpoint), progress=progress)
    except MoekitError as error:
        findings.append(from_error(error, "unreadable"))
        return make_report(path, findings, [], 0, 0)
    if checkpoint.record is not None:
        geometries = {layer.index: layer.geometry for layer in layers}
        findings += Integrity(checkpoint, scans, geometries).findings()
        findings += check_recorded_settings(checkpoint)
        if not any(finding.severity != "note" for finding in findings):
            findings += check_fingerprint(checkpoint)
    findings += _numbers(checkpoint, scans, all(_gate_first(layer.geometry) for layer in layers))
    if layout is not None:
        findings += check_routers(checkpoint, layout, layers)
    findings += check_extras(checkpoint, layers)
    comparison = None
    if parent is not None:
        comparison = ParentCheck(checkpoint, Checkpoint.open(parent), layout, layers, scans, progress)
        findings += comparison.findings()
        findings += check_parent_settings(checkpoint, comparison.parent)
        findings += check_lost(checkpoint, comparison.parent, layout, build_layout(comparison.parent)[0])
    if for_ is not None:
        findings += check_target(checkpoint, layout, for_)
    proven = _proven(checkpoint, findings, comparison, parent)
    return make_report(path, findings, proven, len(scans), checkpoint.nbytes, expert_layers(checkpoint))


def _hidden(checkpoint: Checkpoint) -> int | None:
    hidden = text_config(checkpoint.config).get("hidden_size")
    return hidden if isinstance(hidden, int) else None


def _gate_first(geometry: object) -> bool:
    return bool(getattr(geometry, "concatenated", True)) and not getattr(geometry, "transposed", False)


def _numbers(checkpoint: Checkpoint, scans: dict[str, TensorScan], gate_first: bool) -> list[Finding]:
    return [
        *check_finite(checkpoint, scans),
        *check_scales(checkpoint, scans),
        *check_dead(checkpoint, scans),
        *check_copies(checkpoint, scans),
        *check_peers(checkpoint, scans, gate_first),
    ]


def _proven(
    checkpoint: Checkpoint, findings: list[Finding], comparison: ParentCheck | None, parent: str | Path | None
) -> list[str]:
    """What holds, said plainly; only what was really compared."""
    codes = {finding.code for finding in findings if finding.severity == "error"}
    said = codes | {finding.code for finding in findings}
    proven = []
    structure = {"missing-tensor", "missing-expert", "surplus-tensor", "surplus-expert", "shape", "transposed"}
    if not codes & {*structure, "config", "dtype", "expert-count"} and "mtp-missing" not in said:
        proven.append(f"{len(checkpoint.tensors)} tensors have the names, shapes and dtypes that the config demands")
    if "non-finite" not in codes:
        proven.append("every number is finite")
    if checkpoint.record is not None and checkpoint.record.expectations.tensors and not codes:
        proven.append("every tensor is byte for byte the recorded one")
    moved = {"experts-swapped", "expert-replaced", "expert-changed", "unrelated", "gate-up-swapped", "transposed"}
    moved |= {"router-rows-moved"}
    if comparison is not None and comparison.compared and not codes & moved:
        which = "every expert" if not comparison.apart else f"every expert of {len(comparison.compared)} layers"
        silent = ", as far as its weights are not zeros" if "zeros-say-nothing" in said else ""
        proven.append(f"{which} is its counterpart in {parent}{silent}")
    if comparison is not None and comparison.same and "changed-from-parent" not in codes:
        proven.append(f"{len(comparison.same)} tensors outside of routed experts are byte for byte those of {parent}")
    return proven
