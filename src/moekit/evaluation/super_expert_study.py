"""The file that holds all that is known of a model's super experts; `moekit prune --protect` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from moekit._validation import parse_file
from moekit.checkpoint.atomic import atomic_write
from moekit.diagnose.super_experts.massive_activations import LayerStream
from moekit.diagnose.super_experts.report import SuperExpertReport
from moekit.evaluation.super_experts import SuperExpertCheck

# What the file says of itself, and is called in a folder.
KIND = "super-experts"
STUDY_FILE = f"{KIND}.json"


class SuperExpertStudy(BaseModel):
    """All that is known of a model's super experts: what `moekit super-experts` writes, and `prune --protect` reads.

    Attributes:
        kind: of this file.
        format: its version.
        protect: decoder layer -> experts that must stay; shared ones, which no method drops, are left out.
        source: the text on which they were found.
        report: what was found, thresholds and maxima.
        streams: the residual stream after each decoder layer, and what makes its massive activations.
        check: whether the model breaks without them; None where nothing was found or checked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["super-experts"] = "super-experts"
    format: Literal[1] = 1
    protect: dict[int, tuple[int, ...]]
    source: str = ""
    report: SuperExpertReport
    streams: tuple[LayerStream, ...]
    check: SuperExpertCheck | None = None

    @classmethod
    def of(
        cls,
        report: SuperExpertReport,
        streams: Sequence[LayerStream],
        source: str = "",
        check: SuperExpertCheck | None = None,
    ) -> SuperExpertStudy:
        """Put together; what is to be protected follows from the report."""
        protect = {layer: tuple(sorted(experts)) for layer, experts in report.protected.items()}
        return cls(protect=protect, source=source, report=report, streams=tuple(streams), check=check)

    @property
    def verdict(self) -> str:
        """What was found and, if it was checked, whether the model breaks without it."""
        return self.report.verdict if self.check is None else f"{self.report.verdict}; {self.check.verdict}"

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        atomic_write(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SuperExpertStudy:
        """Read what `save` wrote.

        Args:
            path: the file, or the folder it lies in.

        Raises:
            BadData: not there, or damaged.
        """
        path = Path(path) / STUDY_FILE if Path(path).is_dir() else Path(path)
        missing = "`moekit super-experts` writes one"
        return parse_file(cls, path, what="report", missing=missing, hint="find them again")
