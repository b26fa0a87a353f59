"""What a check found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from moekit.errors import BadCheckpoint, MoekitError, UnsafeInput

Severity = Literal["error", "warning", "note"]
_MANY = 4
_RANK = {"error": 0, "warning": 1, "note": 2}


class Finding(BaseModel):
    """One thing that a check found.

    Attributes:
        severity: "error": the checkpoint is not what it must be; "warning": suspicious; "note": good to know.
        code: stable name of the kind of finding ("dead-expert", "stale-index", ...).
        message: one sentence.
        file: file or folder.
        layer: decoder layer.
        expert: expert within the layer.
        hint: the way out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    severity: Severity
    code: str
    message: str
    file: str | None = None
    layer: int | None = None
    expert: int | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = [f"layer {self.layer}" if self.layer is not None else "", f"expert {self.expert}"]
        place = place[: 1 + (self.expert is not None)]
        where = ", ".join(part for part in [self.file or "", *place] if part)
        return f"{self.severity} [{self.code}] {where + ': ' if where else ''}{self.message}"


def from_error(error: MoekitError, code: str) -> Finding:
    """A finding from an error that ended a part of the check."""
    return Finding(
        severity="error",
        code=code,
        message=error.message,
        file=error.file,
        layer=error.layer,
        expert=error.expert,
        hint=error.hint,
    )


class CheckReport(BaseModel):
    """All findings of a check, worst first.

    Attributes:
        folder: what was checked.
        findings: worst first, then by layer and expert.
        proven: what was proved, one sentence each.
        tensors: number of tensors read.
        nbytes: bytes read.
        experts: decoder layer -> routed experts; empty for a dense model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    findings: list[Finding]
    proven: list[str] = []
    tensors: int = 0
    nbytes: int = 0
    experts: dict[int, int] = {}

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings and notes do not count."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def unsafe(self) -> bool:
        """Whether reading was refused because the folder is unsafe (exit code 3 instead of 2)."""
        return any(finding.code == "unsafe" for finding in self.findings)

    def codes(self) -> set[str]:
        """The kinds of errors and warnings found."""
        return {finding.code for finding in self.findings if finding.severity != "note"}

    def raise_if_bad(self) -> None:
        """Raise the worst finding, if there is an error.

        Raises:
            UnsafeInput: the folder is unsafe.
            BadCheckpoint: any other error.
        """
        if self.ok:
            return
        first = self.findings[0]
        counts = Counter(finding.code for finding in self.findings if finding.severity == "error")
        more = (
            ""
            if len(counts) == 1 and counts[first.code] == 1
            else f" (of {sum(counts.values())} errors: {_sum(counts)})"
        )
        kind = UnsafeInput if self.unsafe else BadCheckpoint
        raise kind(
            first.message + more,
            file=first.file or Path(self.folder),
            layer=first.layer,
            expert=first.expert,
            hint=first.hint or "see `moekit check` for all findings",
        )


def _sum(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {code}" for code, count in counts.most_common())


def _collapse(findings: list[Finding]) -> list[Finding]:
    """Merge warnings and notes that differ in their layer only, from `_MANY` layers on."""
    groups: dict[Finding, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.model_copy(update={"layer": None})].append(finding)
    result = []
    for merged, members in groups.items():
        if merged.severity == "error" or merged.expert is not None or len(members) < _MANY:
            result += members
            continue
        layers = ", ".join(str(layer) for layer in sorted(m.layer for m in members if m.layer is not None))
        result.append(merged.model_copy(update={"message": f"{merged.message} (layers {layers})"}))
    return result


def make_report(
    folder: Path,
    findings: list[Finding],
    proven: list[str],
    tensors: int,
    nbytes: int,
    experts: Mapping[int, int] | None = None,
) -> CheckReport:
    """Order the findings, drop repeated ones, and tell once what holds for many layers alike."""
    unique = _collapse(list(dict.fromkeys(findings)))
    unique.sort(key=lambda f: (_RANK[f.severity], f.layer is None, f.layer or 0, f.expert is None, f.expert or 0))
    return CheckReport(
        folder=str(folder),
        findings=unique,
        proven=proven,
        tensors=tensors,
        nbytes=nbytes,
        experts=dict(experts or {}),
    )
