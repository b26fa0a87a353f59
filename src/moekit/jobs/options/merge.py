"""Options of `moekit.jobs.merge`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from moekit.jobs.options.base import CommandLine
from moekit.jobs.options.fewer import FewerOptions


class MergeOptions(FewerOptions):
    """Let a merging method (`moekit methods merge`) fold experts into fewer, and prove what that costs."""

    job: ClassVar[str] = "moekit.jobs.merge"
    kind: ClassVar[str] = "merge"
    command: ClassVar[CommandLine] = CommandLine(
        help="Fold the experts of each layer into fewer: decide on text which go together, merge their weights, prove "
        "on held-out text what it costs, beside pruning to the same size, write, and check what was written. Methods: "
        "moekit methods merge.",
        writes="folder of the smaller model",
        arguments=("model",),
        instead="--plan",
        hidden=("write",),
        examples=(
            "moekit merge ./moe --method hc-smoe --keep 0.75 --data my-domain/ -o ./fewer",
            "moekit merge ./moe --method m-smoe --keep 12GiB --data demo --protect super -o ./small",
            "moekit merge ./moe --method hc-smoe --set align=weights --keep 0.5 --data demo --plan ./p.json",
        ),
    )

    method: str = Field(description="which experts go together, and how; see moekit methods merge")
    proof: bool = Field(
        default=True, description="measure what it costs, against pruning by REAP and frequency, and random groups"
    )
