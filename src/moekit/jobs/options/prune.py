"""Options of `moekit.jobs.prune`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from moekit.jobs.options.base import CommandLine
from moekit.jobs.options.fewer import FewerOptions


class PruneOptions(FewerOptions):
    """Let a pruning method (`moekit methods prune`) decide, prove what that costs, and write the smaller model."""

    job: ClassVar[str] = "moekit.jobs.prune"
    kind: ClassVar[str] = "prune"
    command: ClassVar[CommandLine] = CommandLine(
        help="Drop the experts that a model needs least: decide on text, prove what it costs on held-out text, against "
        "frequency and random pruning of the same budget, write, and check what was written. Methods: moekit methods "
        "prune.",
        writes="folder of the smaller model",
        arguments=("model",),
        instead="--plan",
        hidden=("write",),
        examples=(
            "moekit prune ./moe --method easy-ep --keep 0.5 --data my-domain/ -o ./half",
            "moekit prune ./moe --method dern --set alpha=0.4 --keep 64 --data demo --protect super -o ./dern",
            "moekit prune ./moe --method reap --keep 0.5 --data demo --plan ./p.json",
            "moekit prune ./moe --method reap --keep 12GiB --scope global --least 16 --data demo -o ./uneven",
        ),
    )

    method: str = Field(description="which experts go; see moekit methods prune")
